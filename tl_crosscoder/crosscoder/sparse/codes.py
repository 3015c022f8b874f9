"""`SparseCodes`: which latents are active on which tokens, and how much; and sums over them.

Entries stand token by token, and within a token latent by latent: `values [nnz]`,
`latents [nnz]`, `offsets [batch + 1]`; row r owns `offsets[r] : offsets[r + 1]`. Only the values
carry a gradient. Three functions do the work, here in torch alone; on CUDA those of
`sparse.triton` take over all three:

    weighted_bag   out[r]   = sum over the entries e of row r of weights[e] * table[index[e]]
    sampled_dots   out[e]   = <a[row of e], b[index[e]]>
    at_least       the positions of the scores that reach a limit

Limit: positions are int32, so batch and d_sae stay below 2^31.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int, Shaped
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
    hits = (group_maxima(ordered_bits(scores)) >= ordered_bits(limits)).nonzero()
    rows, groups = hits[:, 0], hits[:, 1]
    bits = rearrange(ordered_bits(scores), "m (member n) -> m n member", member=GROUP)
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


def group_maxima(scores: Shaped[Tensor, "m n"]) -> Shaped[Tensor, "m n_groups"]:
    """The largest of every `GROUP` latents that lie n / GROUP apart."""
    return reduce(scores, "m (member n) -> m n", "max", member=GROUP)


def ordered_bits(values: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Integers that compare as the floats do, negative ones below all others.

    Integer comparisons and maxima run faster, since they need not mind NaN.
    """
    return values.contiguous().view(_BITS[values.dtype])


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """The places of the entries, sorted by token and then by latent."""

    latents: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " batch_plus_1"]
    d_sae: int

    @classmethod
    def at(cls, positions: Int[Tensor, " nnz"], *, shape: tuple[int, int]) -> "Pattern":
        """The pattern of sorted flat positions in a `[batch, d_sae]` matrix."""
        batch, d_sae = shape
        tokens = torch.div(positions, d_sae, rounding_mode="floor")
        latents = (positions - tokens * d_sae).int()
        return cls(latents=latents, offsets=offsets_of(tokens.int(), batch), d_sae=d_sae)

    @property
    def batch(self) -> int:
        """Number of tokens."""
        return len(self.offsets) - 1

    @cached_property
    def tokens(self) -> Int[Tensor, " nnz"]:
        """The token of each entry."""
        return rows_of(self.offsets, len(self.latents))

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " d_sae_plus_1"]]:
        """The order that sorts entries by latent, and where each latent begins in it."""
        # A radix sort: 16 bits take fewer passes than 32.
        keys = self.latents.short() if self.d_sae <= 2**15 else self.latents
        ordered, order = keys.sort(stable=True)
        return order, offsets_of(ordered.int(), self.d_sae)

    def stacked(self, bounds: tuple[int, ...]) -> "tuple[Pattern, Int[Tensor, ' nnz'] | None]":
        """One batch for each range of latents, one below the other, and the order that makes it.

        Args:
            bounds: the first latent of each range but the first one.
        """
        if not bounds:
            return self, None
        starts = torch.tensor(bounds, dtype=torch.int32, device=self.latents.device)
        ranges = torch.searchsorted(starts, self.latents, right=True, out_int32=True)
        rows, order = (ranges * self.batch + self.tokens).sort(stable=True)
        offsets = offsets_of(rows, (len(bounds) + 1) * self.batch)
        return Pattern(latents=self.latents[order], offsets=offsets, d_sae=self.d_sae), order


@dataclass(frozen=True, kw_only=True)
class SparseCodes:
    """Codes at the places of a pattern; zero elsewhere."""

    pattern: Pattern
    values: Float[Tensor, " nnz"]

    @classmethod
    def of_dense(cls, codes: Float[Tensor, "batch d_sae"]) -> "SparseCodes":
        """The entries of a matrix that are above zero."""
        positions = (codes > 0).flatten().nonzero().squeeze(1)
        batch, d_sae = codes.shape
        pattern = Pattern.at(positions, shape=(batch, d_sae))
        return cls(pattern=pattern, values=codes.flatten()[positions])

    @property
    def batch(self) -> int:
        """Number of tokens."""
        return self.pattern.batch

    def where(self, keep: Bool[Tensor, " nnz"]) -> "SparseCodes":
        """Some of the entries."""
        latents, tokens = self.pattern.latents[keep], self.pattern.tokens[keep]
        offsets = offsets_of(tokens, self.batch)
        pattern = Pattern(latents=latents, offsets=offsets, d_sae=self.pattern.d_sae)
        return SparseCodes(pattern=pattern, values=self.values[keep])

    def times(self, rows: Float[Tensor, "d_sae d"]) -> Float[Tensor, "batch d"]:
        """sum_j f_j times row j, without gradients."""
        pattern = self.pattern
        return weighted_bag(rows, pattern.latents, pattern.offsets, self.values.to(rows))

    def to_dense(self) -> Float[Tensor, "batch d_sae"]:
        """These codes as a matrix."""
        pattern = self.pattern
        positions = pattern.tokens.long() * pattern.d_sae + pattern.latents
        dense = self.values.new_zeros(self.batch * pattern.d_sae)
        return dense.index_copy(0, positions, self.values).view(self.batch, pattern.d_sae)

    def each(self, weights: Float[Tensor, " d_sae"]) -> Float[Tensor, " nnz"]:
        """The weight of each entry's latent."""
        return weights.index_select(0, self.pattern.latents)

    def weighted(self, weights: Float[Tensor, " d_sae"]) -> Float[Tensor, " nnz"]:
        """f_j times the weight of the latent, for each entry."""
        return self.values * self.each(weights)

    def fired(self) -> Bool[Tensor, " d_sae"]:
        """Latents that are active on at least one token."""
        fired = torch.zeros(self.pattern.d_sae, dtype=torch.bool, device=self.values.device)
        # A JumpReLU also has entries of value 0, just below the threshold.
        fired[self.pattern.latents[self.values.detach() > 0]] = True
        return fired

    def l0(self) -> Float[Tensor, ""]:
        """Mean number of active latents a token."""
        return (self.values.detach() > 0).sum() / self.pattern.batch

    def smallest(self, weights: Float[Tensor, " d_sae"], latents: slice) -> Float[Tensor, ""]:
        """Smallest positive weighted code of a range of latents; infinity without any."""
        weighted, own = self.weighted(weights).detach(), self.pattern.latents
        counts = (weighted > 0) & (own >= latents.start) & (own < latents.stop)
        return _smallest(torch.where(counts, weighted, torch.inf))


@dataclass(frozen=True, kw_only=True)
class DenseCodes:
    """Codes of all latents as a matrix, as the dense step has them; methods as of `SparseCodes`."""

    values: Float[Tensor, "batch d_sae"]

    @property
    def batch(self) -> int:
        """Number of tokens."""
        return len(self.values)

    def to_dense(self) -> Float[Tensor, "batch d_sae"]:
        """The codes."""
        return self.values

    def each(self, weights: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
        """The weight of each entry's latent, to be broadcast."""
        return weights

    def weighted(self, weights: Float[Tensor, " d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """f_j times the weight of the latent, for each entry."""
        return self.values * weights

    def fired(self) -> Bool[Tensor, " d_sae"]:
        """Latents that are active on at least one token."""
        return (self.values.detach() > 0).any(dim=0)

    def l0(self) -> Float[Tensor, ""]:
        """Mean number of active latents a token."""
        return (self.values.detach() > 0).sum(dim=-1).float().mean()

    def smallest(self, weights: Float[Tensor, " d_sae"], latents: slice) -> Float[Tensor, ""]:
        """Smallest positive weighted code of a range of latents; infinity without any."""
        weighted = (self.values.detach() * weights.detach())[:, latents]
        return _smallest(torch.where(weighted > 0, weighted, torch.inf))


Codes = SparseCodes | DenseCodes


def _smallest(values: Tensor) -> Float[Tensor, ""]:
    return values.min() if values.numel() else values.new_tensor(torch.inf)
