"""The Triton kernels against float64 references; `test_triton` runs this in a new process.

There TRITON_INTERPRET is set before anything imports triton, and the kernels run in numpy, on
the CPU; or it is not set, and they run compiled, on CUDA.
"""

import os
from unittest.mock import patch

import numpy as np
import pytest
import torch
from dictionaries import new_training, planted
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_crosscoder.config.presets import preset
from tl_crosscoder.crosscoder.sparse import codes as eager
from tl_crosscoder.crosscoder.sparse import triton as kernels_triton
from tl_crosscoder.crosscoder.sparse.codes import DenseCodes, SparseCodes
from tl_crosscoder.crosscoder.sparse.triton import compact, sampled_dots, weighted_bag
from tl_crosscoder.train.presets import recipe_of

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# Of sums of some tens of terms of size 1, rounded in float32 or to the type named.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d)[6:])
# Mostly short and empty rows, and now and then one of many entries.
row_lengths = st.lists(st.sampled_from([0, 0, 1, 2, 5, 17, 40]), min_size=1, max_size=6)
few = settings(max_examples=12, deadline=None)


def on_device(*values, dtype=None):
    return torch.tensor(*values, dtype=dtype, device=DEVICE)


def offsets_from(lengths):
    return on_device([0, *np.cumsum(lengths, dtype=int)], dtype=torch.int32)


def entries(lengths, n, *, seed=0, dtype=torch.float64):
    """(index, offsets, weights) of rows of these lengths, over n columns."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(n, (sum(lengths),), generator=generator, dtype=torch.int32)
    weights = torch.randn(sum(lengths), generator=generator).to(dtype)
    return index.to(DEVICE), offsets_from(lengths), weights.to(DEVICE)


def matrix(n, d, *, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def naive_bag(table, index, offsets, weights):
    terms = weights.double()[:, None] * table.double()[index.long()]
    spans = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return torch.stack([terms[start:end].sum(dim=0) for start, end in spans])


def naive_dots(a, b, offsets, index):
    rows = torch.arange(len(a), device=DEVICE).repeat_interleave(offsets.diff())
    return (a.double()[rows] * b.double()[index.long()]).sum(dim=-1)


def assert_close(actual, expected, dtype):
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=5 * tolerance
    )


def test_products_by_hand():
    table = on_device([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    index, offsets = (on_device(v, dtype=torch.int32) for v in ([2, 0, 0, 1], [0, 2, 2, 4]))
    out = weighted_bag(table, index, offsets, on_device([0.5, 3.0, 1.0, -1.0]))
    # 0.5 * [100, 200] + 3 * [1, 2]; nothing; 1 * [1, 2] - 1 * [10, 20]
    assert out.tolist() == [[53.0, 106.0], [0.0, 0.0], [-9.0, -18.0]]
    a, b = on_device([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), on_device([[1.0, 0.0], [1.0, 1.0]])
    offsets, index = (on_device(v, dtype=torch.int32) for v in ([0, 2, 2, 3], [1, 0, 1]))
    # [1, 2].[1, 1] = 3, [1, 2].[1, 0] = 1, [5, 6].[1, 1] = 11
    assert sampled_dots(a, b, offsets, index).tolist() == [3.0, 1.0, 11.0]


def test_compact_by_hand():
    upper = on_device([[1.0, 3.0, 2.0], [-1.0, float("nan"), 0.0], [2.0, 2.0, float("inf")]])
    cols, offsets = compact(upper, on_device(2.0), 6)
    # A tie with the threshold counts, NaN does not; the sixth place is not used.
    assert cols.tolist() == [1, 2, 0, 1, 2, 0]
    assert offsets.tolist() == [0, 2, 2, 5]
    cols, offsets = compact(upper, on_device([3.0, -1.0, float("inf")]), 6)
    assert cols.tolist() == [1, 0, 2, 2, 0, 0]
    assert offsets.tolist() == [0, 1, 3, 4]


@few
@given(
    lengths=row_lengths,
    n=st.integers(1, 9),
    d=st.integers(1, 140),
    chunk=st.sampled_from([4, 16, 256]),
)
def test_products_are_those_entry_by_entry(lengths, n, d, chunk):
    a, table, rows = matrix(len(lengths), d), matrix(n, d, seed=2), entries(lengths, n)
    with patch.object(kernels_triton, "CHUNK", chunk):
        assert_close(weighted_bag(table, *rows), naive_bag(table, *rows), torch.float64)
    index, offsets, _ = rows
    out = sampled_dots(a, table, offsets, index)
    assert_close(out, naive_dots(a, table, offsets, index), torch.float64)


@few
@given(m=st.integers(1, 3), n=st.integers(1, 140), spare=st.integers(-4, 4), seed=st.integers(0, 9))
def test_compact_finds_what_nonzero_finds(m, n, spare, seed):
    generator = torch.Generator().manual_seed(seed)
    upper = torch.randint(4, (m, n), generator=generator).to(DEVICE, torch.bfloat16)  # Many ties.
    limits = torch.randint(5, (m,), generator=generator).float().to(DEVICE)
    rows, columns = (upper >= limits[:, None]).nonzero(as_tuple=True)
    capacity = max(0, len(rows) + spare)
    with patch.object(kernels_triton, "N_WORDS", 2):
        cols, offsets = compact(upper, limits, capacity)
    n_kept = min(capacity, len(rows))
    assert torch.equal(cols[:n_kept], columns[:n_kept].int())
    assert cols[n_kept:].count_nonzero() == 0
    assert torch.equal(offsets.diff(), torch.bincount(rows, minlength=m).int())


@dtypes
def test_tables_of_every_type_are_summed_in_float32_or_more(dtype):
    table, rows = matrix(7, 300, dtype=dtype), entries([3, 0, 300, 1], 7, dtype=torch.float32)
    expected = naive_bag(table, *rows)
    assert weighted_bag(table, *rows).dtype == dtype
    assert_close(weighted_bag(table, *rows), expected, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    precise = weighted_bag(table, *rows, out_dtype=wide)
    assert precise.dtype == wide
    assert_close(precise, expected, wide)
    a = matrix(4, 300).to(torch.bfloat16 if dtype == torch.float16 else dtype)  # Need not agree.
    index, offsets, _ = entries([3, 0, 30, 1], 7)
    out = sampled_dots(a, table, offsets, index)
    assert out.dtype == wide
    assert_close(out, naive_dots(a, table, offsets, index), wide)


def test_one_row_of_nearly_all_entries_is_cut_into_pieces_and_summed_the_same_every_time():
    table = matrix(50, 70, dtype=torch.float32)
    rows = entries([0, 2 * kernels_triton.CHUNK + 1, 0, 1, 0], 50, dtype=torch.float32)
    out = weighted_bag(table, *rows)
    assert_close(out, naive_bag(table, *rows), torch.float32)
    assert torch.equal(out, weighted_bag(table, *rows))


def test_a_scan_of_several_tiles_ends_where_the_row_does():
    upper = torch.zeros(2, 32 * kernels_triton.N_WORDS + 33, device=DEVICE)
    upper[0, -1], upper[1, 0], upper[1, 31], upper[1, 4096] = 1.0, 1.0, 1.0, 1.0
    cols, offsets = compact(upper, on_device(0.5), 4)
    assert cols.tolist() == [upper.shape[1] - 1, 0, 31, 4096]
    assert offsets.tolist() == [0, 1, 4]
    # Minus infinity lets all pass, and what lies past the last column still does not count.
    cols, offsets = compact(upper[:1], on_device(-torch.inf), upper.shape[1])
    assert torch.equal(cols, torch.arange(upper.shape[1], dtype=torch.int32, device=DEVICE))


def test_thresholds_are_not_rounded_to_the_type_of_the_matrix():
    upper = on_device([[1.0, 1.0078125]], dtype=torch.bfloat16)  # 1 and the next bf16.
    assert compact(upper, on_device(1.001), 2)[1].tolist() == [0, 1]


def test_what_an_overflowed_scan_returns_can_be_passed_on():
    """Offsets past the last entry are cut to it; entries that no row owns give zero."""
    cols, offsets = compact(on_device([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]), on_device(1.0), 4)
    assert cols.tolist() == [0, 1, 2, 0]
    assert offsets.tolist() == [0, 3, 6]
    table = on_device([[1.0], [2.0], [4.0]])
    # What lies behind the four entries would show.
    cols = torch.cat([cols, cols])[:4]
    weights = on_device([1.0, 1.0, 1.0, 1.0, 99.0, 99.0])[:4]
    assert weighted_bag(table, cols, offsets, weights).tolist() == [[7.0], [1.0]]
    assert sampled_dots(table[1:], table, offsets, cols).tolist() == [2.0, 4.0, 8.0, 4.0]
    offsets = on_device([0, 1, 2], dtype=torch.int32)
    assert weighted_bag(table, cols, offsets, weights).tolist() == [[1.0], [2.0]]
    assert sampled_dots(table[1:], table, offsets, cols).tolist() == [2.0, 8.0, 0.0, 0.0]


@pytest.mark.parametrize("m", [0, 3])
@pytest.mark.parametrize("d", [0, 5])
def test_nothing_to_sum_or_find(m, d):
    index, offsets, weights = entries([0] * m, 1)
    table = matrix(2, d)
    assert torch.equal(weighted_bag(table, index, offsets, weights), table.new_zeros(m, d))
    assert sampled_dots(matrix(m, d), table, offsets, index).shape == (0,)
    cols, found = compact(matrix(m, d), on_device(9.0), 2)
    assert cols.tolist() == [0, 0]
    assert torch.equal(found, offsets)
    index, offsets, _ = entries([2, 1], 2)
    assert sampled_dots(matrix(2, 0), matrix(2, 0), offsets, index).tolist() == [0.0, 0.0, 0.0]


def test_rows_may_lie_apart_and_vectors_have_gaps():
    table, a = matrix(7, 40), matrix(3, 40, seed=2)
    index, offsets, weights = entries([3, 0, 9], 7)
    apart = (v.repeat_interleave(2)[::2] for v in (index, weights))
    gaps_index, gaps_weights = apart
    site = slice(10, 30)
    bag = weighted_bag(table[:, site], gaps_index, offsets, gaps_weights)
    assert_close(bag, naive_bag(table[:, site], index, offsets, weights), torch.float64)
    dots = sampled_dots(a[:, site], table[:, site], offsets, gaps_index)
    assert_close(dots, naive_dots(a[:, site], table[:, site], offsets, index), torch.float64)
    whole = compact(table[:, site].contiguous(), on_device(0.5), 99)
    assert all(map(torch.equal, compact(table[:, site], on_device(0.5), 99), whole))


def test_a_matrix_whose_columns_have_gaps_is_refused():
    index, offsets, weights = entries([1], 4)
    wrong, right = matrix(3, 4).T, matrix(4, 3)
    with pytest.raises(ValueError, match=r"shape \(4, 3\) has strides \(1, 4\).*contiguous"):
        weighted_bag(wrong, index, offsets, weights)
    with pytest.raises(ValueError, match="strides"):
        sampled_dots(right[:1], wrong, offsets, index)
    with pytest.raises(ValueError, match="strides"):
        compact(wrong, on_device(0.0), 1)


def test_they_equal_the_eager_implementations():
    index, offsets, weights = entries([30, 0, 2, 1], 9)
    table, a = matrix(9, 33), matrix(4, 33, seed=2)
    expected = eager.weighted_bag(table.cpu(), index.cpu(), offsets.cpu(), weights.cpu())
    assert_close(weighted_bag(table, index, offsets, weights).cpu(), expected, torch.float64)
    expected = eager.sampled_dots(a.cpu(), table.cpu(), offsets.cpu(), index.cpu())
    assert_close(sampled_dots(a, table, offsets, index).cpu(), expected, torch.float64)


STEPS = {
    "batchtopk": {"k": 3},
    "topk": {"k": 3},
    "l1": {"coefficient": 0.3},
    "jumprelu": {"threshold": 0.5, "bandwidth": 0.5},
    "matryoshka": {"k": 3},
    "delta": {"k": 4, "delta_loss_weight": 0.5},
    "structured": {"k": 4},
}


def gradients(name, *, kernels_name, dtype, **fields):
    """Loss, dead latents helped, and the gradient of every parameter."""
    fields |= vars(recipe_of(preset(name, **STEPS[name]), n_steps=0))
    training = new_training(kernels=kernels_name, dtype=dtype, device=DEVICE, d_sae=24, **fields)
    x = planted(6).to(DEVICE, training.dtype)
    is_dead = torch.arange(24, device=DEVICE) >= 20
    output = training.step_loss(x, is_dead=is_dead)
    assert isinstance(output.codes, SparseCodes if kernels_name == "auto" else DenseCodes)
    output.loss.backward()
    return output.loss.detach(), {n: p.grad for n, p in training.named_parameters()}


@pytest.mark.parametrize(
    ("name", "dtype", "compute_dtype", "tolerance"),
    [
        *((name, "float64", None, 1e-9) for name in STEPS if name != "delta"),
        ("delta", "float32", "bfloat16", 1e-4),
    ],
)
def test_the_whole_step_equals_the_dense_one(name, dtype, compute_dtype, tolerance):
    how = {"dtype": dtype, "compute_dtype": compute_dtype}
    with patch.object(eager, "BACKEND", "triton"):
        loss, grads = gradients(name, kernels_name="auto", **how)
    dense_loss, dense_grads = gradients(name, kernels_name="dense", **how)
    torch.testing.assert_close(loss, dense_loss, rtol=tolerance, atol=0)
    for parameter, grad in grads.items():
        scale = float(dense_grads[parameter].abs().max())
        torch.testing.assert_close(
            grad, dense_grads[parameter], rtol=0, atol=tolerance * scale, msg=parameter
        )
