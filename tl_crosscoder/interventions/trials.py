"""Trials: edits that should remove or induce a behaviour, against random ones, with their cost.

Effects are along the behaviour's change from base to fine-tuned model, as a share of it. Contract:
intervals are bootstraps over prompts, p-values one-sided among controls, corrected for the number
of trials of a test (Holm); the off-target cost is KL on neutral text (methods, section 4). A trial
may be of latents or of a method without a dictionary. Limit: a p-value is at least
1 / (1 + controls).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.activations.text import TokenizedText
from tl_crosscoder.interventions.behaviour import Behaviour, behaviour_scores
from tl_crosscoder.interventions.edits import Edit, Places
from tl_crosscoder.interventions.running import EditScores, score_edits, unchanged
from tl_crosscoder.interventions.subject import Subject
from tl_crosscoder.resampling import (
    N_DRAWS,
    Interval,
    bootstrap_weights,
    effect_size,
    holm,
    interval,
    p_value,
    ratio_interval,
)
from tl_crosscoder.tables import TableOfRows

N_RANDOM = 100
N_MATCHED = 20
N_COST = 10
"""Random directions whose off-target cost is averaged."""
ALPHAS = (0.5, 1.0, 2.0)
"""Strengths of steering, in units of the mean norm of the stream."""
TESTS = ("necessity", "insert", "steer")


@dataclass(frozen=True, kw_only=True)
class CausalRow:
    """One set of latents in one test; `share` is of the change from base to fine-tuned model."""

    test: str
    """`necessity`, `insert` or `steer`; the last two are sufficiency."""
    latents: str
    """Name of the set."""
    n_latents: int
    strength: float
    """alpha of steering, the best of those tried; else NaN."""
    behaviour: float
    """Mean probability of the behaviour under the edit."""
    share: float
    """How much of the change goes (necessity) or comes (sufficiency)."""
    share_low: float
    share_high: float
    random_mean: float
    """Mean share of random directions."""
    random_high: float
    """95th percentile of them."""
    effect_size: float
    """Standard deviations of the random directions above their mean."""
    p_random: float
    """Random directions that do as much."""
    p_random_holm: float
    """The same, corrected for the number of sets in this test."""
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
    name: str
    """Of the behaviour."""
    n_prompts: int
    base: float
    """Mean probability of the behaviour in the base model."""
    finetuned: float
    n_random: int
    n_matched: int
    sets: dict[str, list[int]]
    """The latents of each set."""


@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """How many controls, and of what kind."""

    n_random: int = N_RANDOM
    """Random directions, of which the field asks for 100 at least."""
    n_matched: int = N_MATCHED
    """Random sets of latents of the same firing rate."""
    alphas: tuple[float, ...] = ALPHAS
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
    """One method in one test: its own edits (one a strength) and those of its controls."""

    test: str
    """`necessity` edits the fine-tuned model, `insert` and `steer` the base."""
    name: str
    own: Sequence[Edit]
    random: Sequence[Edit]
    """As many for each strength, strengths outermost."""
    matched: Sequence[Edit] = ()
    null: Sequence[Edit] = ()
    n_latents: int = 0
    """0 where the method has no latents."""

    @property
    def edits(self) -> list[Edit]:
        """All of them."""
        return [*self.own, *self.random, *self.matched, *self.null]


def run_trials(
    subject: Subject,
    behaviour: Behaviour,
    neutral: TokenizedText,
    *,
    trials: Sequence[Trial],
    settings: ControlSettings | None = None,
    show_progress: bool = False,
) -> CausalTest:
    """The same for edits of any kind, so that one table holds methods with and without latents.

    Raises:
        ValueError: no trials, or models that do not differ in the behaviour.
    """
    settings = settings or ControlSettings()
    if not trials:
        raise ValueError("there is nothing to test: give one trial or more.")
    plain = [unchanged(subject.base), unchanged(subject.finetuned)]
    description = "Behaviour" if show_progress else None
    scores = behaviour_scores(subject, behaviour, plain)
    if (scores[1].mean() - scores[0].mean()).abs() < 1e-3:
        raise ValueError(
            f"base and fine-tuned model do not differ in {behaviour.name!r} "
            f"({scores[0].mean():.2g} and {scores[1].mean():.2g}): there is nothing to cause."
        )
    edits = [edit for trial in trials for edit in trial.edits]
    edited = behaviour_scores(subject, behaviour, edits, description=description)
    description = "Off-target" if show_progress else None
    weights = bootstrap_weights(scores.shape[1], n_draws=settings.n_draws, seed=settings.seed)
    rows = []
    for trial, own in zip(trials, edited.split([len(t.edits) for t in trials]), strict=True):
        shares = _shares(trial, own, scores, weights)
        cost = _costs(subject, neutral, trial, best=shares.best, description=description)
        rows.append(_row(trial, shares, cost, settings))
    return CausalTest(
        rows=tuple(_corrected(rows)),
        name=behaviour.name,
        n_prompts=behaviour.n_prompts,
        base=scores[0].mean().item(),
        finetuned=scores[1].mean().item(),
        n_random=settings.n_random,
        n_matched=settings.n_matched,
        sets={},
    )


def _costs(
    subject: Subject, neutral: TokenizedText, trial: Trial, *, best: int, description: str | None
) -> EditScores:
    """KL to the unedited model on neutral text, of the set and of ten of its random directions."""
    n = len(trial.random) // len(trial.own)
    chosen = [trial.own[best], *trial.random[best * n : (best + 1) * n][:N_COST]]
    return score_edits(
        subject,
        neutral,
        chosen,
        reference=unchanged(chosen[0].site),
        kinds={"all": Places()},
        description=description,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Shares:
    """Effects as shares of the behaviour's change."""

    best: int
    """Which of the set's own edits does most."""
    behaviour: float
    share: Interval
    random: Float[Tensor, " n_random"]
    matched: Float[Tensor, " n_matched"]
    null: Float[Tensor, " n_null"]


def _shares(
    trial: Trial,
    scores: Float[Tensor, "n_edits n_prompts"],
    plain: Float[Tensor, "2 n_prompts"],
    weights: Float[Tensor, "n_draws n_prompts"],
) -> _Shares:
    gap = plain[1] - plain[0]
    start, sign = (plain[1], -1.0) if trial.test == "necessity" else (plain[0], 1.0)
    effects = sign * (scores - start)
    shares = effects.mean(dim=1) / gap.mean()
    n_own = len(trial.own)
    own, random, matched, null = shares.split(
        [n_own, len(trial.random), len(trial.matched), len(trial.null)]
    )
    best = int(own.argmax())
    return _Shares(
        best=best,
        behaviour=scores[best].mean().item(),
        share=interval(own[best].item(), (weights @ effects[best]) / (weights @ gap)),
        # Controls choose their best strength too.
        random=random.view(n_own, -1).amax(dim=0),
        matched=matched,
        null=null.view(n_own, -1).amax(dim=0) if len(null) else null,
    )


def _row(trial: Trial, shares: _Shares, cost: EditScores, settings: ControlSettings) -> CausalRow:
    counts = cost.counts[0]
    weights = bootstrap_weights(len(counts), n_draws=settings.n_draws, seed=settings.seed)
    nats = ratio_interval(cost.kl[0, 0], counts, weights=weights)
    random_nats = cost.kl[1:, 0].sum(dim=1) / counts.sum()
    own = shares.share
    return CausalRow(
        test=trial.test,
        latents=trial.name,
        n_latents=trial.n_latents,
        strength=settings.alphas[shares.best] if trial.test == "steer" else math.nan,
        behaviour=shares.behaviour,
        share=own.value,
        share_low=own.low,
        share_high=own.high,
        random_mean=shares.random.mean().item(),
        random_high=shares.random.quantile(0.95).item(),
        effect_size=effect_size(own.value, shares.random),
        p_random=p_value(own.value, shares.random),
        p_random_holm=math.nan,
        matched_mean=shares.matched.mean().item(),
        p_matched=p_value(own.value, shares.matched) if len(shares.matched) else math.nan,
        null_mean=shares.null.mean().item(),
        off_target_kl=nats.value,
        off_target_low=nats.low,
        off_target_high=nats.high,
        random_off_target_kl=random_nats.mean().item(),
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
