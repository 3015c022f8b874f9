"""Latent Scaling: does a latent that looks fine-tuned exist in the base model all the same?

    beta(Y) = < sum_i f_ij Y_i, d_j > / (C_j ||d_j||^2)        C_j = sum_i f_ij^2
    beta_error^m = < sum_i f_ij e_i^m, d_j > / (C_j ||d_j||^2) + < d_j^m, d_j > / ||d_j||^2

is the least-squares coefficient of latent j's direction d_j in a target Y of site m (Minder et al.
2025, section 3 and appendix). Contract: all latents, targets, directions and controls in one pass,
as float64 dot products at the entries of the codes and sums `[d_sae]`. Betas are in the normalised
space, like decoder norms; a latent that is never active has NaN. Limit: two sites of one width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_crosscoder.analysis.reconstruction import Moments
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes, sampled_dots
from tl_crosscoder.mesh import Axis
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
    """Target e^m with the latent's own contribution added back."""
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
        """beta_reconstruction of the other site over its own; high is Latent Decoupling."""
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


class ScalingSums:
    """Sums over a text, a few numbers for each latent, from which betas are divided once."""

    def __init__(
        self,
        crosscoder: Crosscoder,
        *,
        pair: tuple[int, int],
        controls: Sequence[str] = CONTROLS,
        seed: int = 0,
    ) -> None:
        """Begin without any token.

        Args:
            crosscoder: the dictionary.
            pair: positions of two sites of one width, base first.
            controls: which of `CONTROLS`.
            seed: of the control `random`.
        """
        self._crosscoder, self._pair = crosscoder, pair
        base, finetuned = (crosscoder.decoder(site).detach().double() for site in pair)
        self.directions = {"finetuned": finetuned, "base": base}
        """d_j by name, `[d_sae, d_model]`, float64, raw space."""
        if "random" in controls:
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(finetuned.shape, generator=generator, dtype=torch.float64)
            noise = noise.to(finetuned.device)
            norms = finetuned.norm(dim=1) / noise.norm(dim=1)
            self.directions["random"] = noise * norms[:, None]
        if "other" in controls:
            self.directions["other"] = finetuned.roll(1 + len(finetuned) // 3, dims=0)
        # Rows of `_dots` are sum_i f_ij <Y_i, d_j> for Y = x^0, x^1, e^0, e^1.
        zeros = finetuned.new_zeros(4, len(finetuned))
        self._dots = {name: zeros.clone() for name in self.directions}
        # Rows of `_codes` are sum_i 1[f_ij > 0], sum_i f_ij and sum_i f_ij^2.
        self._codes = zeros[:3].clone()
        self._difference = Moments.of(finetuned[:0])

    def add(self, x: Sequence[Float[Tensor, "batch _"]], codes: SparseCodes) -> None:
        """Take more tokens into account: their activations by site, and their codes."""
        pattern, values = codes.pattern, codes.values.double()
        latents = pattern.latents.long()
        targets = self._targets(x, codes)
        for name, directions in self.directions.items():
            for row, target in zip(self._dots[name], targets, strict=True):
                dots = sampled_dots(target, directions, pattern.offsets, pattern.latents)
                row += torch.bincount(latents, weights=values * dots, minlength=pattern.d_sae)
        for row, weights in zip(
            self._codes, (torch.ones_like(values), values, values.square()), strict=True
        ):
            row += torch.bincount(latents, weights=weights, minlength=pattern.d_sae)
        self._difference += Moments.of(targets[1] - targets[0])

    def _targets(
        self, x: Sequence[Float[Tensor, "batch _"]], codes: SparseCodes
    ) -> tuple[Float[Tensor, "batch d_model"], ...]:
        """x^0, x^1, e^0, e^1 in float64."""
        own = [x[site].double() for site in self._pair]
        errors = [
            part - codes.times(self.directions[name]) - bias
            for part, name, bias in zip(own, ("base", "finetuned"), self._biases(), strict=True)
        ]
        return (*own, *errors)

    def _biases(self) -> list[Float[Tensor, " d_model"]]:
        return [self._crosscoder.decoder_bias(site).detach().double() for site in self._pair]

    def gather(self, axis: Axis) -> None:
        """Add the sums of several processes."""
        self._dots = {name: axis.reduced(own) for name, own in self._dots.items()}
        self._codes = axis.reduced(self._codes)
        self._difference = self._difference.over(axis)

    def result(self) -> dict[str, LatentScaling]:
        """Divide, once: the scaling of each direction, by its name."""
        return {name: self._scaling(name) for name in self.directions}

    def _scaling(self, name: str) -> LatentScaling:
        d = self.directions[name]
        own, other = (0, 1) if name == "base" else (1, 0)
        n_active, total, squares = self._codes
        norm = d.square().sum(dim=1)
        divisor = torch.where(n_active > 0, squares * norm, math.nan)
        scales = [self._crosscoder.sites[site].scale for site in self._pair]
        betas: dict[str, list[Tensor]] = {}
        for site in (other, own):
            at_x, at_e = self._dots[name][site], self._dots[name][2 + site]
            rows = self.directions["finetuned" if site else "base"]
            added_back = squares * (rows * d).sum(dim=1)
            targets = {
                "beta_error": at_e + added_back,
                "beta_reconstruction": at_x - at_e,
                "beta_activation": at_x,
                "beta_activation_no_bias": at_x - total * (d @ self._biases()[site]),
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
        v = self.directions["finetuned"] - self.directions["base"]
        own = self._codes[2] * v.square().sum(dim=1)
        at = self._dots["finetuned"] - self._dots["base"]
        of_x, of_e = at[1] - at[0], at[3] - at[2]
        variance = self._difference.sum_of_squared_deviations
        variance = torch.where(variance > 0, variance, math.nan)
        return DifferenceByLatent(
            explained_difference=(2 * of_x - own) / variance,
            explained_difference_drop=(2 * of_e + own) / variance,
        )
