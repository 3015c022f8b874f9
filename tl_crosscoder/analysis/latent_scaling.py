"""Latent Scaling: does a latent that looks fine-tuned exist in the base model all the same?

    beta(Y) = < sum_i f_ij Y_i, d_j > / (C_j ||d_j||^2)        C_j = sum_i f_ij^2
    beta_error^m = < sum_i f_ij e_i^m, d_j > / (C_j ||d_j||^2) + < d_j^m, d_j > / ||d_j||^2

is the least-squares coefficient of latent j's direction d_j in a target Y of site m (Minder et al.
2025, section 3 and appendix). All latents, targets, directions and controls in
one pass: float64 dot products at the entries of the codes, sums `[d_sae]`. Betas are in the
normalised space, like decoder norms. A latent that never fires has NaN. Limit: two sites of one
width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.crosscoder.sparse.kernels import sampled_dots
from tl_crosscoder.models.site import subtracted_sites
from tl_crosscoder.results.tables import TableOfColumns

NU_ERROR, NU_RECONSTRUCTION = 0.2, 0.5
"""Below both a latent is specific to its model (Minder et al. 2025)."""
CONTROLS = ("random", "other")


@dataclass(frozen=True, kw_only=True)
class LatentScaling(TableOfColumns):
    """Betas of one direction for each latent; rows are (the other site, the direction's own site).

    Of the direction `finetuned` the rows are base and fine-tuned; of `base` they change places.
    """

    direction: str
    """Which d_j: the decoder of the site named, or for control `random`, a Gaussian vector of its
    norm, or `other`, the row of another latent."""
    beta_error: Float[Tensor, "2 d_sae"]
    """Target e^m with the latent's own contribution put back."""
    beta_reconstruction: Float[Tensor, "2 d_sae"]
    """Target x̂^m."""
    beta_activation: Float[Tensor, "2 d_sae"]
    """Target x^m."""
    beta_activation_no_bias: Float[Tensor, "2 d_sae"]
    """Target x^m - b_dec^m."""
    n_active: Float[Tensor, " d_sae"]
    """Tokens on which the latent is active."""

    @property
    def nu_error(self) -> Float[Tensor, " d_sae"]:
        """beta_error of the other site over that of its own; high is Complete Shrinkage."""
        return self.beta_error[0] / self.beta_error[1]

    @property
    def nu_reconstruction(self) -> Float[Tensor, " d_sae"]:
        """The same of the reconstruction; high is Latent Decoupling."""
        return self.beta_reconstruction[0] / self.beta_reconstruction[1]

    @property
    def is_specific(self) -> Bool[Tensor, " d_sae"]:
        """|nu_error| < 0.2 and |nu_reconstruction| < 0.5; false for NaN."""
        small = self.nu_error.abs() < NU_ERROR
        return small & (self.nu_reconstruction.abs() < NU_RECONSTRUCTION)


@dataclass(frozen=True, kw_only=True)
class DifferenceByLatent(TableOfColumns):
    """What each latent explains of x^1 - x^0, in raw space, as a share of its variance.

    Numerators are squared norms, not deviations from the mean: a latent that explains the constant
    part of the difference is credited with it, though the variance leaves it out.
    """

    explained_difference: Float[Tensor, " d_sae"]
    """Share that this latent explains alone; below 0 where it points the wrong way."""
    explained_difference_drop: Float[Tensor, " d_sae"]
    """Share that the dictionary explains less if only this latent is left out."""


@dataclass(kw_only=True)
class ScalingSums:
    """What the pass collects: a few numbers for each latent."""

    crosscoder: Crosscoder
    sites: tuple[int, int]
    """Positions of base and fine-tuned."""
    directions: dict[str, Float[Tensor, "d_sae d_model"]]
    """float64, raw space."""
    dots: dict[str, Float[Tensor, "4 d_sae"]]
    """Of each direction sum_i f_ij <Y_i, d_j> for Y = x^0, x^1, e^0, e^1."""
    codes: Float[Tensor, "3 d_sae"]
    """sum_i 1[f_ij > 0], sum_i f_ij, sum_i f_ij^2."""
    n_tokens: int = 0
    difference: list[Tensor] = field(default_factory=list)
    """Sum and sum of squares of x^1 - x^0."""

    @classmethod
    def begin(
        cls, crosscoder: Crosscoder, *, controls: Sequence[str] = CONTROLS, seed: int = 0
    ) -> "ScalingSums | None":
        """Before any token; None where there are no two sites of one width to compare."""
        pair = subtracted_sites(crosscoder.sites)
        if pair is None:
            return None
        base, finetuned = (crosscoder.decoder(site).detach().double() for site in pair)
        directions = {"finetuned": finetuned, "base": base}
        generator = torch.Generator().manual_seed(seed)
        if "random" in controls:
            noise = torch.randn(finetuned.shape, generator=generator, dtype=torch.float64)
            noise = noise.to(finetuned.device)
            directions["random"] = noise * (finetuned.norm(dim=1) / noise.norm(dim=1))[:, None]
        if "other" in controls:
            directions["other"] = finetuned.roll(1 + len(finetuned) // 3, dims=0)
        zeros = finetuned.new_zeros(4, len(finetuned))
        return cls(
            crosscoder=crosscoder,
            sites=pair,
            directions=directions,
            dots={name: zeros.clone() for name in directions},
            codes=zeros[:3].clone(),
        )

    def add(self, x: Sequence[Float[Tensor, "batch _"]], codes: SparseCodes) -> None:
        """More tokens: their activations by site, and their codes."""
        pattern, values = codes.pattern, codes.values.double()
        latents = pattern.latents.long()
        d_sae = pattern.d_sae
        targets = self._targets(x, codes)
        for name, directions in self.directions.items():
            for row, target in zip(self.dots[name], targets, strict=True):
                dots = sampled_dots(target, directions, pattern.offsets, pattern.latents)
                row += torch.bincount(latents, weights=values * dots, minlength=d_sae)
        for row, weights in zip(
            self.codes, (torch.ones_like(values), values, values.square()), strict=True
        ):
            row += torch.bincount(latents, weights=weights, minlength=d_sae)
        delta = targets[1] - targets[0]
        new = [delta.sum(dim=0), delta.square().sum()]
        old = self.difference
        self.difference = [a + b for a, b in zip(old, new, strict=True)] if old else new
        self.n_tokens += len(delta)

    def _targets(
        self, x: Sequence[Float[Tensor, "batch _"]], codes: SparseCodes
    ) -> tuple[Float[Tensor, "batch d_model"], ...]:
        """x^0, x^1, e^0, e^1 in float64."""
        own = [x[site].double() for site in self.sites]
        errors = []
        for part, site in zip(own, self.sites, strict=True):
            rows = self.directions["finetuned" if site == self.sites[1] else "base"]
            errors.append(
                part - codes.times(rows) - self.crosscoder.decoder_bias(site).detach().double()
            )
        return (*own, *errors)

    def result(self) -> dict[str, LatentScaling]:
        """Divide, once: the scaling of each direction, by its name."""
        return {name: self._scaling(name) for name in self.directions}

    def _scaling(self, name: str) -> LatentScaling:
        d = self.directions[name]
        own, other = (0, 1) if name == "base" else (1, 0)
        n_active, total, squares = self.codes
        norm = d.square().sum(dim=1)
        divisor = torch.where(n_active > 0, squares * norm, math.nan)
        scales = [self.crosscoder.sites[site].scale for site in self.sites]
        betas: dict[str, list[Tensor]] = {}
        for site in (other, own):
            at_x, at_e = self.dots[name][site], self.dots[name][2 + site]
            rows = self.directions["finetuned" if site else "base"]
            bias = self.crosscoder.decoder_bias(self.sites[site]).detach().double()
            put_back = squares * (rows * d).sum(dim=1)
            targets = {
                "beta_error": at_e + put_back,
                "beta_reconstruction": at_x - at_e,
                "beta_activation": at_x,
                "beta_activation_no_bias": at_x - total * (d @ bias),
            }
            for target, dots in targets.items():
                betas.setdefault(target, []).append(scales[site] / scales[own] * dots / divisor)
        return LatentScaling(
            direction=name, n_active=n_active, **{k: torch.stack(v) for k, v in betas.items()}
        )

    def difference_by_latent(self) -> DifferenceByLatent:
        """Shares of the variance of x^1 - x^0; NaN where the models are equal.

        With v_j = d_j^1 - d_j^0, ||delta||^2 - ||delta - f v||^2 = 2 f <delta, v> - f^2 ||v||^2,
        and likewise from the error of the difference.
        """
        total, squares = self.difference
        variance = squares - total.square().sum() / self.n_tokens
        v = self.directions["finetuned"] - self.directions["base"]
        own = self.codes[2] * v.square().sum(dim=1)
        at = self.dots["finetuned"] - self.dots["base"]
        of_x, of_e = at[1] - at[0], at[3] - at[2]
        variance = torch.where(variance > 0, variance, math.nan)
        return DifferenceByLatent(
            explained_difference=(2 * of_x - own) / variance,
            explained_difference_drop=(2 * of_e + own) / variance,
        )
