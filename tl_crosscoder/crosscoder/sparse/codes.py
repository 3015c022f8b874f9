"""`SparseCodes`: which latents are active on which tokens, and how much.

Entries stand token by token, and within a token latent by latent: `values [nnz]`,
`latents [nnz]`, `offsets [batch + 1]`. Only the values carry a gradient. Limit: positions are
int32, so batch and d_sae stay below 2^31.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.crosscoder.sparse.kernels import at_least, offsets_of, rows_of, weighted_bag


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
        tiny = codes.new_full((1, 1), torch.finfo(codes.dtype).tiny)
        positions = at_least(codes.contiguous(), tiny)
        batch, d_sae = codes.shape
        pattern = Pattern.at(positions, shape=(batch, d_sae))
        return cls(pattern=pattern, values=codes.flatten()[positions])

    @property
    def batch(self) -> int:
        """Number of tokens."""
        return self.pattern.batch

    def where(self, keep: Bool[Tensor, " nnz"]) -> "SparseCodes":
        """Some of the entries."""
        pattern = replace(
            self.pattern,
            latents=self.pattern.latents[keep],
            offsets=offsets_of(self.pattern.tokens[keep], self.batch),
        )
        return SparseCodes(pattern=pattern, values=self.values[keep])

    def times(self, rows: Float[Tensor, "d_sae d"]) -> Float[Tensor, "batch d"]:
        """sum_j f_j times row j, without gradients."""
        pattern = self.pattern
        return weighted_bag(rows, pattern.latents, pattern.offsets, self.values.to(rows))

    def to_dense(self) -> Float[Tensor, "batch d_sae"]:
        """The same codes as a matrix."""
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
