"""How much of the activations, and of their difference, a crosscoder explains on a whole text.

Streaming: every batch becomes sums and counts, which add up, and are divided once at the end.
Shapes: activations are rows, `[batch, n_sites, d_model]` or `[batch, d_in]`, raw
space, and codes are entries. Limit: one difference, that of the compared sites.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.norms import LATENT_CLASSES
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.models.site import site_parts, subtracted_sites


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
class DifferenceSums:
    """What a batch contributes to the measures of x^1 - x^0; adds up over batches."""

    finetuned: Moments
    """x^1."""
    difference: Moments
    """x^1 - x^0."""
    error: Moments
    """e^1 - e^0."""
    left_by_class: Moments
    """Per class, x^1 - x^0 less what the latents of that class say about it."""

    @classmethod
    def of(
        cls,
        x: tuple[Float[Tensor, "batch d_model"], Float[Tensor, "batch d_model"]],
        error: tuple[Float[Tensor, "batch d_model"], Float[Tensor, "batch d_model"]],
        said_by_class: Float[Tensor, "batch n_classes d_model"],
    ) -> "DifferenceSums":
        """Sums of one batch, from base and fine-tuned."""
        difference = x[1] - x[0]
        return cls(
            finetuned=Moments.of(x[1]),
            difference=Moments.of(difference),
            error=Moments.of(error[1] - error[0]),
            left_by_class=Moments.of(difference[:, None] - said_by_class),
        )

    def __add__(self, other: "DifferenceSums") -> "DifferenceSums":
        """Sums of both."""
        return DifferenceSums(**_added(self, other))

    def result(self) -> dict[str, Any]:
        """The fields of `Reconstruction` that concern the difference."""
        variance = self.difference.sum_of_squared_deviations
        share = (variance / self.finetuned.sum_of_squared_deviations).item()
        if not bool(variance > 0):
            return {
                "difference_fve": None,
                "difference_fve_by_class": None,
                "difference_share": share,
            }
        by_class = 1 - self.left_by_class.sum_of_squared_deviations / variance
        return {
            "difference_fve": (1 - self.error.squares / variance).item(),
            "difference_fve_by_class": dict(zip(LATENT_CLASSES, by_class.tolist(), strict=True)),
            "difference_share": share,
        }


@dataclass(frozen=True, kw_only=True)
class ReconstructionSums:
    """What a batch contributes to `Reconstruction`; adds up over batches."""

    x: tuple[Moments, ...]
    """Activations, of each site."""
    error: tuple[Moments, ...]
    """x^m - x̂^m, of each site."""
    difference: DifferenceSums | None
    """Of the compared sites; None for a single site, and for unequal widths."""
    n_active: Float[Tensor, " d_sae"]
    """Tokens on which each latent is active."""

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "batch *row"],
        codes: SparseCodes,
        crosscoder: Crosscoder,
        class_ids: Int[Tensor, " d_sae"],
    ) -> "ReconstructionSums":
        """Sums of one batch."""
        parts = site_parts(x, crosscoder.sites)
        decoded = codes.times(crosscoder.W_dec.detach()) + crosscoder.b_dec.detach()
        said = site_parts(decoded, crosscoder.sites)
        errors = [part - x_hat for part, x_hat in zip(parts, said, strict=True)]
        pair = subtracted_sites(crosscoder.sites)
        difference = None
        if pair is not None:
            base, finetuned = pair
            delta = (crosscoder.decoder(finetuned) - crosscoder.decoder(base)).detach()
            of_entries = class_ids[codes.pattern.latents.long()]
            by_class = [codes.where(of_entries == c) for c in range(len(LATENT_CLASSES))]
            difference = DifferenceSums.of(
                (parts[base], parts[finetuned]),
                (errors[base], errors[finetuned]),
                torch.stack([own.times(delta) for own in by_class], dim=1),
            )
        return cls(
            x=tuple(Moments.of(part) for part in parts),
            error=tuple(Moments.of(error) for error in errors),
            difference=difference,
            n_active=torch.bincount(
                codes.pattern.latents.long(), minlength=codes.pattern.d_sae
            ).double(),
        )

    def __add__(self, other: "ReconstructionSums") -> "ReconstructionSums":
        """Sums of both."""
        return ReconstructionSums(**_added(self, other))

    def result(self, site_names: list[str]) -> "Reconstruction":
        """Divide, once."""
        n_tokens = self.x[0].n
        fve = [
            (1 - error.squares / x.sum_of_squared_deviations).item()
            for x, error in zip(self.x, self.error, strict=True)
        ]
        return Reconstruction(
            n_tokens=n_tokens,
            fve=dict(zip(site_names, fve, strict=True)),
            l0=(self.n_active.sum() / n_tokens).item(),
            dead_share=(self.n_active == 0).double().mean().item(),
            **(self.difference.result() if self.difference else {}),
        )


def _added(one: Any, other: Any) -> dict[str, Any]:
    """The sums of all fields of two dataclasses; tuples add up part by part, None stays None."""
    added = {}
    for name in (f.name for f in fields(one)):
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, tuple):
            added[name] = tuple(x + y for x, y in zip(a, b, strict=True))
        else:
            added[name] = None if a is None else a + b
    return added


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What a crosscoder explains on a text."""

    n_tokens: int
    """Tokens measured on."""
    fve: dict[str, float]
    """Site -> 1 - sum ||e^m||^2 / sum ||x^m - mean||^2."""
    difference_fve: float | None = None
    """1 - sum ||e^1 - e^0||^2 / sum ||(x^1 - x^0) - mean||^2; None where the models are equal (or
    differ by the same vector at every token), and where there is no difference to take."""
    difference_fve_by_class: dict[str, float] | None = None
    """Class -> the same with only those latents' f_j (d_j^1 - d_j^0), and the best constant."""
    difference_share: float | None = None
    """Variance of x^1 - x^0 over that of x^1: how much there is to explain. None where there is no
    difference to take: of a single site, or of sites of unequal width."""
    l0: float
    """Mean number of active latents a token."""
    dead_share: float
    """Latents that are active on none of these tokens."""
