"""`ReportData`: everything that a report shows, collected from a run's folder and its models.

Contract: plain values; nothing is measured that a command has not left in the folder, but for the
effect on the logits, the samples and the texts, which need the models: these are loaded once,
before any long work. What is left out is in `missing`, with the reason or the command that makes
it. Limit: the first latents of the ranking, and a few texts.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tl_crosscoder import files
from tl_crosscoder.analysis.example_database import ExampleDatabase
from tl_crosscoder.analysis.latents import UNRANKED, Ranking, rank_latents
from tl_crosscoder.analysis.lens import LogitEffects
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.files import EXAMPLES_NAME, HELD_OUT_NAME, RECOVERY_NAME
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.models.site import site_columns
from tl_crosscoder.organisms.suite import load_suite
from tl_crosscoder.report.answer import Answer
from tl_crosscoder.report.causes import Causes, causes_of
from tl_crosscoder.report.circuits import TokenPanel
from tl_crosscoder.report.html.latents import (
    Record,
    effects_on_logits,
    histograms,
    judged_changes,
    judged_names,
    latent_records,
    logit_histograms,
    plain_number,
)
from tl_crosscoder.report.html.samples import N_CANDIDATES, Samples, SampleSettings, sample_latents
from tl_crosscoder.report.html.shifts import Shifts, contexts_of, log_probability_shifts
from tl_crosscoder.report.sections import question
from tl_crosscoder.report.tokens import latent_tokens
from tl_crosscoder.results.render import plain
from tl_crosscoder.run.attribution import ranking_at_hand
from tl_crosscoder.run.run import Run

N_LOGITS = 8
"""Tokens that a direction promotes, and as many that it suppresses."""
N_TEXTS, N_TEXT_LATENTS = 3, 10
"""Held-out contexts that are shown whole, with the activations of so many latents."""
_PLACES = ("output", "cache")
"""Settings that are folders on somebody's disk, and nothing of the dictionary."""
Facts = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Contents of a report."""

    n_latents: int = 2_000
    """The first of the ranking."""
    samples: SampleSettings | None = field(default_factory=SampleSettings)
    """Texts that the models are made to write; None runs them on no text."""
    models: bool = True
    """False does not load the models: no effect on the logits, no samples, no texts."""
    text: str | None = None
    """For samples and texts; None is the run's held-out text."""

    def __post_init__(self) -> None:
        if self.n_latents < 1:
            raise ValueError(f"n_latents is {self.n_latents}; a report has at least one latent.")


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that a report shows."""

    title: str
    compared: tuple[str, str] | None
    answer: Answer
    change_names: list[str]
    """What a language model calls each change of the answer; empty where it was not asked."""
    order: str
    """Order of the latents, see `ranking_at_hand`."""
    n_ranked: int
    """Latents that could be ranked."""
    dictionary: Record
    """Measures of the dictionary as a whole: fields of `Reconstruction`, and counts of latents."""
    latents: list[Record]
    samples: Samples | None
    texts: list[dict[str, Any]]
    """`TokenPanel`s of held-out contexts."""
    causes: Causes
    sites: dict[str, list[Any]]
    """Columns of the sites."""
    origin: list[tuple[str, Facts]]
    """How the dictionary was made: titles with (name, value)."""
    planted: Record | None
    """Difference planted in an embedded fine-tune, and whether it was found."""
    missing: dict[str, str]
    """Parts that the report does not have, with the reason or the command that makes them."""

    def page_data(self) -> Record:
        """Values that the page's script reads."""
        samples = None if self.samples is None else asdict(self.samples)
        return {"latents": self.latents, "samples": samples, "texts": self.texts}


def collect(
    run: Run, settings: ReportSettings | None = None, *, show_progress: bool = False
) -> ReportData:
    """Collect what is there, and what the models add.

    Args:
        run: a run's folder.
        settings: contents of the report.
        show_progress: with progress bars.

    Raises:
        ValueError: models that cannot be loaded, or a file of the folder that cannot be read.
        FileNotFoundError: no measures, or samples without a text.
    """
    settings = settings or ReportSettings()
    if settings.models:
        _load_models(run)
    measurement = run.measurement() if settings.models else Measurement.load(run.path)
    ranking = ranking_at_hand(run, n=None)
    chosen = replace(ranking, rows=ranking.rows[: settings.n_latents])
    missing: dict[str, str] = {}
    effects, samples, texts = _of_models(
        run, chosen.latents, settings, missing=missing, show_progress=show_progress
    )
    how = {"effects": effects, "has_models": settings.models, "missing": missing}
    return ReportData(
        title=question(run.crosscoder.sites),
        compared=measurement.compared,
        answer=(answer := Answer.load(run.path)),
        change_names=judged_changes(run.path, answer.changes),
        order=ranking.order,
        n_ranked=len(ranking.rows),
        dictionary=_dictionary(measurement),
        latents=_records(run, measurement, chosen, **how),
        samples=samples,
        texts=texts,
        causes=causes_of(run.path),
        sites=site_columns(run.crosscoder.sites, with_scales=True),
        origin=_origin(run.record),
        planted=_planted(run),
        missing=missing,
    )


def _dictionary(measurement: Measurement) -> Record:
    r, latents = measurement.reconstruction, measurement.latents
    ranked = rank_latents(latents, n=None).rows
    norms = [(row.latent, row.relative_decoder_norm) for row in ranked]
    norms = [(latent, R) for latent, R in norms if not math.isnan(R)]
    n_specific = {name: int(table.is_specific.sum()) for name, table in latents.scaling.items()}
    return {
        "d_sae": len(latents.n_active),
        "n_tokens": r.n_tokens,
        "fve": [(site, plain_number(value)) for site, value in r.fve.items()],
        "difference_fve": r.difference_fve,
        "difference_share": r.difference_share,
        "l0": r.l0,
        "dead_share": r.dead_share,
        "classes": [*measurement.class_counts.items()] if measurement.compared else [],
        "largest_r": max(norms, key=lambda each: each[1], default=None),
        "n_specific": n_specific.get("finetuned"),
        "n_specific_random": n_specific.get("random"),
    }


def _records(
    run: Run,
    measurement: Measurement,
    chosen: Ranking,
    *,
    effects: LogitEffects | None,
    has_models: bool,
    missing: dict[str, str],
) -> list[Record]:
    what = chosen, measurement.latents, run.crosscoder
    how: dict[str, Any] = {"effects": effects, "named": judged_names(run.path)}
    how["changes"] = Answer.load(run.path).changes
    if has_models and chosen.rows:
        try:
            how["counted"] = histograms(run, chosen.latents)
        except (ValueError, FileNotFoundError) as error:
            missing["Histograms of activations"] = str(error)
        if effects is not None:
            how["counted_logits"] = logit_histograms(run, chosen.latents)
    can_collect = has_models and (run.path / HELD_OUT_NAME).is_file()
    if not can_collect and not (run.path / EXAMPLES_NAME).is_file():
        missing["Examples"] = "`tl-crosscoder analyze --fresh` collects them."
        return latent_records(*what, database=None, **how)
    with run.examples() as database:
        if can_collect:
            how["shifts"] = _shifts(run, database, chosen.latents)
        return latent_records(*what, database=database, **how)


def _shifts(run: Run, database: ExampleDatabase, latents: list[int]) -> Shifts | None:
    """None where there are no two models, or where the examples are of another text."""
    if run.models.compared is None:
        return None
    _, text = run.measured()
    if not database.is_of(text):
        return None
    contexts = contexts_of(database, latents, text)
    return log_probability_shifts(run.models, text, contexts, sites=run.models.compared_names)


# --- what the models add --------------------------------------------------------------------------


def _load_models(run: Run) -> None:
    """Load the models now: one that is missing should not be found after long work."""
    try:
        _ = run.models
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the models of this dictionary cannot be loaded: {error} A report without them has no "
            "effect on the logits, no samples and no texts: --no-models (models=False)."
        ) from error


def _of_models(
    run: Run,
    latents: list[int],
    settings: ReportSettings,
    *,
    missing: dict[str, str],
    show_progress: bool,
) -> tuple[LogitEffects | None, Samples | None, list[dict[str, Any]]]:
    """Effects on the logits, samples and texts, as far as settings and models allow."""
    if not settings.models:
        missing["Effect on the logits, samples, texts"] = "models were not loaded (--no-models)."
        return None, None, []
    effects = None
    try:
        effects = effects_on_logits(run, latents, n=N_LOGITS) if latents else None
    except ValueError as error:
        missing["Effect on the logits"] = str(error)
    reason = _no_samples(run, latents, settings)
    if settings.samples is None or reason:
        missing["Samples and texts"] = reason or "left out (--no-samples)."
        return effects, None, []
    how = {"text": settings.text, "show_progress": show_progress}
    samples = sample_latents(run, latents[: settings.samples.n_latents], settings.samples, **how)
    return effects, samples, _texts(run, latents[:N_TEXT_LATENTS], settings.text)


def _no_samples(run: Run, latents: list[int], settings: ReportSettings) -> str:
    """Why there can be no samples; empty where there can. Raises FileNotFoundError for no text."""
    if settings.samples is None:
        return ""
    if not latents:
        return UNRANKED
    try:
        InterventionContext.of(run.models, run.crosscoder)
    except ValueError as error:
        return str(error)
    if settings.text is None and not (run.path / HELD_OUT_NAME).is_file():
        raise FileNotFoundError(
            f"{run.path} keeps no held-out text ({HELD_OUT_NAME}), and samples need one. Name a "
            "text with --text (text=...), or leave samples out with --no-samples (samples=None)."
        )
    return ""


def _texts(run: Run, latents: list[int], text: str | None) -> list[dict[str, Any]]:
    """Contexts with the largest activations among the first ones, most first."""
    contexts = run.prompts(run.documents(text))[:N_CANDIDATES]
    panels = latent_tokens(run.models, run.crosscoder, contexts, latents).panels

    def activity(panel: TokenPanel) -> float:
        return sum(sum(v) if isinstance(v, list) else v for v in panel.props["values"])

    return [panel.to_dict() for panel in sorted(panels, key=activity, reverse=True)[:N_TEXTS]]


# --- how it was made ------------------------------------------------------------------------------


def _origin(record: Mapping[str, Any]) -> list[tuple[str, Facts]]:
    """Sections of the run's record; settings that were left at None are left out."""
    own = {k: record[k] for k in ("d_sae", "sparsity", "partitions", "auxk") if k in record}
    sections = [
        ("Training", _facts(record["training"])),
        ("Dictionary", _facts(own)),
        ("Training text", _facts(record.get("text", {}))),
        ("Held-out text", _facts(record.get("held_out", {}))),
        ("Versions", _facts(record.get("environment", {}))),
    ]
    return [(title, facts) for title, facts in sections if facts]


def _facts(values: Mapping[str, Any]) -> Facts:
    kept = {k: v for k, v in values.items() if v not in (None, [], {}) and k not in _PLACES}
    return [(name.replace("tokens_by_", "tokens by "), plain(v)) for name, v in kept.items()]


def _planted(run: Run) -> Record | None:
    """What `demo` found: a sentence for each planted behaviour, and words in top contexts."""
    path, organism = run.path / RECOVERY_NAME, run.organism()
    if organism is None or not path.is_file():
        return None
    found = files.read_object(path, latents=list, in_context=dict)
    return {
        "planted": load_suite()[organism].planted,
        "n_latents": len(found["latents"]),
        "words": [*found["in_context"].items()],
        # Share of the top contexts of these latents that hold a planted word.
        "share": found["share_in_context"],
        "random_share": found["random_share_in_context"],
        "verdicts": found.get("verdicts", []),
    }
