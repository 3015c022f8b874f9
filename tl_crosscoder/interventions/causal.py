"""Do these latents cause the behaviour? Sufficiency and necessity, against what chance would do.

    necessity      fine-tuned model, h - sum_{j in S} f_j v_j: share of the behaviour removed
    sufficiency    base model, h + sum_{j in S} f_j v_j (`insert`), or h + alpha s u (`steer`):
                   share of it induced                               v_j = d_j^1 - d_j^0

Controls are those of `controls`, of all kinds; what a trial tells is in `trials`. Limit: sets are
chosen beforehand; a search over sets needs prompts of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.latents import MIN_ACTIVE_TOKENS, LatentMeasures
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.behaviour import Effect
from tl_crosscoder.interventions.causal_rows import TESTS, CausalTest
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.controls import gaussian_factors, gaussian_rows, of_same_norm
from tl_crosscoder.interventions.edits import AddLatents, AddVector, Edit
from tl_crosscoder.interventions.latent_edits import (
    Mode,
    ablated_directions,
    ablation_along,
    activation_norms,
    check_mode,
)
from tl_crosscoder.interventions.trials import ControlSettings, Trial, run_trials
from tl_crosscoder.models.pair import ModelPair

N_SIMILAR = 50
"""Latents of the nearest firing rates, from which a control is drawn."""


def causal_test(
    models: ModelPair,
    crosscoder: Crosscoder,
    effect: Effect,
    neutral: TokenizedText,
    *,
    latents: LatentMeasures,
    sets: Mapping[str, Sequence[int]],
    tests: Sequence[str] = TESTS,
    mode: Mode = "delta",
    settings: ControlSettings | None = None,
    null: Crosscoder | None = None,
    show_progress: bool = False,
) -> CausalTest:
    """Sufficiency and necessity of sets of latents for an effect, with controls.

    Where the models do not differ in the effect there are no rows, and the note says so.

    Args:
        models: a pair, or more sites.
        crosscoder: trained on them.
        effect: a `Behaviour`, or `Predictions` where there is no name for what changed.
        neutral: text that has nothing to do with it, for the off-target cost, and for the
            directions with the covariance of the difference.
        latents: measures of the crosscoder: firing rates, for matched latents.
        sets: latents by the name of their set.
        tests: which of `TESTS`.
        mode: of the ablation that tests necessity; see `ablation`.
        settings: of the controls.
        null: a dictionary of a null pair at the same hook (see `run.null`): its directions are one
            more control.
        show_progress: with a progress bar.

    Raises:
        ValueError: unknown tests, latents out of range or that never fire, or a null dictionary of
            another hook.
    """
    settings, ctx = settings or ControlSettings(), InterventionContext.of(models, crosscoder)
    how = {"mode": mode, "settings": settings, "null": null}
    trials = causal_trials(ctx, neutral, latents=latents, sets=sets, tests=tests, **how)
    return run_trials(
        ctx, effect, neutral, trials=trials, settings=settings, show_progress=show_progress
    )


def causal_trials(
    ctx: InterventionContext,
    neutral: TokenizedText,
    *,
    latents: LatentMeasures,
    sets: Mapping[str, Sequence[int]],
    tests: Sequence[str] = TESTS,
    mode: Mode = "delta",
    settings: ControlSettings,
    null: Crosscoder | None = None,
) -> list[Trial]:
    """What `causal_test` tries: every set in every test, with its controls. Raises as it does."""
    check_mode(mode)
    chosen = {name: checked(ctx, ids, latents, name) for name, ids in sets.items()}
    if not chosen or set(tests) - set(TESTS):
        raise ValueError(
            f"tests {list(tests)} on the sets {list(sets)}: name one set of latents or more, and "
            f"tests among {list(TESTS)}."
        )
    _check_null(ctx, null)
    norm = math.nan
    if "steer" in tests:
        norm = activation_norms(ctx.models, neutral)[ctx.site_name(ctx.base)]
    maker = TrialMaker(
        ctx=ctx,
        latents=latents,
        mode=mode,
        settings=settings,
        norm=norm,
        null=null,
        factors=gaussian_factors(ctx, neutral, settings.controls),
    )
    return [
        trial
        for test in tests
        for name, ids in chosen.items()
        for trial in maker.trials(test, name, ids)
    ]


@dataclass(frozen=True, eq=False, kw_only=True)
class TrialMaker:
    """Makes the edits of a set and of its controls."""

    ctx: InterventionContext
    latents: LatentMeasures
    mode: Mode = "delta"
    settings: ControlSettings
    norm: float = math.nan
    """Mean norm of the base activation, the unit of steering."""
    null: Crosscoder | None
    factors: Mapping[str, Tensor | None]
    """Of the Gaussian kinds of control."""

    def trials(self, test: str, name: str, ids: Int[Tensor, " n"]) -> list[Trial]:
        """One, or of steering one a strength."""
        if test != "steer":
            return [self.trial(test, name, ids)]
        rows = self._rows(test, ids)
        return self._steering(name, ids, rows, self._drawn(test, ids, rows))

    def trial(
        self, test: str, name: str, ids: Int[Tensor, " n"], *, has_controls: bool = True
    ) -> Trial:
        """Of necessity or insertion."""
        rows = self._rows(test, ids)
        drawn = self._drawn(test, ids, rows) if has_controls else {}
        site = self.ctx.finetuned if test == "necessity" else self.ctx.base
        own = self._edit(test, ids, rows)
        controls: dict[str, list[Edit]] = of_same_norm(
            own, drawn, stream=site, make=lambda r: self._edit(test, ids, r)
        )
        if has_controls and "matched" in self.settings.controls:
            sets = self._matched(ids)
            controls["matched"] = [self._edit(test, m, self._rows(test, m)) for m in sets]
        about = {"n_latents": len(ids), "latents": tuple(ids.tolist())}
        return Trial(test=test, name=name, own=own, controls=controls, **about)

    def _steering(
        self,
        name: str,
        ids: Int[Tensor, " n"],
        rows: Float[Tensor, "n d_model"],
        drawn: Mapping[str, Sequence[Float[Tensor, "n d_model"]]],
    ) -> list[Trial]:
        """Along the sum of d_j^1, each as long as its latent's mean code makes it."""
        weights = self.latents.firing.mean_code.to(rows)[ids][:, None]
        own = _unit(weights * rows)
        units = {kind: [_unit(weights * r) for r in each] for kind, each in drawn.items()}
        return [
            Trial(
                test="steer",
                name=name,
                n_latents=len(ids),
                latents=tuple(ids.tolist()),
                strength=alpha,
                own=self._steer(own, alpha),
                controls={k: [self._steer(u, alpha) for u in each] for k, each in units.items()},
            )
            for alpha in self.settings.alphas
        ]

    def _drawn(
        self, test: str, ids: Int[Tensor, " n"], rows: Float[Tensor, "n d_model"]
    ) -> dict[str, list[Float[Tensor, "n d_model"]]]:
        """Rows in the place of the latents' own, of the same norms, by kind of control."""
        settings = self.settings
        n, seed = settings.n_random, settings.seed
        drawn = gaussian_rows(rows, n=n, seed=seed, factors=self.factors)
        if "shuffled" in settings.controls:
            others = self._similar(ids, self._active(), n=n, seed=seed + 2)
            drawn["shuffled"] = [_of_norms(self._rows(test, own), rows) for own in others]
        return drawn | ({"null": self._null_rows(rows)} if self.null is not None else {})

    def _rows(self, test: str, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        if test == "steer":
            return self.ctx.decoder(self.ctx.finetuned)[ids]
        return ablated_directions(self.ctx, ids, self.mode if test == "necessity" else "delta")

    def _edit(self, test: str, ids: Int[Tensor, " n"], v: Float[Tensor, "n d_model"]) -> Edit:
        if test == "necessity":
            return ablation_along(self.ctx, ids, v, self.mode)
        site = self.ctx.base
        return AddLatents(site=site, stream=site, latents=ids, directions=v)

    def _steer(self, unit: Float[Tensor, " d_model"], alpha: float) -> AddVector:
        site = self.ctx.base
        return AddVector(site=site, stream=site, vector=alpha * self.norm * unit)

    def _matched(self, ids: Int[Tensor, " n"]) -> list[Int[Tensor, " n"]]:
        """Sets of latents outside the set, each of about the firing rate of the one it replaces."""
        others = self._active()
        others = others[~torch.isin(others, ids.cpu())]
        if len(others) < len(ids):
            return []
        n, seed = self.settings.n_matched, self.settings.seed + 1
        sets = self._similar(ids, others, n=n, seed=seed)
        return [torch.tensor(list(dict.fromkeys(own.tolist())), device=ids.device) for own in sets]

    def _active(self) -> Int[Tensor, " n_active"]:
        return (self.latents.n_active >= MIN_ACTIVE_TOKENS).nonzero().squeeze(1)

    def _similar(
        self, ids: Int[Tensor, " n"], among: Int[Tensor, " n_active"], *, n: int, seed: int
    ) -> list[Int[Tensor, " n"]]:
        """Draws of a latent for each latent, of about its firing rate, and never itself.

        Each one once, unless those that fire about as often are too few. Nothing where there are
        none.
        """
        rates, generator = self.latents.n_active.log(), torch.Generator().manual_seed(seed)
        near = []
        for j in ids.tolist():
            own = among[among != j]
            near.append(own[(rates[own] - rates[j]).abs().argsort(stable=True)[:N_SIMILAR]])
        sets = []
        for _ in range(n if all(map(len, near)) else 0):
            drawn: list[int] = []
            for options in near:
                order = options[torch.randperm(len(options), generator=generator)].tolist()
                drawn.append(next((j for j in order if j not in drawn), order[0]))
            sets.append(torch.tensor(drawn, device=ids.device))
        return sets

    def _null_rows(self, rows: Float[Tensor, "n d_model"]) -> list[Float[Tensor, "n d_model"]]:
        """Rows of the null pair's latents that lean most to its second site."""
        assert self.null is not None
        theirs, norms = self.null.decoder(-1).detach().to(rows), self.null.decoder_norms()
        # Latents that write nothing lean nowhere, and NaN would be sorted first.
        lean = (norms[:, -1] / norms.sum(dim=1)).nan_to_num(-1.0)
        order = lean.argsort(descending=True, stable=True)[: 10 * len(rows)]
        sets = theirs[order].split(len(rows))
        return [_of_norms(each, rows) for each in sets if len(each) == len(rows)]


def _of_norms(
    rows: Float[Tensor, "n d_model"], like: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n d_model"]:
    """Rows, each of the norm of the other one in its place."""
    return rows * (like.norm(dim=1) / rows.norm(dim=1).clamp(min=1e-30))[:, None]


def _unit(rows: Float[Tensor, "n d_model"]) -> Float[Tensor, " d_model"]:
    """The direction of the sum."""
    total = rows.sum(dim=0)
    return total / total.norm().clamp(min=1e-12)


def _check_null(ctx: InterventionContext, null: Crosscoder | None) -> None:
    site = ctx.models.model_sites[ctx.finetuned]
    theirs = site if null is None else null.sites[-1]
    if (theirs.hook_name, theirs.d_model) != (site.hook_name, site.d_model):
        raise ValueError(
            f"the null dictionary is of {theirs.hook_name} [{theirs.d_model}], but this one is of "
            f"{site.hook_name} [{site.d_model}]: its directions point elsewhere. Make one at this "
            "hook with `tl-crosscoder null`."
        )


def checked(
    ctx: InterventionContext, ids: Sequence[int], latents: LatentMeasures, name: str
) -> Int[Tensor, " n"]:
    """Latents of a set. Raises ValueError for one out of range, or that never fires."""
    chosen = ctx.latents(ids)
    silent = [j for j in chosen.tolist() if latents.n_active[j] == 0]
    if silent or not len(chosen):
        raise ValueError(
            f"the set {name!r} has {len(chosen)} latents, of which {silent} never fire on the "
            "measured text: what they do cannot be tested. Choose latents that fire."
        )
    return chosen
