"""`ReportData`: everything that a report says, collected from a run's folder.

Contract: plain values, so that `asdict` is JSON but for the tables, whose columns may hold NaN;
nothing is measured that a command has not left in the folder, but for the effect on the logits, the
samples and the texts, which need the models. What is left out is in `missing`, with the command
that makes it. Limit: the first latents of the ranking.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from tl_crosscoder.analysis.lens import LogitEffects
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.analysis.ranking import Ranking, rank_latents
from tl_crosscoder.diffing import EXAMPLES_NAME
from tl_crosscoder.run_examples import run_examples
from tl_crosscoder.run_folder import HELD_OUT_NAME, RunFolder
from tl_crosscoder.visualize.report.causes import Causes, causes_of
from tl_crosscoder.visualize.report.latents import LatentRecord, latent_records, plain_number
from tl_crosscoder.visualize.report.models import Missing, ReportSettings, load_models, of_models
from tl_crosscoder.visualize.report.origin import Origin, origin_of
from tl_crosscoder.visualize.report.samples import Samples
from tl_crosscoder.visualize.terminal import question


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
    """Class, living latents, share of the difference that they explain alone; empty of one site."""
    largest_r: tuple[int, float] | None
    """Latent and its R, of those that are ranked at all."""
    n_specific: int | None
    """Living latents that are specific by Latent Scaling; None without it."""
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
    run: RunFolder, settings: ReportSettings | None = None, *, show_progress: bool = False
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
    run: RunFolder,
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
