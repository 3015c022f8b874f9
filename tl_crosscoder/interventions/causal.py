"""Do these latents cause the behaviour? Sufficiency and necessity, against what chance would do.

    necessity      fine-tuned model, h - sum_{j in S} f_j v_j: share of the behaviour removed
    sufficiency    base model, h + sum_{j in S} f_j v_j (`insert`), or h + alpha s u (`steer`):
                   share of it induced                               v_j = d_j^1 - d_j^0

Controls: Gaussian directions of the norms of v_j with the same codes; as many active latents of
about the same firing rate; latents of a null pair. What a trial tells is in `trials`. Limit: sets
are chosen beforehand; a search over sets needs prompts of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.latents import MIN_ACTIVE_TOKENS, LatentMeasures
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.behaviour import Effect
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import AddLatents, AddVector, Edit
from tl_crosscoder.interventions.latent_edits import (
    Mode,
    ablated_directions,
    ablation_along,
    activation_norms,
    check_mode,
    random_like,
)
from tl_crosscoder.interventions.trials import TESTS, CausalTest, ControlSettings, Trial, run_trials
from tl_crosscoder.models.pair import ModelPair


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

    Args:
        models: a pair, or more sites.
        crosscoder: trained on them.
        effect: a `Behaviour`, or `Predictions` where there is no name for what changed.
        neutral: text that has nothing to do with it, for the off-target cost.
        latents: measures of the crosscoder: firing rates, for matched latents.
        sets: latents by the name of their set.
        tests: which of `TESTS`.
        mode: of the ablation that tests necessity; see `ablation`.
        settings: of the controls.
        null: a dictionary of a null pair (base against itself) at the same hook: its directions
            are one more control.
        show_progress: with a progress bar.

    Raises:
        ValueError: unknown tests, latents out of range or that never fire, or models that do not
            differ in the behaviour.
    """
    settings = settings or ControlSettings()
    check_mode(mode)
    ctx = InterventionContext.of(models, crosscoder)
    chosen = {name: _checked(ctx, ids, latents, name) for name, ids in sets.items()}
    if not chosen or set(tests) - set(TESTS):
        raise ValueError(
            f"tests {list(tests)} on the sets {list(sets)}: name one set of latents or more, and "
            f"tests among {list(TESTS)}."
        )
    norm = 0.0
    if "steer" in tests:
        norm = activation_norms(ctx.models, neutral)[ctx.site_name(ctx.base)]
    maker = _Maker(ctx=ctx, latents=latents, mode=mode, settings=settings, norm=norm, null=null)
    trials = [
        trial
        for test in tests
        for name, ids in chosen.items()
        for trial in maker.trials(test, name, ids)
    ]
    found = run_trials(
        ctx, effect, neutral, trials=trials, settings=settings, show_progress=show_progress
    )
    return replace(found, sets={name: ids.tolist() for name, ids in chosen.items()})


@dataclass(frozen=True, eq=False, kw_only=True)
class _Maker:
    """Makes the edits of a set and of its controls."""

    ctx: InterventionContext
    latents: LatentMeasures
    mode: Mode
    settings: ControlSettings
    norm: float
    """Mean norm of the base activation, the unit of steering."""
    null: Crosscoder | None

    def trials(self, test: str, name: str, ids: Int[Tensor, " n"]) -> list[Trial]:
        """One, or of steering one a strength."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        v = self._rows(test, ids)
        random = [random_like(v, generator) for _ in range(self.settings.n_random)]
        null = self._null_directions(v)
        if test == "steer":
            return self._steering(name, ids, random, null)
        trial = Trial(
            test=test,
            name=name,
            n_latents=len(ids),
            own=self._edit(test, ids, v),
            random=[self._edit(test, ids, r) for r in random],
            matched=[self._edit(test, m, self._rows(test, m)) for m in self._matched(ids)],
            null=[self._edit(test, ids, d) for d in null],
        )
        return [trial]

    def _steering(
        self,
        name: str,
        ids: Int[Tensor, " n"],
        random: Sequence[Float[Tensor, "n d_model"]],
        null: Sequence[Float[Tensor, "n d_model"]],
    ) -> list[Trial]:
        """Along the sum of d_j^1, each as long as its latent's mean code makes it."""
        rows = self.ctx.decoder(self.ctx.finetuned)[ids]
        weights = self.latents.firing.mean_code.to(rows)[ids][:, None]
        of_random, of_null = ([_unit(weights * r) for r in each] for each in (random, null))
        own = _unit(weights * rows)
        return [
            Trial(
                test="steer",
                name=name,
                n_latents=len(ids),
                strength=alpha,
                own=self._steer(own, alpha),
                random=[self._steer(u, alpha) for u in of_random],
                null=[self._steer(u, alpha) for u in of_null],
            )
            for alpha in self.settings.alphas
        ]

    def _rows(self, test: str, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
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
        """Sets of other active latents, each of about the firing rate of the one it replaces."""
        counts = self.latents.n_active
        active = (counts >= MIN_ACTIVE_TOKENS).nonzero().squeeze(1)
        active = active[~torch.isin(active, ids.cpu())]
        generator = torch.Generator().manual_seed(self.settings.seed + 1)
        near = [
            active[(counts[active].log() - counts[j].log()).abs().argsort(stable=True)[:50]]
            for j in ids.tolist()
        ]
        sets = []
        for _ in range(self.settings.n_matched if len(active) >= len(ids) else 0):
            drawn: list[int] = []
            for options in near:
                order = options[torch.randperm(len(options), generator=generator)].tolist()
                free = [j for j in order if j not in drawn]
                drawn.append(free[0] if free else order[0])
            sets.append(torch.tensor(list(dict.fromkeys(drawn)), device=ids.device))
        return sets

    def _null_directions(self, v: Float[Tensor, "n d_model"]) -> list[Float[Tensor, "n d_model"]]:
        """Rows of the null pair's latents that lean most to its second site, of the norms of v."""
        if self.null is None:
            return []
        rows = self.null.decoder(-1).detach().to(v)
        norms = self.null.decoder_norms()
        # Latents that write nothing lean nowhere, and NaN would be sorted first.
        lean = (norms[:, -1] / norms.sum(dim=1)).nan_to_num(-1.0)
        order = lean.argsort(descending=True, stable=True)[: 10 * len(v)]
        sets = rows[order].split(len(v))
        scale = v.norm(dim=1, keepdim=True)
        return [r / r.norm(dim=1, keepdim=True) * scale for r in sets if len(r) == len(v)]


def _unit(rows: Float[Tensor, "n d_model"]) -> Float[Tensor, " d_model"]:
    """The direction of the sum."""
    total = rows.sum(dim=0)
    return total / total.norm().clamp(min=1e-12)


def _checked(
    ctx: InterventionContext, ids: Sequence[int], latents: LatentMeasures, name: str
) -> Int[Tensor, " n"]:
    chosen = ctx.latents(ids)
    silent = [j for j in chosen.tolist() if latents.n_active[j] == 0]
    if silent or not len(chosen):
        raise ValueError(
            f"the set {name!r} has {len(chosen)} latents, of which {silent} never fire on the "
            "measured text: what they do cannot be tested. Choose latents that fire."
        )
    return chosen
