"""The two sparse products of the step, and the scan that finds what may be active.

    weighted_bag   out[r]   = sum over the entries e of row r of weights[e] * table[index[e]]
    sampled_dots   out[e]   = <a[row of e], b[index[e]]>
    at_least       the positions of the scores that reach a limit

Entries are stored row by row: row r owns `offsets[r] : offsets[r + 1]`. These are the reference
implementations, in torch alone; on CUDA those of `sparse.triton` take over all three.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.crosscoder.sparse import triton

GROUP = 16
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}

BACKEND: Literal["auto", "triton", "torch"] = "auto"
"""Which implementation runs: `auto` is Triton on CUDA and torch elsewhere. Tests set it."""


def takes_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels work on this tensor."""
    return BACKEND == "triton" or (BACKEND == "auto" and tensor.is_cuda)


def weighted_bag(
    table: Float[Tensor, "n d"],
    index: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " m_plus_1"],
    weights: Float[Tensor, " nnz"],
) -> Float[Tensor, "m d"]:
    """Weighted sums of rows of a table, one sum for each row of entries; in the weights' dtype."""
    if takes_triton(table):
        return triton.weighted_bag(table, index, offsets, weights, out_dtype=weights.dtype)
    table = table.to(weights.dtype)
    return torch.nn.functional.embedding_bag(
        index, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def sampled_dots(
    a: Float[Tensor, "m d"],
    b: Float[Tensor, "n d"],
    offsets: Int[Tensor, " m_plus_1"],
    index: Int[Tensor, " nnz"],
) -> Float[Tensor, " nnz"]:
    """Dot products of the rows of `a` with the rows of `b` that their entries name.

    In float32, or float64 where one of them is.
    """
    if takes_triton(a):
        return triton.sampled_dots(a, b, offsets, index)
    kind = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(kind), b.to(kind)
    # The backward of embedding_bag is this product; unlike sparse.sampled_addmm it needs no MKL.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        a, b, index, offsets, rows_of(offsets, len(index)), 0
    )


def rows_of(offsets: Int[Tensor, " m_plus_1"], n_entries: int) -> Int[Tensor, " nnz"]:
    """The row of each entry."""
    rows = torch.arange(len(offsets) - 1, dtype=offsets.dtype, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=n_entries)


def offsets_of(rows: Int[Tensor, " nnz"], n_rows: int) -> Int[Tensor, " n_rows_plus_1"]:
    """Where each row's entries begin; `rows` is sorted."""
    bounds = torch.arange(n_rows + 1, dtype=rows.dtype, device=rows.device)
    return torch.searchsorted(rows, bounds, out_int32=True)


def at_least(scores: Float[Tensor, "m n"], limits: Float[Tensor, "#m 1"]) -> Int[Tensor, " hits"]:
    """Flat positions, sorted, of the scores that reach their row's limit (0 or more).

    On a CPU the maxima of groups of `GROUP` latents are compared first: where few entries pass,
    that is several times as fast as a mask and its `nonzero`.
    """
    n = scores.shape[1]
    if takes_triton(scores):
        return _at_least_on_gpu(scores, limits)
    if scores.is_cuda or n % GROUP or scores.dtype not in _BITS:
        return (scores >= limits).flatten().nonzero().squeeze(-1)
    hits = (group_maxima(scores) >= ordered_bits(limits)).nonzero()
    rows, groups = hits[:, 0], hits[:, 1]
    bits = scores.view(_BITS[scores.dtype]).view(len(scores), GROUP, -1).transpose(1, 2)
    passed = bits[rows, groups] >= ordered_bits(limits).expand(len(scores), 1)[rows]
    hit, member = passed.nonzero().unbind(dim=1)
    return (rows[hit] * n + member * (n // GROUP) + groups[hit]).sort().values


def _at_least_on_gpu(scores: Tensor, limits: Tensor) -> Int[Tensor, " hits"]:
    capacity = max(1, scores.numel() // 16)
    thresholds = limits.expand(len(scores), 1).squeeze(-1).contiguous()
    columns, offsets = triton.compact(scores, thresholds, capacity)
    n_hits = int(offsets[-1])
    if n_hits > capacity:
        return (scores >= limits).flatten().nonzero().squeeze(-1)
    return rows_of(offsets, n_hits).long() * scores.shape[1] + columns[:n_hits]


def group_maxima(scores: Float[Tensor, "m n"]) -> Int[Tensor, "m n_groups"]:
    """The largest of every `GROUP` latents that lie n / GROUP apart, as `ordered_bits`."""
    bits = scores.view(_BITS[scores.dtype])
    return bits.view(len(scores), GROUP, -1).amax(dim=1)


def ordered_bits(values: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Integers that compare as the floats do, negative ones below all others.

    Integer comparisons and maxima run faster, since they need not mind NaN.
    """
    return values.contiguous().view(_BITS[values.dtype])
