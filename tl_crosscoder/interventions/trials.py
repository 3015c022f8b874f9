"""Trials: edits that should remove or induce a behaviour, against random ones, with their cost.

Effects are along the behaviour's change from base to fine-tuned model, as a share of it. Contract:
intervals are bootstraps over prompts, p-values one-sided among controls, corrected for the number
of trials of a test (Holm); the off-target cost is KL on neutral text. A trial may be of latents or
of a method without a dictionary. Limit: a p-value is at least 1 / (1 + controls).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.analysis.resampling import (
    N_DRAWS,
    bootstrap_weights,
    effect_size,
    holm,
    interval,
    p_value,
    ratio_interval,
)
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.behaviour import Effect
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import Edit, TokenFilter, unchanged
from tl_crosscoder.interventions.running import EditScores, score_edits
from tl_crosscoder.results.tables import TableOfRows


@dataclass(frozen=True, kw_only=True)
class CausalRow:
    """One set of latents in one test; `share` is of the change from base to fine-tuned model."""

    test: str
    """`necessity`, `insert` or `steer`; the last two are sufficiency."""
    latents: str
    """Name of the set."""
    n_latents: int
    strength: float
    """alpha of steering, else NaN."""
    value: float
    """Mean of the effect over prompts under the edit, such as the probability of a behaviour."""
    base: float
    """Mean of the effect in the base model as it is."""
    finetuned: float
    """Mean of the effect in the fine-tuned model as it is."""
    share: float
    """Share of the change that is removed (necessity) or induced (sufficiency)."""
    share_low: float
    share_high: float
    random_mean: float
    """Mean share of random directions."""
    random_high: float
    """95th percentile of the random directions."""
    effect_size: float
    """Standard deviations of the random directions above their mean."""
    p_random: float
    """p-value among random directions."""
    p_random_holm: float
    """`p_random`, corrected for the number of sets in this test."""
    matched_mean: float
    """Mean share of random latents of the same firing rate; NaN of steering."""
    p_matched: float
    null_mean: float
    """Mean share of directions of a null pair's dictionary; NaN without one."""
    off_target_kl: float
    """KL to the unedited model on neutral text, nats a token."""
    off_target_low: float
    off_target_high: float
    random_off_target_kl: float
    """Mean of the random directions."""


@dataclass(frozen=True, kw_only=True)
class CausalTest(TableOfRows):
    """Every set in every test, and what the models do unedited."""

    ROW: ClassVar[type] = CausalRow
    rows: tuple[CausalRow, ...]
    effect: str
    """What was measured."""
    unit: str
    """What its values are."""
    n_prompts: int
    n_random: int
    n_matched: int
    sets: dict[str, list[int]]
    """The latents of each set."""


MIN_CHANGE = 1e-3
"""Smallest change from base to fine-tuned model that shares can be taken of."""
N_COST = 10
"""Random directions whose off-target cost is averaged."""
TESTS = ("necessity", "insert", "steer")


@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """How many controls, and of what kind."""

    n_random: int = 100
    """Random directions, of which the field asks for 100 at least."""
    n_matched: int = 10
    """Random sets of latents of the same firing rate."""
    alphas: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Strengths of steering, in units of the mean norm of the activation."""
    n_draws: int = N_DRAWS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_random < 1 or self.n_matched < 0 or not self.alphas:
            raise ValueError(
                f"n_random={self.n_random}, n_matched={self.n_matched} and alphas={self.alphas}: "
                "give one random direction or more, and one strength or more."
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Trial:
    """One method in one test: its own edit and those of its controls."""

    test: str
    """`necessity` edits the fine-tuned model, `insert` and `steer` the base."""
    name: str
    own: Edit
    random: Sequence[Edit]
    matched: Sequence[Edit] = ()
    null: Sequence[Edit] = ()
    n_latents: int = 0
    """0 where the method has no latents."""
    strength: float = math.nan
    """alpha of steering."""

    @property
    def edits(self) -> list[Edit]:
        """All of them."""
        return [self.own, *self.random, *self.matched, *self.null]


def run_trials(
    ctx: InterventionContext,
    effect: Effect,
    neutral: TokenizedText,
    *,
    trials: Sequence[Trial],
    settings: ControlSettings | None = None,
    show_progress: bool = False,
) -> CausalTest:
    """Test edits of any kind, so that one table holds methods with and without latents.

    Args:
        ctx: models and dictionary.
        effect: a behaviour, or predictions.
        neutral: text that has nothing to do with it, for the off-target cost.
        trials: what is tested, with its controls.
        settings: of the resampling.
        show_progress: with a progress bar.

    Raises:
        ValueError: no trials, or models that do not differ in the effect.
    """
    settings = settings or ControlSettings()
    if not trials:
        raise ValueError("there is nothing to test: give one trial or more.")
    rows = []
    for is_necessity in (True, False):
        if own := [t for t in trials if (t.test == "necessity") == is_necessity]:
            toward = ctx.base if is_necessity else ctx.finetuned
            plain, *scores = _scores(ctx, effect, own, toward=toward, show_progress=show_progress)
            rows += [
                _row(trial, found, plain, _costs(ctx, neutral, trial), settings)
                for trial, found in zip(own, scores, strict=True)
            ]
    return CausalTest(
        rows=tuple(_corrected(rows)),
        effect=effect.name,
        unit=effect.unit,
        n_prompts=effect.n_prompts,
        n_random=settings.n_random,
        n_matched=settings.n_matched,
        sets={},
    )


def _scores(
    ctx: InterventionContext,
    effect: Effect,
    trials: Sequence[Trial],
    *,
    toward: int,
    show_progress: bool,
) -> list[Float[Tensor, "n_edits n_prompts"]]:
    """Effect in the base and the fine-tuned model as they are, then in each trial."""
    plain = effect.scores(ctx, [unchanged(ctx.base), unchanged(ctx.finetuned)], toward=toward)
    base, finetuned = plain.mean(dim=1).tolist()
    if abs(finetuned - base) < MIN_CHANGE:
        raise ValueError(
            f"base and fine-tuned model do not differ in {effect.name!r} ({base:.2g} and "
            f"{finetuned:.2g}), so there is nothing to cause. Give prompts that the fine-tune is "
            "about."
        )
    edits = [edit for trial in trials for edit in trial.edits]
    description = "Testing" if show_progress else None
    found = effect.scores(ctx, edits, toward=toward, description=description)
    return [plain, *found.split([len(t.edits) for t in trials])]


def _costs(ctx: InterventionContext, neutral: TokenizedText, trial: Trial) -> EditScores:
    """KL to the unedited model on neutral text, of the trial and of ten of its random edits."""
    chosen = [trial.own, *trial.random[:N_COST]]
    return score_edits(
        ctx, neutral, chosen, reference=unchanged(trial.own.site), kinds={"all": TokenFilter()}
    )


def _row(
    trial: Trial,
    scores: Float[Tensor, "n_edits n_prompts"],
    plain: Float[Tensor, "2 n_prompts"],
    cost: EditScores,
    settings: ControlSettings,
) -> CausalRow:
    """Effects of a trial as shares of the behaviour's change, and their off-target cost."""
    how = {"n_draws": settings.n_draws, "seed": settings.seed}
    gap = plain[1] - plain[0]
    start, sign = (plain[1], -1.0) if trial.test == "necessity" else (plain[0], 1.0)
    effects = sign * (scores - start)
    shares = effects.mean(dim=1) / gap.mean()
    sizes = [1, len(trial.random), len(trial.matched), len(trial.null)]
    (own,), random, matched, null = shares.split(sizes)
    weights = bootstrap_weights(len(gap), **how)
    share = interval(own.item(), (weights @ effects[0]) / (weights @ gap))
    counts = cost.counts[0]
    weights = bootstrap_weights(len(counts), **how)
    nats = ratio_interval(cost.kl[0, 0], counts, weights=weights)
    base, finetuned = plain.mean(dim=1).tolist()
    return CausalRow(
        test=trial.test,
        latents=trial.name,
        n_latents=trial.n_latents,
        strength=trial.strength,
        value=scores[0].mean().item(),
        base=base,
        finetuned=finetuned,
        share=share.value,
        share_low=share.low,
        share_high=share.high,
        random_mean=random.mean().item(),
        random_high=random.quantile(0.95).item(),
        effect_size=effect_size(share.value, random),
        p_random=p_value(share.value, random),
        p_random_holm=math.nan,  # known when all rows are
        matched_mean=matched.mean().item(),
        p_matched=p_value(share.value, matched) if len(matched) else math.nan,
        null_mean=null.mean().item(),
        off_target_kl=nats.value,
        off_target_low=nats.low,
        off_target_high=nats.high,
        random_off_target_kl=(cost.kl[1:, 0].sum(dim=1) / counts.sum()).mean().item(),
    )


def _corrected(rows: Sequence[CausalRow]) -> list[CausalRow]:
    """p-values corrected within each test."""
    found = list(rows)
    for test in dict.fromkeys(row.test for row in rows):
        places = [i for i, row in enumerate(rows) if row.test == test]
        corrected = holm(torch.tensor([rows[i].p_random for i in places], dtype=torch.float64))
        for i, p in zip(places, corrected.tolist(), strict=True):
            found[i] = replace(found[i], p_random_holm=p)
    return found
