"""What a method's first directions or latents cause: the same tests for every method.

    necessity   ablated in the fine-tuned model: share of a planted behaviour that goes
    insert      inserted into the base: share of it that comes
    cost        KL to the unedited model on neutral text, nats a token
    spill       points of probability by which the ablation lowers true answers to other questions

A behaviour is *covered* where the first `n_named` of a ranking, chosen without labels, remove at
least `MIN_SHARE` of it, more than 95 % of its controls, with an interval above 0, in a model that
still works. Controls are run where the first conditions hold, since each is a pass of the model. On
predictions the same edits give the nats a token that they explain: on a null pair
these are a method's false discoveries, and the bar for the others. Limit: behaviours whose answers
are a closed set.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_crosscoder.analysis.latents import LatentMeasures
from tl_crosscoder.benchmark.methods import Rows
from tl_crosscoder.config.benchmark import BenchmarkConfig
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.behaviour import Behaviour, Effect, Predictions
from tl_crosscoder.interventions.causal import TrialMaker, checked
from tl_crosscoder.interventions.causal_rows import CausalRow
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.controls import (
    ControlSettings,
    gaussian_factors,
    gaussian_rows,
    of_same_norm,
)
from tl_crosscoder.interventions.costs import OffTarget
from tl_crosscoder.interventions.curves import TESTS, exchanged
from tl_crosscoder.interventions.edits import unchanged
from tl_crosscoder.interventions.running import predicted
from tl_crosscoder.interventions.trials import Trial, run_trials
from tl_crosscoder.run.attribution import spread

MIN_SHARE = 0.1
"""Share of a behaviour that has to go for it to be covered. Controls of 2 % are beaten by 3 %,
which is no explanation of anything."""
MIN_DIFFERENCE = 0.05
"""Change of a behaviour's probability below which there is hardly anything to find: a neutral
fine-tune moves some by a point, of which the first latents of a null pair removed a twentieth, more
than controls."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Tests:
    """What all methods on one pair are tested on."""

    planted: Sequence[Behaviour]
    others: Sequence[Behaviour]
    """Behaviours that the fine-tune should have left alone."""
    predictions: Predictions
    neutral: TokenizedText
    config: BenchmarkConfig

    @property
    def settings(self) -> ControlSettings:
        """Of the controls."""
        c = self.config
        kinds = ("covariance", "matched") if c.n_matched else ("covariance",)
        return ControlSettings(controls=kinds, n_random=c.n_random, n_matched=c.n_matched)


def latent_rows(
    ctx: InterventionContext,
    tests: Tests,
    *,
    latents: LatentMeasures,
    rankings: Mapping[str, Sequence[int]],
) -> Iterator[dict[str, Any]]:
    """Rows of a dictionary, a ranking, effect, test and number each."""
    maker = TrialMaker(
        ctx=ctx,
        latents=latents,
        settings=tests.settings,
        null=None,
        factors=gaussian_factors(ctx, tests.neutral, tests.settings.controls),
    )

    def make(name: str, test: str, n: int, has_controls: bool) -> Trial:
        ids = checked(ctx, rankings[name][:n], latents, name)
        return maker.trial(test, name, ids, has_controls=has_controls)

    yield from _rows(ctx, tests, {name: len(ids) for name, ids in rankings.items()}, make)


def direction_rows(ctx: InterventionContext, tests: Tests, rows: Rows) -> Iterator[dict[str, Any]]:
    """Rows of a method without a dictionary; its ranking is called `directions`."""
    factors = gaussian_factors(ctx, tests.neutral, ("covariance",))

    def make(name: str, test: str, n: int, has_controls: bool) -> Trial:
        stream = ctx.finetuned if test == "necessity" else ctx.base
        own, controls = exchanged(ctx, rows[:n], test=test), {}
        if has_controls:
            drawn = gaussian_rows(rows[:n], n=tests.config.n_random, seed=0, factors=factors)
            controls = of_same_norm(
                own, drawn, stream=stream, make=lambda r: exchanged(ctx, r, test=test)
            )
        return Trial(test=test, name=name, n_latents=n, own=own, controls=controls)

    yield from _rows(ctx, tests, {"directions": len(rows)}, make)


def _rows(
    ctx: InterventionContext,
    tests: Tests,
    lengths: Mapping[str, int],
    make: Callable[[str, str, int, bool], Trial],
) -> Iterator[dict[str, Any]]:
    """Every ranking ablated at every number, inserted at the one that coverage is about."""
    named, costs = tests.config.n_named, OffTarget(ctx=ctx, text=tests.neutral)
    trials = [
        make(name, test, n, False)
        for name, length in lengths.items()
        for test in TESTS
        for n in tests.config.sizes
        if n <= length and (test == "necessity" or n == named)
    ]
    if not trials:
        return
    spill = _spills(ctx, tests, [t for t in trials if t.test == "necessity"])
    n_predicted = int(predicted(tests.predictions.places, tests.predictions.text).sum())
    for effect in (tests.predictions, *tests.planted):
        found = run_trials(ctx, effect, costs, trials=trials, settings=tests.settings)
        controlled: dict[tuple[str, str, int], CausalRow] = {}
        if tested := _tested(found.rows, tests):
            again = [make(row.latents, row.test, row.n_latents, True) for row in tested]
            result = run_trials(ctx, effect, costs, trials=again, settings=tests.settings)
            controlled = {_key(row): row for row in result.rows}
        for row in found.rows:
            yield _row(controlled.get(_key(row), row), effect, spill, n_predicted)


def _key(row: CausalRow) -> tuple[str, str, int]:
    return row.latents, row.test, row.n_latents


def _tested(rows: Sequence[CausalRow], tests: Tests) -> Sequence[CausalRow]:
    """Rows that would count if they beat their controls."""
    return [
        row
        for row in rows
        if (row.test, row.n_latents) == ("necessity", tests.config.n_named)
        and row.share >= MIN_SHARE
        and row.share_low > 0
        and not row.flag
    ]


def _row(
    row: CausalRow, effect: Effect, spill: Mapping[tuple[str, int], float], n_predicted: int
) -> dict[str, Any]:
    is_kl = isinstance(effect, Predictions)
    change = abs(row.finetuned - row.base)
    columns = {
        "ranking": row.latents,
        "effect": "predictions" if is_kl else effect.name,
        "test": row.test,
        "n": row.n_latents,
        "base": row.base,
        "finetuned": row.finetuned,
        "share": row.share,
        "low": row.share_low,
        "high": row.share_high,
        "ceiling": row.ceiling,
        "of_reachable": row.of_reachable,
        "control": row.control_high,
        "p": row.p_control,
        "cost": row.off_target_kl,
        "flag": row.flag,
    }
    if is_kl:
        columns["nats"] = row.share * change * effect.n_prompts / n_predicted
    if row.test == "necessity":
        columns["spill"] = spill[row.latents, row.n_latents]
        is_large = is_kl or change >= MIN_DIFFERENCE
        columns["is_clear"] = bool(row.strongest) and is_large and not row.doubt()
    return columns


def _spills(
    ctx: InterventionContext, tests: Tests, trials: Sequence[Trial]
) -> dict[tuple[str, int], float]:
    """Probability of true answers that each ablation takes away."""
    edits = [unchanged(ctx.finetuned), *(trial.own for trial in trials)]
    means = [b.scores(ctx, edits, toward=ctx.base).mean(dim=1) for b in tests.others]
    if not means:
        return {(t.name, t.n_latents): math.nan for t in trials}
    mean = sum(means[1:], start=means[0]) / len(means)
    lost = (mean[0] - mean[1:]).tolist()
    return {(t.name, t.n_latents): x for t, x in zip(trials, lost, strict=True)}


def some_questions(path: Path, tokenizer: Any, *, n: int) -> Behaviour:
    """A behaviour of a file, with questions spread over it, at most `n`."""
    whole = Behaviour.from_file(path, tokenizer)
    return Behaviour.of(whole.name, spread(whole.questions, n), tokenizer)
