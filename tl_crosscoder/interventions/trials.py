"""Trials: edits that should remove or induce a behaviour, against controls, with their cost.

Effects are along the behaviour's change from base to fine-tuned model, as a share of it. Contract:
intervals are bootstraps over prompts, p-values one-sided among the controls of a kind, for the
strongest kind corrected for the number of trials of a test (Holm); costs are on neutral text, KL
to the unedited model and the rise of cross-entropy. The ceiling of a share is what replacing the
whole activation at the hook does. What must not be read as a plain share is flagged (`FLAGS`). A
trial may be of latents or of a method without a dictionary. Limit: a p-value is at least
1 / (1 + controls).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.analysis.resampling import (
    Interval,
    bootstrap_weights,
    effect_size,
    holm,
    interval,
    p_value,
    ratio_interval,
)
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.behaviour import Effect
from tl_crosscoder.interventions.causal_rows import FLAGS, CausalRow, CausalTest
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.controls import ENOUGH, KINDS, ControlSettings
from tl_crosscoder.interventions.costs import OffTarget
from tl_crosscoder.interventions.edits import Edit, ReplaceActivation, unchanged

MIN_CHANGE = 1e-3
"""Smallest change from base to fine-tuned model that shares can be taken of."""
MIN_CEILING = 0.05
"""Smallest share that replacing the whole activation must reach for anything to pass the hook."""
WHOLE = 1.005
"""A share above it is printed as more than 100 %."""
N_COST = 10
"""Controls whose cost on neutral text is averaged."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Trial:
    """One method in one test: its own edit and those of its controls."""

    test: str
    """`necessity` edits the fine-tuned model, `insert` and `steer` the base."""
    name: str
    own: Edit
    controls: Mapping[str, Sequence[Edit]]
    """By kind, among `controls.KINDS`: your own are `random`."""
    n_latents: int = 0
    """Latents or directions; 0 where the method has none to count."""
    latents: tuple[int, ...] = ()
    """The latents, to be recorded."""
    strength: float = math.nan
    """alpha of steering."""

    @property
    def edits(self) -> list[Edit]:
        """All of them, controls by kind."""
        return [self.own, *(edit for each in self.controls.values() for edit in each)]


def run_trials(
    ctx: InterventionContext,
    effect: Effect,
    neutral: TokenizedText | OffTarget,
    *,
    trials: Sequence[Trial],
    settings: ControlSettings | None = None,
    show_progress: bool = False,
) -> CausalTest:
    """Test edits of any kind, so that one table holds methods with and without latents.

    Args:
        ctx: models and dictionary.
        effect: a behaviour, or predictions.
        neutral: text that has nothing to do with it, for cost and health of the edited models; an
            `OffTarget` of it keeps what edits cost from one effect to the next.
        trials: what is tested, with its controls.
        settings: of the resampling, and the bound of a broken model.
        show_progress: with a progress bar.

    Where the models do not differ in the effect there are no rows, and the note says so.

    Raises:
        ValueError: no trials, or controls of an unknown kind.
    """
    settings = settings or ControlSettings()
    unknown = {kind for trial in trials for kind in trial.controls} - set(KINDS)
    if not trials or unknown:
        raise ValueError(
            f"there is nothing to test: give one trial or more, with controls of the kinds "
            f"{list(KINDS)}{f', not {sorted(unknown)}' if unknown else ''}."
        )
    costs = neutral if isinstance(neutral, OffTarget) else OffTarget(ctx=ctx, text=neutral)
    rows, note = [], ""
    for toward in (ctx.base, ctx.finetuned):
        own = [t for t in trials if (t.test == "necessity") == (toward == ctx.base)]
        if not own:
            continue
        plain = effect.scores(ctx, [unchanged(ctx.base), unchanged(ctx.finetuned)], toward=toward)
        base, finetuned = plain.mean(dim=1).tolist()
        if abs(finetuned - base) < MIN_CHANGE:
            note = (
                f"Base and fine-tuned model do not differ in {effect.name!r} ({base:.2g} and "
                f"{finetuned:.2g}), so there is nothing to cause."
            )
            continue
        how = {
            "toward": toward,
            "first_round": settings.first_round,
            "show_progress": show_progress,
        }
        rows += _rows(costs, _scores(ctx, effect, own, plain=plain, **how), settings)
    sets = {trial.name: [*trial.latents] for trial in trials if trial.latents}
    return result_of(effect, settings, rows=_corrected(rows), sets=sets, note=note)


def result_of(
    effect: Effect,
    settings: ControlSettings,
    *,
    rows: Sequence[CausalRow] = (),
    sets: Mapping[str, list[int]] | None = None,
    note: str = "",
) -> CausalTest:
    """Rows of one effect, or a note why there are none."""
    return CausalTest(
        rows=tuple(rows),
        effect=effect.name,
        unit=effect.unit,
        n_prompts=effect.n_prompts,
        n_random=settings.n_random,
        n_matched=settings.n_matched,
        first_round=settings.first_round,
        max_ce_cost=settings.max_ce_cost,
        sets=dict(sets or {}),
        note=note,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Scores:
    """Effect in the models as they are, with the whole activation exchanged, and in each trial."""

    is_necessity: bool
    plain: Float[Tensor, "2 n_prompts"]
    """Base, fine-tuned."""
    whole: Float[Tensor, "1 n_prompts"]
    trials: Sequence["_Tried"]

    def shares(self, scores: Float[Tensor, "n n_prompts"]) -> Float[Tensor, " n"]:
        """Of the change from base to fine-tuned model."""
        return self._effects(scores).mean(dim=1) / self._change.mean()

    def share(
        self, scores: Float[Tensor, "1 n_prompts"], weights: Float[Tensor, "n_draws n_prompts"]
    ) -> Interval:
        """One share, with its interval."""
        draws = (weights @ self._effects(scores)[0]) / (weights @ self._change)
        return interval(self.shares(scores).item(), draws)

    @property
    def _change(self) -> Float[Tensor, " n_prompts"]:
        return self.plain[1] - self.plain[0]

    def _effects(self, scores: Float[Tensor, "n n_prompts"]) -> Float[Tensor, "n n_prompts"]:
        return self.plain[1] - scores if self.is_necessity else scores - self.plain[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Tried:
    """A trial with the controls that were run, and its scores."""

    trial: Trial
    own: Float[Tensor, "1 n_prompts"]
    controls: Mapping[str, Float[Tensor, "n_controls n_prompts"]]
    strongest: str = ""
    """The kind that went on after a first round; empty where there was none."""


def _scores(
    ctx: InterventionContext,
    effect: Effect,
    trials: Sequence[Trial],
    *,
    plain: Float[Tensor, "2 n_prompts"],
    toward: int,
    first_round: int,
    show_progress: bool,
) -> _Scores:
    is_necessity = toward == ctx.base
    site = ctx.finetuned if is_necessity else ctx.base

    def scored(parts: Sequence[Sequence[Edit]]) -> list[Tensor]:
        # Trials may share controls: each edit runs once.
        every = [edit for part in parts for edit in part]
        edits = [*{id(edit): edit for edit in every}.values()]
        description = f"Testing {len(edits):,} edits" if show_progress else None
        found = effect.scores(ctx, edits, toward=toward, description=description)
        places = {id(edit): i for i, edit in enumerate(edits)}
        return [*found[[places[id(edit)] for edit in every]].split([*map(len, parts)])]

    first = [_cut(trial, first_round) for trial in trials]
    of_whole, *of_trials = scored(
        [[ReplaceActivation(site=site, stream=toward)], *(trial.edits for trial in first)]
    )
    tried = [
        _Tried(trial=trial, own=found[:1], controls=_by_kind(trial, found[1:]))
        for trial, found in zip(first, of_trials, strict=True)
    ]
    scores = _Scores(is_necessity=is_necessity, plain=plain, whole=of_whole, trials=tried)
    if not first_round:
        return scores
    going_on = [_strongest(one, scores) for one in tried]
    rest = [
        trial.controls[kind][first_round:] if kind and not is_decided else ()
        for trial, (kind, is_decided) in zip(trials, going_on, strict=True)
    ]
    more = scored(rest) if any(rest) else [found[:0] for found in of_trials]
    return replace(
        scores,
        trials=[
            _joined(one, kind, edits, found)
            for one, (kind, _), edits, found in zip(tried, going_on, rest, more, strict=True)
        ],
    )


def _cut(trial: Trial, first_round: int) -> Trial:
    """With the first controls of each kind."""
    if not first_round:
        return trial
    return replace(
        trial, controls={kind: each[:first_round] for kind, each in trial.controls.items()}
    )


def _strongest(tried: _Tried, scores: _Scores) -> tuple[str, bool]:
    """The kind of the highest mean share, and whether enough of it did as much as the trial."""
    shares = {kind: scores.shares(each) for kind, each in tried.controls.items() if len(each)}
    if not shares:
        return "", True
    kind = max(shares, key=lambda kind: shares[kind].mean().item())
    return kind, int((shares[kind] >= scores.shares(tried.own)).sum()) >= ENOUGH


def _joined(tried: _Tried, kind: str, edits: Sequence[Edit], found: Tensor) -> _Tried:
    """With more controls of a kind."""
    if not kind:
        return tried
    controls = {**tried.trial.controls, kind: [*tried.trial.controls[kind], *edits]}
    scores = {**tried.controls, kind: torch.cat([tried.controls[kind], found])}
    trial = replace(tried.trial, controls=controls)
    return replace(tried, trial=trial, controls=scores, strongest=kind)


def _rows(costs: OffTarget, scores: _Scores, settings: ControlSettings) -> list[CausalRow]:
    """Effects of trials as shares of the behaviour's change, and their off-target cost."""
    weights = bootstrap_weights(scores.plain.shape[1], n_draws=settings.n_draws, seed=settings.seed)
    ceiling = scores.share(scores.whole, weights)
    passes = ceiling.low > 0 and ceiling.value >= MIN_CEILING
    base, finetuned = scores.plain.mean(dim=1).tolist()
    trials = [tried.trial for tried in scores.trials]
    own = [scores.share(tried.own, weights) for tried in scores.trials]
    controls = [
        _of_controls(
            share.value,
            {kind: scores.shares(each) for kind, each in tried.controls.items()},
            strongest=tried.strongest,
        )
        for tried, share in zip(scores.trials, own, strict=True)
    ]
    pairs = zip(trials, controls, strict=True)
    strongest = [trial.controls.get(found["strongest"], ())[:N_COST] for trial, found in pairs]
    on_neutral = _costs(costs, trials, strongest, settings)
    rows = []
    for i, (trial, share) in enumerate(zip(trials, own, strict=True)):
        ends: dict[str, Any] = {**_ends("share", share), **_ends("ceiling", ceiling)}
        ends |= on_neutral[i]
        row = CausalRow(
            test=trial.test,
            latents=trial.name,
            n_latents=trial.n_latents,
            strength=trial.strength,
            value=scores.trials[i].own.mean().item(),
            base=base,
            finetuned=finetuned,
            flag="",  # known when all numbers are
            of_reachable=share.value / ceiling.value if passes else math.nan,
            **controls[i],
            p_control_holm=math.nan,  # known when all rows are
            **ends,
        )
        rows.append(replace(row, flag=_flag(row, passes, settings.max_ce_cost)))
    return rows


def _by_kind(trial: Trial, found: Float[Tensor, "n_controls n_prompts"]) -> dict[str, Tensor]:
    sizes = [len(each) for each in trial.controls.values()]
    return dict(zip(trial.controls, found.split(sizes), strict=True))


def _ends(name: str, found: Interval) -> dict[str, float]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _of_controls(own: float, shares: Mapping[str, Tensor], *, strongest: str) -> dict[str, Any]:
    """Columns of every kind, and of the strongest once more, which a first round may have found."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        each = shares.get(kind, torch.zeros(0))
        known = len(each) > 0
        found[f"{kind}_mean"] = each.mean().item() if known else math.nan
        found[f"{kind}_high"] = each.quantile(0.95).item() if known else math.nan
        found[f"p_{kind}"] = p_value(own, each) if known else math.nan
    kinds = [kind for kind in KINDS if math.isfinite(found[f"{kind}_mean"])]
    strongest = strongest or max(kinds, key=lambda kind: found[f"{kind}_mean"], default="")
    for name, column in {"mean": "control_mean", "high": "control_high"}.items():
        found[column] = found.get(f"{strongest}_{name}", math.nan)
    found["p_control"] = found.get(f"p_{strongest}", math.nan)
    found["effect_size"] = effect_size(own, shares.get(strongest, torch.zeros(0)))
    return {"strongest": strongest, **found}


def _costs(
    costs: OffTarget,
    trials: Sequence[Trial],
    controls: Sequence[Sequence[Edit]],
    settings: ControlSettings,
) -> list[dict[str, float]]:
    """Columns of what each trial costs on neutral text, and some controls of it on average."""
    chosen = [[t.own, *c] for t, c in zip(trials, controls, strict=True)]
    kls, rises = costs.of([edit for each in chosen for edit in each])
    counts, sizes = costs.counts, [len(each) for each in chosen]
    weights = bootstrap_weights(len(counts), n_draws=settings.n_draws, seed=settings.seed)
    columns = []
    for kl, ce in zip(kls.split(sizes), rises.split(sizes), strict=True):
        nats = {"kl": ratio_interval(kl[0], counts, weights=weights),
                "ce": ratio_interval(ce[0], counts, weights=weights)}  # fmt: skip
        means = [(each[1:].sum(dim=1) / counts.sum()).mean().item() for each in (kl, ce)]
        columns.append(
            {
                "off_target_kl": nats["kl"].value,
                "off_target_low": nats["kl"].low,
                "off_target_high": nats["kl"].high,
                **_ends("off_target_ce", nats["ce"]),
                "control_off_target_kl": means[0],
                "control_off_target_ce": means[1],
            }
        )
    return columns


def _flag(row: CausalRow, passes: bool, max_ce_cost: float) -> str:
    """Every one of `FLAGS` that applies; a cost that is NaN is beyond any bound."""
    applies = (
        not passes,
        not row.off_target_ce <= max_ce_cost,
        row.share > WHOLE,
        bool(row.strongest) and not row.control_off_target_ce <= max_ce_cost,
        max(row.control_mean, row.control_high) > WHOLE,
    )
    return "; ".join(flag for flag, yes in zip(FLAGS, applies, strict=True) if yes)


def _corrected(rows: Sequence[CausalRow]) -> list[CausalRow]:
    """p-values corrected within each test."""
    found = list(rows)
    for test in dict.fromkeys(row.test for row in rows):
        places = [i for i, row in enumerate(rows) if row.test == test]
        corrected = holm(torch.tensor([rows[i].p_control for i in places], dtype=torch.float64))
        for i, p in zip(places, corrected.tolist(), strict=True):
            found[i] = replace(found[i], p_control_holm=p)
    return found
