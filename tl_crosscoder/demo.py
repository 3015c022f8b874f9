"""The demo: diff an embedded pair and say which of the planted behaviours its latents cause.

The answer is known: an organism's suite entry says what was planted. A behaviour counts as found
where the models differ in it, and ablating the latents of one change, or the first of the ranking,
which both know nothing of behaviours, removes it by more than controls do, in a model that still
works. Which of these sets is tested is chosen by the other half of the behaviour's prompts. Limit:
tiny base models; the figures show that the machinery works, not how it does on large models.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tl_crosscoder import files
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.benchmark.outcomes import MIN_DIFFERENCE
from tl_crosscoder.config.causal import CausalQuestion
from tl_crosscoder.config.presets import BatchTopK
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.interventions.behaviour import Behaviour
from tl_crosscoder.interventions.causal_rows import CausalRow
from tl_crosscoder.interventions.changes_result import Changes
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import unchanged
from tl_crosscoder.interventions.latent_edits import ablation
from tl_crosscoder.models.site import Site
from tl_crosscoder.organisms.recovery import Recovery, planted_recovery
from tl_crosscoder.organisms.suite import MAX_NORM_MULTIPLE, organism
from tl_crosscoder.report import sections
from tl_crosscoder.report.answer import answer_sections
from tl_crosscoder.results.render import as_text, wrapped
from tl_crosscoder.results.tables import without_nan
from tl_crosscoder.run.attribution import RANKING, TESTS, behaviours_of, half_of
from tl_crosscoder.run.causal import necessity_of, ranked_latents
from tl_crosscoder.run.changes import answer_run
from tl_crosscoder.run.run import Run
from tl_crosscoder.run.training import train

N_LATENTS = 10
"""First latents of the ranking, which are ablated together."""
RANKED = "ranking"
"""Name of their set."""
MAX_P = 0.05
MIN_FVE = 0.5
"""FVE of both models below which a dictionary says nothing about them."""

HARDLY = "the fine-tune hardly changes it"

QUESTION = CausalQuestion(
    n_random=19, first_round=0, n_matched=0, controls=("covariance", "shuffled")
)
"""Controls of the verdict: the two strongest kinds, as few as a p-value of 0.05 needs."""


@dataclass(frozen=True, kw_only=True)
class BehaviourVerdict:
    """Whether latents cause one planted behaviour."""

    behaviour: str
    latents: str
    """Set that is ablated: `change 1` and so on, or `ranking`; empty where nothing was tested."""
    n_latents: int
    base: float
    """Mean probability of the behaviour's completions in the base model."""
    finetuned: float
    share: float
    """Share of the change that ablating the latents removes."""
    share_low: float
    share_high: float
    control: str
    """The strongest kind of control."""
    control_high: float
    """95th percentile of its shares."""
    p_value: float
    reason: str
    """Why the share proves nothing; empty where it does."""

    @property
    def is_found(self) -> bool:
        """Whether the latents cause the behaviour, as far as this test can say."""
        return not self.reason

    @property
    def _latents(self) -> str:
        n, latents = self.n_latents, "latent" if self.n_latents == 1 else "latents"
        if self.latents == RANKED:
            return f"the first {n} {latents} of the ranking"
        return f"the {n} {latents} of {self.latents}"

    def __str__(self) -> str:
        """The sentence that the command prints."""
        if math.isnan(self.share):
            return f'NOT found: "{self.behaviour}": {self.reason}.'
        return (
            f'{"Found" if self.is_found else "NOT found"}: "{self.behaviour}", which the '
            f"fine-tune takes from {self.base:.0%} to {self.finetuned:.0%}. Ablating "
            f"{self._latents} removes {self.share:.0%} of that [{self.share_low:.0%}, "
            f"{self.share_high:.0%}]; {self.control} controls reach {self.control_high:.0%}, "
            f"p = {self.p_value:.2f}{f' ({self.reason})' if self.reason else ''}."
        )


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo measured, and how it compares with what was planted."""

    organism: str
    planted: str
    measurement: Measurement
    verdicts: tuple[BehaviourVerdict, ...]
    answer: str
    """What changed, as `tl-crosscoder changes` finds it, who knows nothing of what was planted."""
    recovery: Recovery
    sites: tuple[Site, ...]

    def __str__(self) -> str:
        """The answer, and then the tables of the dictionary."""
        n_found = sum(verdict.is_found for verdict in self.verdicts)
        r = self.recovery
        words = ", ".join(f"{word} {n}" for word, n in r.in_context.items() if n)
        return "\n".join(
            [
                wrapped(f"Planted: {self.planted}"),
                "",
                self.answer,
                "",
                wrapped(
                    f"{n_found} of {len(self.verdicts)} planted behaviours found, by latents that "
                    "were chosen on other documents:"
                ),
                *(wrapped(f"- {verdict}") for verdict in self.verdicts),
                wrapped(
                    f"Planted words in the top contexts of these {len(r.latents)} latents: "
                    f"{words or 'none'}; in {r.share_in_context:.0%} of the contexts (of random "
                    f"latents: {r.random_share_in_context:.0%})."
                ),
                "",
                sections.render(self.measurement, self.sites),
            ]
        )


EMBEDDED: dict[str, Any] = {
    "d_sae": 1024,
    "preset": BatchTopK(k=12),
    "n_tokens": 1_000_000,
    "lr": 2e-3,
}
"""The dictionary of a tiny pair: a minute and a half on two cores."""
REAL: dict[str, Any] = {
    "d_sae": 4096,
    "preset": BatchTopK(k=32),
    "n_tokens": 500_000,
    "lr": 1e-3,
    "max_norm_multiple": MAX_NORM_MULTIPLE,
}
"""The dictionary of a pair on SmolLM2-135M."""


def demo_config(name: str, *, output: str, seed: int = 0, n_tokens: int | None = None) -> RunConfig:
    """The run of the demo, as `tl-crosscoder train` would take it.

    `n_tokens` None is the number of `EMBEDDED`, or of `REAL` where the base is SmolLM2-135M.

    Raises:
        ValueError: no such organism.
    """
    entry = organism(name)
    given: dict[str, Any] = {} if n_tokens is None else {"n_tokens": n_tokens}
    return RunConfig(
        base=entry.base_name,
        adapter=entry.adapter_name,
        finetuned=entry.finetuned_name,
        hook_name=entry.hook_name,
        text=entry.text,
        output=output,
        seed=seed,
        batch_size=1024,
        **(REAL if entry.is_real else EMBEDDED) | given,
    )


def run_demo(
    name: str,
    *,
    output: str,
    seed: int = 0,
    n_tokens: int | None = None,
    resume: bool = False,
) -> DemoResult:
    """Train and measure a crosscoder on an embedded organism, and test what was planted.

    Raises:
        ValueError: no such organism, or an output folder that is in use.
    """
    config = demo_config(name, output=output, seed=seed, n_tokens=n_tokens)
    run, entry = train(config, resume=resume), organism(name)
    answer_run(run)
    measurement, (_, text) = run.measurement(), run.measured()
    ranked = ranked_latents(run, n=N_LATENTS, order="attribution")
    result = DemoResult(
        organism=name,
        planted=entry.planted,
        measurement=measurement,
        verdicts=verdicts_of(run, latent_sets(run)),
        answer=as_text(answer_sections(run.path)),
        recovery=planted_recovery(
            measurement,
            text,
            run.models.tokenizer,
            planted_words=entry.planted_words,
            latents=ranked,
        ),
        sites=run.models.sites,
    )
    found = {
        "verdicts": [*map(str, result.verdicts)],
        "behaviours": [*map(asdict, result.verdicts)],
        **asdict(result.recovery),
    }
    files.write_json(run.path / files.RECOVERY_NAME, without_nan(found))
    return result


def latent_sets(run: Run) -> dict[str, list[int]]:
    """Sets of latents that may cause a behaviour: of each change, and the first of the ranking."""
    path = run.path / files.CHANGES_NAME
    changes = Changes.load(path).found if path.is_file() else ()
    sets = {f"change {change.place}": [*change.latents] for change in changes}
    return sets | {RANKED: ranked_latents(run, n=N_LATENTS, order="attribution")}


def verdicts_of(
    run: Run,
    sets: Mapping[str, Sequence[int]],
    *,
    question: CausalQuestion | None = None,
    behaviours: Sequence[str | Path] | None = None,
) -> tuple[BehaviourVerdict, ...]:
    """Whether latents cause what was planted, for each planted behaviour.

    Args:
        run: of any pair.
        sets: of latents that are ablated together. The one that removes most of a behaviour on half
            of its prompts is tested on the other half; sets without latents cause nothing.
        question: number and kinds of controls; `QUESTION` by default.
        behaviours: JSONL files of questions; None are those of the run's embedded organism.
    """
    named = None if behaviours is None else [*map(str, behaviours)]
    fve = run.measurement().reconstruction.fve
    explains = all(value >= MIN_FVE for value in fve.values())
    sets = {name: [*latents] for name, latents in sets.items() if latents}
    return tuple(
        _verdict(run, b, sets, question or QUESTION, explains) for b in behaviours_of(run, named)
    )


def _verdict(
    run: Run,
    behaviour: Behaviour,
    sets: dict[str, list[int]],
    question: CausalQuestion,
    explains: bool,
) -> BehaviourVerdict:
    if not sets:
        return _not_tested(behaviour, "no latent carries anything")
    best = _removes_most(run, half_of(behaviour, run, RANKING), sets)
    tested = necessity_of(run, half_of(behaviour, run, TESTS), question, sets={best: sets[best]})
    if not tested.rows:
        return _not_tested(behaviour, tested.note.rstrip("."))
    (row,) = tested.rows
    return BehaviourVerdict(
        behaviour=behaviour.name,
        latents=best,
        n_latents=row.n_latents,
        base=row.base,
        finetuned=row.finetuned,
        share=row.share,
        share_low=row.share_low,
        share_high=row.share_high,
        control=row.strongest,
        control_high=row.control_high,
        p_value=row.p_control,
        reason=_reason(row, explains),
    )


def _removes_most(run: Run, behaviour: Behaviour, sets: dict[str, list[int]]) -> str:
    """Name of the set whose ablation leads nearest to the base model."""
    ctx = InterventionContext.of(run.models, run.crosscoder)
    edits = [unchanged(ctx.base), *(ablation(ctx, latents) for latents in sets.values())]
    base, *ablated = behaviour.scores(ctx, edits).mean(dim=1).tolist()
    return min(zip(sets, ablated, strict=True), key=lambda each: abs(each[1] - base))[0]


def _not_tested(behaviour: Behaviour, reason: str) -> BehaviourVerdict:
    unknown = ("base", "finetuned", "share", "share_low", "share_high", "control_high", "p_value")
    return BehaviourVerdict(
        behaviour=behaviour.name,
        latents="",
        n_latents=0,
        control="",
        reason=reason,
        **dict.fromkeys(unknown, math.nan),
    )


def _reason(row: CausalRow, explains: bool) -> str:
    if not explains:
        return f"the dictionary explains less than {MIN_FVE:.0%} of a model's variance"
    if doubt := row.doubt(max_p=MAX_P):
        return doubt
    return HARDLY if abs(row.finetuned - row.base) < MIN_DIFFERENCE else ""
