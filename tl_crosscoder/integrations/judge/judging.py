"""Judging a run: `prepare` what will be asked, `plan` what it costs, `judge` it.

Contract: one pass of the models over the run's held-out text finds where the latents are active;
names come from contexts of even numbers, scores from odd ones; answers are kept beside the run in
`judge_cache.sqlite` and the result in `judged.json`. Limit: a name is scored on the text that the
run holds out, whatever else the latent responds to.

What a judge said of latents, and what it would be asked, as plain text for the terminal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tl_crosscoder.analysis.firing import find_active
from tl_crosscoder.analysis.latents import rank_latents
from tl_crosscoder.analysis.lens import logit_effect
from tl_crosscoder.analysis.resampling import Interval
from tl_crosscoder.integrations.judge.client import (
    AnswerCache,
    Endpoint,
    Judge,
    Messages,
    check_can_ask,
)
from tl_crosscoder.integrations.judge.judged import JUDGED_NAME, Judged, JudgedLatent
from tl_crosscoder.integrations.judge.naming import (
    Detection,
    Name,
    Window,
    WindowSampler,
    WindowSettings,
    batches,
    detection,
    detection_prompt,
    naming_examples,
    naming_prompt,
    read_name,
)
from tl_crosscoder.results.render import wrapped
from tl_crosscoder.run.run import Run
from tl_crosscoder.run.training import examples_of

CACHE_NAME = "judge_cache.sqlite"
CHARACTERS_A_TOKEN = 4
"""For an estimate of tokens: about what English has in today's tokenizers."""
_NO_NAME_YET = "x" * 200
"""Stands for explanations that are not known, about as long as they are."""


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """What is judged, and by what."""

    latents: tuple[int, ...] | None = None
    """None is the first `n_latents` of the ranking."""
    n_latents: int = 10
    n_top: int = 10
    """Largest examples in the request for a name."""
    n_quantile: int = 10
    """Examples of the quantiles in it."""
    n_promoted: int = 10
    """Tokens in it that the latent promotes most in the fine-tuned model; 0 leaves them out."""
    windows: WindowSettings = field(default_factory=WindowSettings)
    n_per_request: int = 5
    """Windows that are judged in one request."""
    is_controlled: bool = True
    """Judge the windows by another latent's explanation too, which doubles the requests."""

    def __post_init__(self) -> None:
        for name in ("n_latents", "n_per_request"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if (
            min(self.n_top, self.n_quantile, self.n_promoted) < 0
            or not self.n_top + self.n_quantile
        ):
            raise ValueError(
                f"n_top {self.n_top}, n_quantile {self.n_quantile} and n_promoted "
                f"{self.n_promoted} must be 0 or more, and a name needs at least one example."
            )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One latent: how its name is asked for, and what it is scored on."""

    latent: int
    naming: Messages | None
    """None where it has no example in the contexts that names are made from."""
    windows: tuple[Window, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What there is to ask."""

    n_requests: int
    n_known: int
    """Of those that can be known, answered already."""
    n_tokens: int
    """About so many to be read by the judge, of what is not answered."""
    naming: Messages
    """One request for a name, in full."""
    detection: Messages | None
    """One about windows; None where no latent has any."""


def prepare(run: Run, settings: JudgeSettings, *, show_progress: bool = False) -> tuple[Case, ...]:
    """Choose latents, examples and windows; the models run, no judge does.

    Raises:
        ValueError: a latent out of range, examples of another text, or no latent with examples.
        FileNotFoundError: the run has no measures or no examples.
    """
    # Each once: a latent that is named twice is asked about once.
    chosen = [*dict.fromkeys(settings.latents or _first_latents(run, settings.n_latents))]
    source, text = run.measured()
    active = find_active(source, run.crosscoder, text, latents=chosen, show_progress=show_progress)
    promoted = _promoted(run, chosen, settings.n_promoted)
    sampler = WindowSampler(active, text, source.tokenizer, settings.windows)
    cases = []
    with examples_of(run, text) as database:
        for j in chosen:
            shown = naming_examples(
                database, j, n_top=settings.n_top, n_quantile=settings.n_quantile
            )
            top = active.of(j)[1].max().item() if shown else 0.0
            naming = naming_prompt(shown, max_code=top, promoted=promoted[j]) if shown else None
            seen = {"".join(e.tokens) for e in shown}
            windows = sampler.draw(j, others=chosen, seen=seen)
            cases.append(Case(latent=j, naming=naming, windows=tuple(windows)))
    if all(case.naming is None for case in cases):
        raise ValueError(
            f"latents {chosen} have no examples to name them by: they are not active on the "
            "run's held-out text. Choose others with --latents."
        )
    return tuple(cases)


def plan(cases: Sequence[Case], judge: Judge, settings: JudgeSettings) -> Plan:
    """What `judge_cases` would ask, and how much of it is answered; nothing is sent."""
    naming = [case.naming for case in cases if case.naming is not None]
    names = {
        case.latent: read_name(judge.known(case.naming) or "")
        for case in cases
        if case.naming is not None
    }
    is_known = all(judge.known(p) is not None for p in naming)
    guess = Name(name="", explanation=_NO_NAME_YET)
    known = {j: name for j, name in names.items() if name is not None}
    scored = known if is_known else dict.fromkeys(names, guess)
    asked = [p for each in _questions(cases, scored, settings).values() for p in each]
    prompts = [*naming, *asked]
    n_known = sum(judge.known(p) is not None for p in prompts)
    missing = [p for p in prompts if judge.known(p) is None]
    return Plan(
        n_requests=len(prompts),
        n_known=n_known,
        n_tokens=sum(len(m["content"]) for p in missing for m in p) // CHARACTERS_A_TOKEN,
        naming=naming[0],
        detection=asked[0] if asked else None,
    )


def judge_cases(
    cases: Sequence[Case], judge: Judge, settings: JudgeSettings, *, show_progress: bool = False
) -> Judged:
    """Ask for names, then score them.

    Raises: as `Judge.ask` does; what has been answered is kept.
    """
    named = [case for case in cases if case.naming is not None]
    prompts = [case.naming for case in named if case.naming is not None]
    answers = judge.ask(prompts, description="Naming" if show_progress else None)
    read = {c.latent: read_name(a) for c, a in zip(named, answers, strict=True)}
    names = {j: name for j, name in read.items() if name is not None}
    questions = _questions(cases, names, settings)
    # All at once, so that the bar is one.
    flat = [p for each in questions.values() for p in each]
    said = iter(judge.ask(flat, description="Scoring" if show_progress else None))
    scores = {
        (case.latent, of): detection(
            case.windows,
            [next(said) for _ in questions[case.latent, of]],
            n_per_request=settings.n_per_request,
            seed=settings.windows.seed,
        )
        for case in cases
        for of in (case.latent, _control_of(case.latent, names, settings))
        if of is not None and (case.latent, of) in questions
    }
    return Judged(
        rows=tuple(_row(case, names, scores, settings) for case in cases),
        model=judge.endpoint.model,
        seed=settings.windows.seed,
        n_hard=settings.windows.n_hard,
    )


def judge_run(
    run: Run,
    endpoint: Endpoint,
    settings: JudgeSettings | None = None,
    *,
    show_progress: bool = False,
) -> Judged:
    """All of it; the result is saved in the run's folder and returned.

    Raises: as `prepare` and `Judge.ask` do.
    """
    settings = settings or JudgeSettings()
    if not cache_path(run.path).is_file():
        check_can_ask()  # something will be asked: before long work
    cases = prepare(run, settings, show_progress=show_progress)
    with AnswerCache(cache_path(run.path)) as cache:
        judge = Judge(endpoint, cache)
        result = judge_cases(cases, judge, settings, show_progress=show_progress)
    result.save(run.path / JUDGED_NAME)
    return result


def cache_path(folder: Path) -> Path:
    """Where a run's answers are kept."""
    return folder / CACHE_NAME


def _first_latents(run: Run, n: int) -> list[int]:
    return rank_latents(run.measurement().latents, n=n).latents


def _promoted(run: Run, latents: Sequence[int], n: int) -> dict[int, list[str]]:
    """Tokens that latents promote most in the fine-tuned model, or of a diff-SAE by what they add.

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
            "without them: --n-promoted 0, JudgeSettings(n_promoted=0)."
        ) from error
    names = list(dict.fromkeys(row.direction for row in rows))
    direction = names[-2] if len(names) > 1 else names[0]
    for row in rows:
        if row.is_promoted and row.direction == direction:
            found[row.latent].append(row.token)
    return found


def _questions(
    cases: Sequence[Case], names: dict[int, Name], settings: JudgeSettings
) -> dict[tuple[int, int], list[Messages]]:
    """Requests about each latent's windows, by the latent and by whose explanation is shown."""
    asked: dict[tuple[int, int], list[Messages]] = {}
    for case in cases:
        for of in (case.latent, _control_of(case.latent, names, settings)):
            if of in names and case.latent in names:
                asked[case.latent, of] = [
                    detection_prompt(names[of].explanation, batch)
                    for batch in batches(case.windows, settings.n_per_request)
                ]
    return asked


def _control_of(latent: int, names: dict[int, Name], settings: JudgeSettings) -> int | None:
    """Whose explanation a latent's windows are judged by as a control: the next in random order."""
    if not settings.is_controlled or latent not in names or len(names) < 2:
        return None
    generator = torch.Generator().manual_seed(settings.windows.seed)
    known = sorted(names)
    order = [known[i] for i in torch.randperm(len(known), generator=generator).tolist()]
    return order[(order.index(latent) + 1) % len(order)]


def _row(
    case: Case,
    names: dict[int, Name],
    scores: dict[tuple[int, int], Detection],
    settings: JudgeSettings,
) -> JudgedLatent:
    j, none = case.latent, float("nan")
    of = _control_of(j, names, settings)
    unknown = Detection(balanced_accuracy=Interval(value=none, low=none, high=none), n_read=0)
    own, control = scores.get((j, j), unknown), scores.get((j, -1 if of is None else of), unknown)
    name = names.get(j, Name(name="", explanation=""))
    n_active = sum(w.is_active for w in case.windows)
    return JudgedLatent(
        latent=j,
        name=name.name,
        explanation=name.explanation,
        detection=own.balanced_accuracy.value,
        low=own.balanced_accuracy.low,
        high=own.balanced_accuracy.high,
        control=control.balanced_accuracy.value,
        control_of=of,
        n_active=n_active,
        n_inactive=len(case.windows) - n_active,
        n_read=own.n_read,
        n_read_control=control.n_read,
    )


_INDENT = " " * 6


def judged_table(result: Judged) -> str:
    """A latent a paragraph, and the means."""
    head = (
        f"Latents as {result.model} names them, and how well it tells by the explanation where "
        "they are active: balanced accuracy on held-out windows (95 % interval; 0.5 is chance), "
        "and by the explanation of another latent"
    )
    means = [result.mean(lambda r: r.detection), result.mean(lambda r: r.control)]
    tail = f"Mean {_number(means[0])}; by the explanation of another latent {_number(means[1])}."
    return "\n".join([wrapped(head), "", *map(_latent, result.rows), "", wrapped(tail)])


def plan_text(plan: Plan, model: str) -> str:
    """How many requests, how large, and one of each kind in full."""
    n_new = plan.n_requests - plan.n_known
    parts = [
        f"{plan.n_requests:,} requests to {model}; {plan.n_known:,} are answered already, "
        f"{n_new:,} would be sent, with about {plan.n_tokens:,} tokens in.",
        f"A request for a name:\n\n{_messages(plan.naming)}",
    ]
    if plan.detection is not None:
        parts.append(f"A request about windows:\n\n{_messages(plan.detection)}")
    return "\n\n".join([*parts, "Nothing was sent. To send it, say --send."])


def _latent(row: JudgedLatent) -> str:
    if not row.explanation:
        return f"  latent {row.latent:<6} no name that could be read"
    n_windows = row.n_active + row.n_inactive
    interval = f"[{_number(row.low)}, {_number(row.high)}]"
    line = (
        f"  latent {row.latent:<6} {_number(row.detection)} {interval:<14} other "
        f"{_number(row.control)}  {row.n_active} + {row.n_inactive} windows"
    )
    if row.n_read < n_windows:
        line += f", {n_windows - row.n_read} without a readable answer"
    said = wrapped(f"{_INDENT}{row.name}: {row.explanation}").replace("\n  ", f"\n{_INDENT}")
    return f"{line}\n{said}"


def _messages(messages: Messages) -> str:
    return "\n".join(f"[{m['role']}]\n{m['content']}" for m in messages)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
