"""How a dictionary was made, as its record says it, in words for the report.

Contract: sections of (name, value); settings that were left at None are left out. Limit: what
`runner_cfg.json` holds; the folders it was written to are not shown.

`ReportData`: everything that a report says, collected from a run's folder.

Contract: plain values, so that `asdict` is JSON but for the tables, whose columns may hold NaN;
nothing is measured that a command has not left in the folder, but for the effect on the logits, the
samples and the texts, which need the models. What is left out is in `missing`, with the command
that makes it. Limit: the first latents of the ranking.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tl_crosscoder.analysis.latents import Ranking, rank_latents
from tl_crosscoder.analysis.lens import LogitEffects
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.models.site import site_columns
from tl_crosscoder.organisms.suite import load_suite
from tl_crosscoder.report.causal import Causes, causes_of
from tl_crosscoder.report.html.latents import LatentRecord, latent_records, plain_number
from tl_crosscoder.report.html.models import Missing, ReportSettings, load_models, of_models
from tl_crosscoder.report.html.prompts import Samples
from tl_crosscoder.report.terminal import question
from tl_crosscoder.results.render import plain
from tl_crosscoder.run.run import HELD_OUT_NAME, Run
from tl_crosscoder.run.training import EXAMPLES_NAME, run_examples

_PLACES = ("output", "cache")
"""Settings that say where things lie on somebody's disk, and nothing of the dictionary."""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """What was planted in an embedded fine-tune, and whether its words were found."""

    said: str
    latents: list[int]
    words: list[tuple[str, int, int]]
    """Word, latents with it in a top context, latents active on it."""
    share: float
    """Of the top contexts of these latents, those with a planted word."""
    random_share: float
    p_value: float


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the dictionary comes from."""

    sites: dict[str, list[Any]]
    """A column a fact, a row a site."""
    sections: list[tuple[str, list[tuple[str, str]]]]
    planted: Planted | None


def origin_of(run: Run) -> Origin:
    """What the record, the last training metrics and the recovery of planted words say."""
    record = run.record
    sections = [
        ("Training", _facts(record["training"])),
        ("Dictionary", _facts({k: record[k] for k in ("d_sae", "sparsity", "partitions", "auxk")
                               if k in record})),
        ("Training text", _text(record.get("text", {}))),
        ("Held-out text", _text(record.get("held_out", {}))),
        ("Versions", _facts(record.get("environment", {}))),
    ]  # fmt: skip
    return Origin(
        sites=site_columns(run.crosscoder.sites, with_scales=True),
        sections=[(title, facts) for title, facts in sections if facts],
        planted=_planted(run),
    )


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, plain(value))
        for name, value in values.items()
        if value not in (None, [], {}) and name not in _PLACES
    ]


def _text(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Counts by mask, source and role on a line each."""
    names = {"tokens_by_mask": "tokens by mask", "tokens_by_source": "tokens by source",
             "tokens_by_role": "tokens by role"}  # fmt: skip
    return [(names.get(name, name), value) for name, value in _facts(values)]


def _planted(run: Run) -> Planted | None:
    """Only of a run of `demo`, which looks for planted words."""
    path, organism = run.path / "recovery.json", run.organism()
    if organism is None or not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return Planted(
        said=load_suite()[organism].planted,
        latents=found["latents"],
        words=[(word, n, found["at_token"][word]) for word, n in found["in_context"].items()],
        share=found["share_in_context"],
        random_share=found["random_share_in_context"],
        p_value=found["p_value"],
    )


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """What was measured of the dictionary as a whole; see `Reconstruction`."""

    d_sae: int
    n_tokens: int
    fve: list[tuple[str, float | None]]
    difference_fve: float | None
    difference_share: float | None
    l0: float
    dead_share: float
    classes: list[tuple[str, int, float | None]]
    """Class, active latents, share of the difference that they explain alone; empty of one site."""
    largest_r: tuple[int, float] | None
    """Latent and its R, of those that are ranked at all."""
    n_specific: int | None
    """Active latents that are specific by Latent Scaling; None without it."""
    n_specific_random: int | None
    """The same of random directions."""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that a report says."""

    title: str
    compared: tuple[str, str] | None
    order: str
    """What the latents are ranked by."""
    n_ranked: int
    """Latents that could be ranked."""
    dictionary: Dictionary
    latents: list[LatentRecord]
    samples: Samples | None
    texts: list[dict[str, Any]]
    """`TokenPanel`s of held-out contexts."""
    causes: Causes
    origin: Origin
    missing: list[Missing]

    def page_data(self) -> dict[str, Any]:
        """What the page's script reads."""
        return {
            "latents": [asdict(record) for record in self.latents],
            "samples": None if self.samples is None else asdict(self.samples),
            "texts": self.texts,
        }


def collect(
    run: Run, settings: ReportSettings | None = None, *, show_progress: bool = False
) -> ReportData:
    """Collect what is there, and what the models add.

    Args:
        run: a run's folder.
        settings: what goes in.
        show_progress: with progress bars.

    Raises:
        ValueError: models that cannot be loaded, or a file of the folder that cannot be read.
        FileNotFoundError: no measures, or samples without a text.
    """
    settings, missing = settings or ReportSettings(), []
    if settings.models:
        load_models(run)
    measurement = run.measurement() if settings.models else Measurement.load(run.path)
    ranking = rank_latents(measurement.latents, n=None)
    chosen = replace(ranking, rows=ranking.rows[: settings.n_latents])
    added = of_models(run, chosen.latents, settings, show_progress=show_progress)
    missing += added.missing
    return ReportData(
        title=question(run.crosscoder.sites),
        compared=measurement.compared,
        order=ranking.order,
        n_ranked=len(ranking.rows),
        dictionary=_dictionary(measurement, ranking),
        latents=_records(
            run, measurement, chosen, settings=settings, effects=added.effects, missing=missing
        ),
        samples=added.samples,
        texts=added.texts,
        causes=causes_of(run.path),
        origin=origin_of(run),
        missing=missing,
    )


def _dictionary(measurement: Measurement, ranking: Ranking) -> Dictionary:
    r, latents = measurement.reconstruction, measurement.latents
    by_class, counts = r.difference_fve_by_class or {}, measurement.class_counts
    norms = [(row.latent, row.relative_decoder_norm) for row in ranking.rows]
    norms = [(latent, R) for latent, R in norms if not math.isnan(R)]
    n_specific = {name: int(table.is_specific.sum()) for name, table in latents.scaling.items()}
    return Dictionary(
        d_sae=len(latents.n_active),
        n_tokens=r.n_tokens,
        fve=[(site, plain_number(value)) for site, value in r.fve.items()],
        difference_fve=r.difference_fve,
        difference_share=r.difference_share,
        l0=r.l0,
        dead_share=r.dead_share,
        classes=[
            (name, n, by_class.get(name) if n else None) for name, n in counts.items()
        ] if measurement.compared else [],
        largest_r=max(norms, key=lambda each: each[1], default=None),
        n_specific=n_specific.get("finetuned"),
        n_specific_random=n_specific.get("random"),
    )  # fmt: skip


def _records(
    run: Run,
    measurement: Measurement,
    chosen: Ranking,
    *,
    settings: ReportSettings,
    effects: LogitEffects | None,
    missing: list[Missing],
) -> list[LatentRecord]:
    can_collect = settings.models and (run.path / HELD_OUT_NAME).is_file()
    if not can_collect and not (run.path / EXAMPLES_NAME).is_file():
        missing.append(
            Missing(what="Examples", how="`tl-crosscoder analyze --fresh` collects them.")
        )
        how = {"database": None, "effects": effects}
        return latent_records(chosen, measurement.latents, run.crosscoder, **how)
    with run_examples(run) as database:
        how = {"database": database, "effects": effects}
        return latent_records(chosen, measurement.latents, run.crosscoder, **how)
