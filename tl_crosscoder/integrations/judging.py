"""Judging a run: `prepare` what will be asked, `plan_text` what it costs, `judge_run` all of it.

One pass of the models over the run's held-out text finds where the latents are active. Answers are
kept beside the run in `judge_cache.sqlite`, and the results, `Judged` and `JudgedChanges`, in
`judged.json` and `judged_changes.json`. Limits: a name of a latent is scored on the text that the
run holds out, whatever else the latent responds to; a name of a change is not scored.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

import torch

from tl_crosscoder.analysis.firing import find_active
from tl_crosscoder.analysis.lens import logit_effect
from tl_crosscoder.analysis.resampling import Interval
from tl_crosscoder.files import CHANGES_NAME, JUDGED_CHANGES_NAME, JUDGED_NAME
from tl_crosscoder.integrations.config import JudgeConfig
from tl_crosscoder.integrations.judge_client import AnswerCache, Judge, Messages, check_can_ask
from tl_crosscoder.integrations.naming import (
    Detection,
    Name,
    Window,
    WindowSampler,
    batches,
    change_prompt,
    detection,
    detection_prompt,
    naming_examples,
    naming_prompt,
    read_name,
)
from tl_crosscoder.interventions.changes_result import Change, Changes
from tl_crosscoder.results.render import wrapped
from tl_crosscoder.results.tables import TableOfRows
from tl_crosscoder.run.attribution import ranking_at_hand
from tl_crosscoder.run.run import Run

CACHE_NAME = "judge_cache.sqlite"
CHARACTERS_A_TOKEN = 4
"""For an estimate of tokens: about what English has in today's tokenizers."""
_UNKNOWN = Detection(Interval(value=math.nan, low=math.nan, high=math.nan), n_read=0)
_NOT_YET = Name(name="", explanation="x" * 200)
"""Stands for explanations that are not known, and is about as long as they are."""


@dataclass(frozen=True, kw_only=True)
class JudgedLatent:
    """A latent, what it is called, and how well that tells where it is active.

    What is not scored (no name, no windows, no control) is NaN.
    """

    latent: int
    name: str
    """Empty where the judge gave none that could be read."""
    explanation: str
    detection: float
    """Balanced accuracy on held-out windows; 0.5 is chance."""
    detection_low: float
    """Lower end of its 95 % interval."""
    detection_high: float
    control: float
    """Balanced accuracy on these windows by the explanation of latent `control_of`."""
    control_of: int | None
    n_active: int
    """Windows with the latent."""
    n_inactive: int
    """Windows without it."""
    n_read: int
    """Windows with an answer that could be read."""
    n_read_control: int


@dataclass(frozen=True, kw_only=True)
class Judged(TableOfRows):
    """Names, explanations and scores of latents, in the order in which they were judged."""

    ROW: ClassVar[type] = JudgedLatent
    rows: tuple[JudgedLatent, ...]
    model: str
    """The judge, as its endpoint names it."""
    seed: int
    n_hard: int
    """Windows without the latent in which another judged one was active."""

    def mean(self, measure: Callable[[JudgedLatent], float]) -> float:
        """Mean of a score over the latents that have it; NaN where none has."""
        known = [v for v in map(measure, self.rows) if not math.isnan(v)]
        return fmean(known) if known else math.nan


@dataclass(frozen=True, kw_only=True)
class JudgedChange:
    """A change and what it is called; empty where the judge gave no name that could be read."""

    place: int
    latents: tuple[int, ...]
    """Those of the change, by which it is known again."""
    name: str
    explanation: str


@dataclass(frozen=True, kw_only=True)
class JudgedChanges(TableOfRows):
    """Names of changes, in their order."""

    ROW: ClassVar[type] = JudgedChange
    rows: tuple[JudgedChange, ...]
    model: str
    """The judge, as its endpoint names it."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One latent: how its name is asked for, and what it is scored on."""

    latent: int
    naming: Messages | None
    """None where it has no example in the contexts that names are made from."""
    windows: tuple[Window, ...]


def prepare(run: Run, config: JudgeConfig, *, show_progress: bool = False) -> tuple[Case, ...]:
    """Choose latents, examples and windows; the models run, no judge does.

    Raises:
        ValueError: a latent out of range, examples of another text, or no latent with examples.
        FileNotFoundError: the run has no measures or no examples.
    """
    chosen = config.latents or ranking_at_hand(run, n=config.n).latents
    # Each once: a latent that is named twice is asked about once.
    chosen = [*dict.fromkeys(chosen)]
    source, text = run.measured()
    active = find_active(source, run.crosscoder, text, latents=chosen, show_progress=show_progress)
    promoted = _promoted(run, chosen, config.n_promoted)
    sampler = WindowSampler(active, text, source.tokenizer, config=config)
    cases = []
    with run.examples(of=text) as database:
        for j in chosen:
            how = {"n_top": config.n_top, "n_quantile": config.n_quantile}
            shown = naming_examples(database, j, **how)
            top = active.of(j)[1].max().item() if shown else 0.0
            naming = naming_prompt(shown, max_code=top, promoted=promoted[j]) if shown else None
            windows = sampler.draw(j, others=chosen, seen={"".join(e.tokens) for e in shown})
            cases.append(Case(latent=j, naming=naming, windows=tuple(windows)))
    if all(case.naming is None for case in cases):
        raise ValueError(
            f"latents {chosen} have no examples to name them by: they are not active on the "
            "run's held-out text. Choose others with --latents."
        )
    return tuple(cases)


def _promoted(run: Run, latents: Sequence[int], n: int) -> dict[int, list[str]]:
    """Tokens that latents promote most in the fine-tuned model, or for a diff-SAE by what they add.

    Of the directions that `logit_effect` knows, `difference` comes last and the fine-tuned site
    before it, where there is one.
    """
    found: dict[int, list[str]] = {j: [] for j in latents}
    if n == 0:
        return found
    try:
        rows = logit_effect(run.models, run.crosscoder, latents, n=n).rows
    except ValueError as error:
        raise ValueError(
            f"the tokens that latents promote are not known of these sites: {error} Name latents "
            "without them: --n-promoted 0, JudgeConfig(n_promoted=0)."
        ) from error
    names = list(dict.fromkeys(row.direction for row in rows))
    direction = names[-2] if len(names) > 1 else names[0]
    for row in rows:
        if row.is_promoted and row.direction == direction:
            found[row.latent].append(row.token)
    return found


def judge_run(run: Run, config: JudgeConfig, *, show_progress: bool = False) -> Judged:
    """Prepare and ask; the result is saved in the run's folder and returned.

    Raises: as `prepare` and `Judge.ask` do.
    """
    path = run.path / CACHE_NAME
    if not path.is_file():
        check_can_ask()  # something will be asked: before long work
    cases = prepare(run, config, show_progress=show_progress)
    changes = changes_to_name(run, config)
    with AnswerCache(path) as cache:
        judge = Judge(config, cache)
        if changes:
            judge_changes(changes, judge).save(run.path / JUDGED_CHANGES_NAME)
        result = judge_cases(cases, judge, show_progress=show_progress)
    result.save(run.path / JUDGED_NAME)
    return result


def changes_to_name(run: Run, config: JudgeConfig) -> tuple[Change, ...]:
    """The changes of the folder that have texts; none where none are to be named."""
    path = run.path / CHANGES_NAME
    if not config.changes or not path.is_file():
        return ()
    return tuple(change for change in Changes.load(path).found if change.passages)


def judge_changes(changes: Sequence[Change], judge: Judge) -> JudgedChanges:
    """Ask for a name of each change. Raises as `Judge.ask` does."""
    names = map(read_name, judge.ask([change_prompt(change) for change in changes]))
    rows = (
        JudgedChange(
            place=change.place,
            latents=change.latents,
            name=name.name if name else "",
            explanation=name.explanation if name else "",
        )
        for change, name in zip(changes, names, strict=True)
    )
    return JudgedChanges(rows=tuple(rows), model=judge.config.model)


def judge_cases(cases: Sequence[Case], judge: Judge, *, show_progress: bool = False) -> Judged:
    """Ask for names, then score them.

    Raises: as `Judge.ask` does; what has been answered is kept.
    """
    config, prompts = judge.config, _naming(cases)
    answers = judge.ask([*prompts.values()], description="Naming" if show_progress else None)
    names = _read(dict(zip(prompts, answers, strict=True)))
    questions = _questions(cases, names, config)
    # All at once, so that the bar is one.
    flat = [p for each in questions.values() for p in each]
    answered = iter(judge.ask(flat, description="Scoring" if show_progress else None))
    windows = {case.latent: case.windows for case in cases}
    how = {"n_per_request": config.n_per_request, "seed": config.seed}
    scores = {
        (latent, of): detection(windows[latent], [next(answered) for _ in asked], **how)
        for (latent, of), asked in questions.items()
    }
    controls = _controls(names, config)
    return Judged(
        rows=tuple(_row(case, names, scores, controls.get(case.latent)) for case in cases),
        model=config.model,
        seed=config.seed,
        n_hard=config.n_hard,
    )


def _naming(cases: Sequence[Case]) -> dict[int, Messages]:
    return {case.latent: case.naming for case in cases if case.naming is not None}


def _read(answers: Mapping[int, str]) -> dict[int, Name]:
    """Names by latent, where they can be read."""
    read = {latent: read_name(answer) for latent, answer in answers.items()}
    return {latent: name for latent, name in read.items() if name is not None}


def _questions(
    cases: Sequence[Case], names: Mapping[int, Name], config: JudgeConfig
) -> dict[tuple[int, int], list[Messages]]:
    """Requests about each latent's windows, by the latent and by whose explanation is shown."""
    controls = _controls(names, config)
    return {
        (case.latent, of): [
            detection_prompt(names[of].explanation, batch)
            for batch in batches(case.windows, config.n_per_request)
        ]
        for case in cases
        for of in (case.latent, controls.get(case.latent))
        if case.latent in names and of is not None
    }


def _controls(names: Mapping[int, Name], config: JudgeConfig) -> dict[int, int]:
    """Latent whose explanation is a control for each latent: the next in random order."""
    if not config.control or len(names) < 2:
        return {}
    known = sorted(names)
    generator = torch.Generator().manual_seed(config.seed)
    order = [known[i] for i in torch.randperm(len(known), generator=generator).tolist()]
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def _row(
    case: Case,
    names: Mapping[int, Name],
    scores: Mapping[tuple[int, int], Detection],
    control_of: int | None,
) -> JudgedLatent:
    own = scores.get((case.latent, case.latent), _UNKNOWN)
    control = _UNKNOWN if control_of is None else scores[case.latent, control_of]
    name = names.get(case.latent, Name(name="", explanation=""))
    n_active = sum(w.is_active for w in case.windows)
    return JudgedLatent(
        latent=case.latent,
        name=name.name,
        explanation=name.explanation,
        detection=own.balanced_accuracy.value,
        detection_low=own.balanced_accuracy.low,
        detection_high=own.balanced_accuracy.high,
        control=control.balanced_accuracy.value,
        control_of=control_of,
        n_active=n_active,
        n_inactive=len(case.windows) - n_active,
        n_read=own.n_read,
        n_read_control=control.n_read,
    )


def plan_text(cases: Sequence[Case], judge: Judge, changes: Sequence[Change] = ()) -> str:
    """How many requests `judge_run` would send, how large, and one of each kind in full."""
    prompts = _naming(cases)
    answers = {latent: judge.known(prompt) for latent, prompt in prompts.items()}
    known = {latent: answer for latent, answer in answers.items() if answer is not None}
    is_known = len(known) == len(prompts)
    names = _read(known) if is_known else dict.fromkeys(prompts, _NOT_YET)
    asked = [p for each in _questions(cases, names, judge.config).values() for p in each]
    of_changes = [change_prompt(change) for change in changes]
    every = [*of_changes, *prompts.values(), *asked]
    new = [p for p in every if judge.known(p) is None]
    n_tokens = sum(len(m["content"]) for p in new for m in p) // CHARACTERS_A_TOKEN
    parts = [
        f"{len(every):,} requests to {judge.config.model}; {len(every) - len(new):,} are answered "
        f"already, {len(new):,} would be sent, with about {n_tokens:,} tokens in.",
    ]
    for what, one in (
        ("for a name of a change", of_changes[:1]),
        ("for a name", [*prompts.values()][:1]),
        ("about windows", asked[:1]),
    ):
        text = ["\n".join(f"[{m['role']}]\n{m['content']}" for m in messages) for messages in one]
        parts += [f"A request {what}:\n\n{each}" for each in text]
    return "\n\n".join([*parts, "Nothing was sent. Add --send to send it."])


def judged_text(result: Judged, changes: JudgedChanges | None = None) -> str:
    """Names of changes, the scores as a table, the explanations in full, and the means."""
    called = (
        wrapped(f"change {row.place} {row.name}: {row.explanation or 'no name that could be read'}")
        for row in (changes.rows if changes else ())
    )
    own, control = result.mean(lambda r: r.detection), result.mean(lambda r: r.control)
    explanations = (
        wrapped(f"latent {r.latent} {r.name}: {r.explanation or 'no name that could be read'}")
        for r in result.rows
    )
    means = f"Mean detection {own:.2f}; by the explanation of another latent {control:.2f}."
    return "\n".join([*called, f"{result}\n", *explanations, f"\n{means}"])
