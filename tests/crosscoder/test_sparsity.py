import re
from pathlib import Path

import pytest
import torch
from dictionaries import new_training, planted
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import nano_crosscoder as nano
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

from tl_crosscoder.crosscoder.sparse.codes import DenseCodes, Pattern, SparseCodes
from tl_crosscoder.crosscoder.sparsity import L1, JumpReLU, Sparsity
from tl_crosscoder.crosscoder.topk import BatchTopK, TopK, threshold_keeping

few = settings(max_examples=30, deadline=None)


def test_kept_codes_by_hand():  # spec: C6
    norms = torch.tensor([1.0, 0.1, 10.0])
    weighted = torch.tensor([[3.0, 1.0, 0.0], [2.0, 4.0, 0.5]]) * norms
    # f n = [[3, 0.1, 0], [2, 0.4, 5]]; k * batch = 3 largest are 5, 3, 2: two of them in row 1.
    kept = BatchTopK(k=1.5).keep(weighted, 1.5)
    assert kept.tolist() == [[True, False, False], [True, False, True]]
    assert TopK(k=2).keep(weighted, 2).tolist() == [[True, True, False], [True, False, True]]
    # Of {2, 1, 1, 1, 1} three are the 2 and the first two ones in reading order.
    weighted = torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 0.0]])
    assert BatchTopK(k=1.5).keep(weighted, 1.5).tolist() == [[True, True, True], [False] * 3]
    assert TopK(k=1).keep(weighted, 1).tolist() == [[False, True, False], [True, False, False]]


@few
@given(
    n=st.integers(1, 12), d_sae=st.integers(2, 20), k=st.integers(1, 5), seed=st.integers(0, 999)
)
def test_kept_codes_are_those_of_the_reference_and_permute(n, d_sae, k, seed):  # spec: C6
    """Quarters, so that there are ties; fewer are kept where fewer are positive."""
    generator = torch.Generator().manual_seed(seed)
    weighted = torch.randint(-3, 9, (n, d_sae), generator=generator).relu() / 4
    order = torch.randperm(d_sae, generator=generator)
    distinct = weighted + 1e-3 * torch.rand(n, d_sae, generator=generator)
    for sparsity, rule in ((BatchTopK(k=k), nano.batch_topk), (TopK(k=k), nano.topk)):
        assert torch.equal(sparsity.keep(weighted, k), rule(weighted, k) > 0)
        permuted = sparsity.keep(distinct[:, order], k)
        assert torch.equal(permuted, sparsity.keep(distinct, k)[:, order])


def test_k_falls_linearly_and_stays():
    sparsity = BatchTopK(k=10, k_initial=30, k_anneal_steps=4)
    # 30, 25, 20, 15, then 10: three, 2.5, 2, 1.5 times k.
    assert [10 * sparsity.k_factor(step) for step in range(6)] == [30, 25, 20, 15, 10, 10]
    assert BatchTopK(k=10).k_factor(0) == 1.0


def test_penalties_by_hand_for_dense_and_sparse_codes():
    dense = DenseCodes(values=torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    pattern = Pattern.at(torch.tensor([0, 1, 3]), shape=(2, 2))
    sparse = SparseCodes(pattern=pattern, values=torch.tensor([1.0, 2.0, 3.0]))
    norms, scale = torch.tensor([10.0, 1.0]), torch.tensor([0.5, 1.0])
    for codes in (dense, sparse):
        # 1*10 + 2*1 + 0*10 + 3*1 = 15; with the first latent at half: 5 + 2 + 3 = 10.
        assert L1().penalty(codes, norms, None).item() == 15
        assert L1().penalty(codes, norms, scale).item() == 10
        expected = torch.tanh(torch.tensor([5.0, 1.0, 1.5]))
        penalty = JumpReLU(tanh_scale=0.5).penalty(codes, norms, None)
        torch.testing.assert_close(penalty, expected.sum())
        scaled = JumpReLU(tanh_scale=0.5).penalty(codes, norms, scale)
        torch.testing.assert_close(scaled, (expected * torch.tensor([0.5, 1.0, 1.0])).sum())


def test_threshold_by_hand():  # spec: C5
    weighted = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    # k = 1 over two tokens keeps 4 and 3; the threshold lies midway to 2.
    assert threshold_keeping(2, weighted.flatten()).item() == nano.threshold(weighted, 1) == 2.5


def calibrated(k: float, batches: list[Tensor], d_sae: int) -> Tensor:
    sparsity, threshold = BatchTopK(k=k), torch.zeros(d_sae)
    sparsity.calibrate_(threshold, batches, sparsity.groups([], d_sae))
    return threshold


@pytest.mark.parametrize("k", [1, 3, 7.5])
def test_calibrated_threshold_gives_the_asked_l0_over_batches_of_different_activity(k):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(500, 40, generator=generator).relu() * s for s in (0.5, 1.0, 1.5)]
    threshold = calibrated(k, batches, 40)
    l0 = torch.cat(batches).gt(threshold).sum(dim=-1).double().mean().item()
    assert l0 == pytest.approx(k, rel=0.01)


def test_threshold_is_zero_where_fewer_than_k_are_positive():
    assert (calibrated(3, [torch.eye(4)], 4) == 0).all()
    with pytest.raises(ValueError, match="no tokens"):
        calibrated(3, [], 4)


@pytest.mark.parametrize(
    "sparsity",
    [
        L1(coefficient=0.3, warm_up_steps=5),
        TopK(k=7),
        BatchTopK(k=7, k_initial=9, k_anneal_steps=3),
        JumpReLU(coefficient=2, bandwidth=0.1),
    ],
)
def test_sparsities_survive_json(sparsity):
    assert Sparsity.from_dict(sparsity.to_dict()) == sparsity


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sparsity.from_dict({"kind": "l7"}), "not known"),
        (lambda: BatchTopK(k=0), "above 0"),
        (lambda: BatchTopK(k=5, k_initial=4, k_anneal_steps=1), "k only falls"),
        (lambda: BatchTopK(k=5, k_anneal_steps=1), "needs both k_initial"),
        (lambda: TopK(k=1.5), "whole number"),
        (lambda: L1(coefficient=-1), "0 or more"),
        (lambda: JumpReLU(bandwidth=0), "above 0"),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_sparsity_of_the_docs_trains_and_loads_in_saelens(tmp_path):  # spec: C14
    """One class in a page of the docs, and no line of the package knows it."""
    page = (Path(__file__).parents[2] / "docs/extending.md").read_text(encoding="utf-8")
    (code,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "class LogSum" in b)
    names = {"__name__": __name__}
    exec(code, names)
    sparsity = names["LogSum"](coefficient=0.2, warm_up_steps=5)
    assert Sparsity.from_dict(sparsity.to_dict()) == sparsity
    assert sparsity.coefficients_at(0) == {"log_sum": pytest.approx(0.04)}
    training, losses = new_training(sparsity=sparsity), []
    optimizer = torch.optim.Adam(training.parameters(), lr=1e-2)
    for step in range(60):
        optimizer.zero_grad()
        output = training.step_loss(planted(64, seed=step), step=step)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert set(output.losses) == {"reconstruction", "auxk", "log_sum"}
    assert losses[-1] < 0.7 * losses[0]
    training.calibrate_threshold_([planted(100)])
    training.save_model(tmp_path / "checkpoint")
    assert TrainingSAE.load_from_disk(tmp_path / "checkpoint").cfg.sparsity == sparsity
    made = training.to_inference()
    loaded = SAE.load_from_disk(made.save(tmp_path / "d"))
    x = planted(50, seed=900)
    codes = training.step_loss(x).codes.to_dense() * training.get_W_dec_norm()
    assert torch.equal(loaded.encode(x), made.encode(x))
    torch.testing.assert_close(loaded.encode(x), codes, atol=1e-5, rtol=1e-4)
