"""Directions of x^1 - x^0 found without a dictionary, and the edits that test them.

    steering:                 x^m + alpha s_m d / ||d||      s_m: mean norm at site m
    projection replacement:   x^1 - P x^1 + P x^0            P = d d' / ||d||^2

(Minder et al. 2025, arXiv 2510.13900). Contract: a direction is
`[d_model]`, raw space; `trials` tests it as latents are tested, against random directions whose
edits are of the same norm at every token, so that `run_trials` puts both in one table. Limit: one
hook point, edited at every token.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.analysis.lens import LogitEffects, direction_logits
from tl_crosscoder.analysis.patchscope import Patchscope, patchscope
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.controls import gaussian_rows, of_same_norm
from tl_crosscoder.interventions.curves import exchanged
from tl_crosscoder.interventions.edits import AddVector, Edit, ProjectOut
from tl_crosscoder.interventions.latent_edits import steering
from tl_crosscoder.interventions.trials import ControlSettings, Trial
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.results.tables import TableOfColumns

Which = int | Literal["mean"]
"""A direction: a number (of a position, of a component), or the mean over all tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Directions(TableOfColumns):
    """Abstract: directions of x^1 - x^0, with what is needed to steer by them."""

    compared: tuple[str, str]
    """Names of the sites x^0 and x^1."""
    hook_names: tuple[str, str]
    """Hook points of the two sites."""
    models: tuple[str, str]
    """Models of the two sites."""
    n_tokens: int
    """Tokens that count."""
    activation_norms: tuple[float, float]
    """Mean norm of the activation of each of the two sites over these tokens."""

    @abstractmethod
    def which(self) -> tuple[Which, ...]:
        """The directions that there are."""

    @abstractmethod
    def label(self, which: Which) -> str:
        """What tables call a direction."""

    @abstractmethod
    def direction(self, which: Which = "mean") -> Float[Tensor, " d_model"]:
        """A direction, float32 on the CPU. Raises ValueError for one that there is not."""

    def stacked(self) -> Float[Tensor, "n d_model"]:
        """All directions, in the order of `which`."""
        return torch.stack([self.direction(each) for each in self.which()])

    def steering(
        self, ctx: InterventionContext, which: Which, *, strength: float, site: str | None = None
    ) -> AddVector:
        """x^m + alpha s_m d / ||d|| at every token.

        Args:
            ctx: the models; needs no dictionary.
            which: direction.
            strength: alpha, in mean norms of the steered activation; below 0 steers away.
            site: name of one of the compared sites; None is x^1.

        Raises:
            ValueError: other sites, an unknown direction, or one without length.
        """
        self._check(ctx)
        return self._steering(ctx, self.direction(which), strength, site or self.compared[1])

    def projection_replacement(self, ctx: InterventionContext, which: Which) -> ProjectOut:
        """The fine-tuned stream with the base's coefficient of a direction.

        Raises:
            ValueError: other sites, an unknown direction, or one without length.
        """
        self._check(ctx)
        if not bool(self.direction(which).norm() > 0):
            raise ValueError(
                f"{self.label(which)!r} is zero, so there is nothing to replace: compare models "
                "that differ below this hook."
            )
        return exchanged(ctx, self.direction(which)[None])

    def trials(
        self,
        ctx: InterventionContext,
        which: Which,
        *,
        settings: ControlSettings | None = None,
        factors: Mapping[str, Tensor | None] | None = None,
        shared: dict[float, dict[str, list[Edit]]] | None = None,
    ) -> list[Trial]:
        """Sufficiency (`steer`: the base, at each strength) and necessity (projection replacement).

        For `run_trials`, beside those of latents or alone.

        Args:
            ctx: the models; needs no dictionary.
            which: direction.
            settings: of the controls.
            factors: of the Gaussian controls, from `controls.gaussian_factors`; None is isotropic
                directions alone.
            shared: controls of steering by strength, which are those of any direction: filled, and
                taken from there by the next one, so that each runs once.

        Raises:
            ValueError: as the edits do.
        """
        settings, base = settings or ControlSettings(), self.compared[0]
        own = self.projection_replacement(ctx, which)
        row = self.direction(which)[None]
        factors = {"random": None} if factors is None else factors
        drawn = gaussian_rows(row, n=settings.n_random, seed=settings.seed, factors=factors)
        shared = {} if shared is None else shared
        for alpha in settings.alphas:
            if alpha not in shared:
                shared[alpha] = {
                    kind: [self._steering(ctx, r[0], alpha, base) for r in each]
                    for kind, each in drawn.items()
                }
        steer = [
            Trial(
                test="steer",
                name=self.label(which),
                strength=alpha,
                own=self.steering(ctx, which, strength=alpha, site=base),
                controls=shared[alpha],
            )
            for alpha in settings.alphas
        ]
        controls = of_same_norm(own, drawn, stream=ctx.finetuned, make=lambda r: exchanged(ctx, r))
        name = self.label(which)
        return [*steer, Trial(test="necessity", name=name, own=own, controls=controls)]

    def logit_lens(
        self, models: ModelPair, *, site: str | None = None, n: int = 10
    ) -> LogitEffects:
        """Tokens that the directions promote, numbered by their place in `which`.

        Read by the model of `site`, that of x^1 by default. Raises as `direction_logits` does.
        """
        return direction_logits(models, self.stacked(), site=site or self.compared[1], n=n)

    def patchscope(
        self, models: ModelPair, *, site: str | None = None, **options: Any
    ) -> Patchscope:
        """What a model says when a direction stands in place of its activation.

        The model of `site`, that of x^1 by default; scale 1 is the mean norm of its activation.
        Other options, and what it raises, are those of `analysis.patchscope.patchscope`.
        """
        site = site or self.compared[1]
        if site in self.compared:
            options.setdefault("activation_norm", self.activation_norms[self.compared.index(site)])
        return patchscope(models, self.stacked(), site=site, **options)

    def _steering(
        self,
        ctx: InterventionContext,
        vector: Float[Tensor, " d_model"],
        strength: float,
        site: str,
    ) -> AddVector:
        if site not in self.compared:
            raise ValueError(f"site {site!r} was not compared: {self.compared} were.")
        norm = self.activation_norms[self.compared.index(site)]
        return steering(ctx, vector, strength=strength, norm=norm, site=site)

    def _check(self, ctx: InterventionContext) -> None:
        pair = (ctx.base, ctx.finetuned)
        theirs = [(s.name, s.hook_name) for s in (ctx.models.model_sites[i] for i in pair)]
        ours = list(zip(self.compared, self.hook_names, strict=True))
        if theirs != ours:
            raise ValueError(
                f"these directions are of the sites {ours}, base first, but the models' are "
                f"{theirs}. Take the models and the order (comparing) that they were measured with."
            )
