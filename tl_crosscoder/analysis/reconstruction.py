"""How much of the activations, and of their difference, a crosscoder explains on a whole text.

Streaming: every batch becomes sums and counts, which add up, and are divided once at the end.
Shapes: activations `[batch, n_sites, d_model]` and codes `[batch, d_sae]`, raw space. Limit: the
difference is the last site minus the first.
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.decoder_norms import LATENT_CLASSES
from tl_crosscoder.crosscoder.crosscoder import Crosscoder


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sum, sum of squared norms and count of vectors: enough for their variance."""

    total: Float[Tensor, "... d_model"]
    squares: Float[Tensor, "..."]
    n: int

    @classmethod
    def of(cls, vectors: Float[Tensor, "batch ... d_model"]) -> "Moments":
        """Moments of a batch, in float64."""
        vectors = vectors.double()
        return cls(
            total=vectors.sum(dim=0), squares=vectors.pow(2).sum(dim=(0, -1)), n=len(vectors)
        )

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both."""
        return Moments(
            total=self.total + other.total, squares=self.squares + other.squares, n=self.n + other.n
        )

    @property
    def sum_of_squared_deviations(self) -> Float[Tensor, "..."]:
        """Sum of ||v - mean||^2."""
        return (self.squares - self.total.pow(2).sum(dim=-1) / self.n).clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class ReconstructionSums:
    """What a batch contributes to `Reconstruction`; adds up over batches."""

    x: Moments
    """Activations, per site."""
    error: Moments
    """x^m - x̂^m, per site."""
    difference: Moments
    """x^1 - x^0."""
    difference_error: Moments
    """e^1 - e^0."""
    left_by_class: Moments
    """Per class, x^1 - x^0 less what the latents of that class say about it."""
    n_active: Float[Tensor, " d_sae"]
    """Tokens on which each latent is active."""

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "batch n_sites d_model"],
        codes: Float[Tensor, "batch d_sae"],
        crosscoder: Crosscoder,
        class_ids: Int[Tensor, " d_sae"],
    ) -> "ReconstructionSums":
        """Sums of one batch."""
        error = x - crosscoder.decode(codes).view_as(x)
        delta = crosscoder.decoder(-1) - crosscoder.decoder(0)
        members = [class_ids == c for c in range(len(LATENT_CLASSES))]
        said = torch.stack([codes[:, m] @ delta[m] for m in members], dim=1)
        difference = x[:, -1] - x[:, 0]
        return cls(
            x=Moments.of(x),
            error=Moments.of(error),
            difference=Moments.of(difference),
            difference_error=Moments.of(error[:, -1] - error[:, 0]),
            left_by_class=Moments.of(difference[:, None] - said),
            n_active=(codes > 0).sum(dim=0).double(),
        )

    def __add__(self, other: "ReconstructionSums") -> "ReconstructionSums":
        """Sums of both."""
        added = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return ReconstructionSums(**added)

    def result(self, site_names: list[str]) -> "Reconstruction":
        """Divide, once."""
        variance = self.difference.sum_of_squared_deviations
        by_class = 1 - self.left_by_class.sum_of_squared_deviations / variance
        fve = 1 - self.error.squares / self.x.sum_of_squared_deviations
        is_same = not bool(variance > 0)
        return Reconstruction(
            n_tokens=self.x.n,
            fve=dict(zip(site_names, fve.tolist(), strict=True)),
            difference_fve=None
            if is_same
            else (1 - self.difference_error.squares / variance).item(),
            difference_fve_by_class=None
            if is_same
            else dict(zip(LATENT_CLASSES, by_class.tolist(), strict=True)),
            difference_share=(variance / self.x.sum_of_squared_deviations[-1]).item(),
            l0=(self.n_active.sum() / self.x.n).item(),
            dead_share=(self.n_active == 0).double().mean().item(),
        )


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What a crosscoder explains on a text."""

    n_tokens: int
    """Tokens measured on."""
    fve: dict[str, float]
    """Site -> 1 - sum ||e^m||^2 / sum ||x^m - mean||^2."""
    difference_fve: float | None
    """1 - sum ||e^1 - e^0||^2 / sum ||(x^1 - x^0) - mean||^2; None where the models are equal (or
    differ by the same vector at every token)."""
    difference_fve_by_class: dict[str, float] | None
    """Class -> the same with only those latents' f_j (d_j^1 - d_j^0), and the best constant."""
    difference_share: float
    """Variance of x^1 - x^0 over that of x^1: how much there is to explain."""
    l0: float
    """Mean number of active latents a token."""
    dead_share: float
    """Latents that are active on none of these tokens."""
