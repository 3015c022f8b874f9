import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_crosscoder.crosscoder.sparsity import (
    L1,
    BatchTopK,
    calibrate_threshold,
    smallest_kept,
    sparsity_from_dict,
    sparsity_to_dict,
    threshold_for_l0,
)


def test_batchtopk_keeps_the_largest_weighted_codes_of_the_batch_unscaled():
    pre = torch.tensor([[3.0, 1.0, -5.0], [2.0, 4.0, 0.5]])
    norms = torch.tensor([1.0, 0.1, 10.0])
    # f n = [[3, 0.1, 0], [2, 0.4, 5]]; k * batch = 3 largest are 5, 3, 2: two of them in row 1.
    kept = BatchTopK(k=1.5).codes(pre, norms)
    assert torch.equal(kept, torch.tensor([[3.0, 0.0, 0.0], [2.0, 0.0, 0.5]]))


def test_batchtopk_keeps_fewer_where_fewer_are_positive():
    pre = -torch.ones(4, 3)
    pre[0, 0] = 1.0
    assert BatchTopK(k=2).codes(pre, torch.ones(3)).count_nonzero() == 1


def test_batchtopk_gradient_reaches_kept_codes_only():
    pre = torch.tensor([[3.0, 1.0], [0.5, 2.0]], requires_grad=True)
    BatchTopK(k=1).codes(pre, torch.ones(2)).sum().backward()
    assert torch.equal(pre.grad, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))


def test_l1_penalty_is_the_mean_over_tokens_of_weighted_codes():
    codes = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    norms = torch.tensor([10.0, 1.0])
    # (1*10 + 2*1 + 0*10 + 3*1) / 2 tokens = 7.5
    assert L1(coefficient=0.1).penalties(codes, norms)["l1"].item() == pytest.approx(7.5)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), d_sae=st.integers(2, 20), k=st.floats(0.5, 5), seed=st.integers(0, 99))
def test_permuting_latents_permutes_codes(n, d_sae, k, seed):
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(n, d_sae, generator=generator)
    norms = torch.rand(d_sae, generator=generator) + 0.1
    order = torch.randperm(d_sae, generator=generator)
    sparsity = BatchTopK(k=k)
    permuted = sparsity.codes(pre[:, order], norms[order])
    assert torch.equal(permuted, sparsity.codes(pre, norms)[:, order])


def test_smallest_kept_and_threshold_by_hand():
    codes = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    norms = torch.tensor([3.0, 1.0])
    assert smallest_kept(codes, norms).item() == 2.0  # 1 * 3 = 3 and 2 * 1 = 2
    assert smallest_kept(codes * 0, norms).item() == torch.inf
    weighted = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    # k = 1 over two tokens keeps 4 and 3; the threshold lies midway to 2.
    assert threshold_for_l0(weighted, k=1).item() == 2.5


@pytest.mark.parametrize("k", [1, 3, 7.5])
def test_calibrated_threshold_gives_the_asked_l0_over_batches_of_different_activity(k):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(500, 40, generator=generator).relu() * s for s in (0.5, 1.0, 1.5)]
    threshold = calibrate_threshold(batches, k=k)
    l0 = torch.cat(batches).gt(threshold).sum(dim=-1).double().mean().item()
    assert l0 == pytest.approx(k, rel=0.01)


def test_threshold_is_zero_where_fewer_than_k_are_positive():
    assert calibrate_threshold([torch.eye(4)], k=3).item() == 0.0


def test_sparsities_survive_json_and_refuse_nonsense():
    for sparsity in (L1(coefficient=0.3, warm_up_steps=5), BatchTopK(k=7)):
        assert sparsity_from_dict(sparsity_to_dict(sparsity)) == sparsity
    with pytest.raises(ValueError, match="not known"):
        sparsity_from_dict({"kind": "l7"})
    with pytest.raises(ValueError, match="above 0"):
        BatchTopK(k=0)
    with pytest.raises(ValueError, match="0 or more"):
        L1(coefficient=-1)
