"""The verb `analyze`: what has been measured of a run's dictionary.

No torch is imported before it runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from tl_crosscoder.config.causal import Order

if TYPE_CHECKING:
    from tl_crosscoder.analysis.measurement import Measurement
    from tl_crosscoder.results.tables import TableOfRows
    from tl_crosscoder.run.run import Run

N_EVAL_TOKENS = 16_384
"""Held-out tokens for SAELens's evaluator, which runs the models many times."""


@dataclass(frozen=True, kw_only=True)
class Analyze:
    """Print what was measured of a crosscoder: in all, of one latent, or where a text occurs."""

    output: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder that `train` or `demo` wrote, or an embedded dictionary (see `list`)."""
    fresh: bool = False
    """Load the models and measure anew on the run's held-out text."""
    text: str | None = None
    """Measure anew on this text instead: a file, a folder, or a `datasets` name."""
    device: str = "cpu"
    """Device to measure on."""
    n_examples: int = 2
    """Tokens in context shown for each latent."""
    by: Order | None = None
    """Print a ranking by this measure, as a table; `attribution` is computed now where the run's
    folder has none."""
    toward: Literal["finetuned", "base"] = "finetuned"
    """Model whose latents that ranking is of."""
    n: int = 10
    """Rows of that ranking, or hits of a search."""
    latent: int | None = None
    """Print what is known of this latent: measures, examples by quantile, effect on the logits."""
    search: str | None = None
    """Print the latents with this text in their examples."""
    decoupled: bool = False
    """Print pairs of a finetuned-only and a base-only latent that write the same direction."""
    seeds: tuple[str, ...] = ()
    """Print how well the dictionaries in these folders find this one's latents, and it theirs."""
    evals: bool = False
    """Run SAELens's evaluator on each side, and print what it says."""
    table: str | None = None
    """Write all measures, a row a latent, into this .parquet or .csv file."""
    workers: int = 1
    """Processes that measure together (--fresh, --text), each with its models."""

    def __call__(self) -> None:
        """Print; measure only where asked to."""
        from tl_crosscoder.mesh import Mesh, mesh_of, ran_by_workers
        from tl_crosscoder.progress import silenced
        from tl_crosscoder.results.render import as_text
        from tl_crosscoder.run.run import Run

        self._check()
        if ran_by_workers(self.workers):
            return
        with mesh_of(None, 1, device=self.device) as mesh:
            run = Run(path=Path(self.output), device=self.device, mesh=mesh or Mesh())
            is_compared = self.decoupled or self.seeds or self.evals
            measurement = None
            if self.fresh or self.table is not None or not is_compared:
                with silenced(not run.mesh.is_first):
                    measurement = self._measurement(run)
        if not run.mesh.is_first:
            return
        run = run if mesh is None else run.alone()
        if is_compared:
            print(as_text(self._comparison(run).sections(), is_whole=True))
        elif measurement is not None and (self.table is None or self._asked()):
            print(self._shown(run, measurement))
        if measurement is not None and self.table is not None:
            print(_written(measurement, Path(self.table)))

    def _asked(self) -> list[str]:
        """What is to be printed instead of the summary."""
        asked = {
            "--by": self.by is not None, "--latent": self.latent is not None,
            "--search": self.search is not None, "--decoupled": self.decoupled,
            "--seeds": bool(self.seeds), "--evals": self.evals,
        }  # fmt: skip
        return [name for name, is_asked in asked.items() if is_asked]

    def _check(self) -> None:
        """Raises ValueError for what would be left out without a word."""
        asked = self._asked()
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} each print something else: give one of them.")
        if self.workers > 1 and not (self.fresh or self.text):
            raise ValueError(
                "several workers measure together, and nothing is measured: give --fresh or --text."
            )
        if self.text and asked not in ([], ["--by"], ["--evals"]):
            raise ValueError(
                f"{asked[0]} reads the measures and examples of the run's own text: leave --text "
                "out."
            )

    def _shown(self, run: "Run", measurement: "Measurement") -> object:
        """What is printed of one run."""
        from tl_crosscoder.notebook.latent import LatentView, search
        from tl_crosscoder.report.answer import with_answer
        from tl_crosscoder.report.sections import render
        from tl_crosscoder.results.render import as_text
        from tl_crosscoder.run.attribution import ranking_of

        if self.latent is not None:
            return LatentView.of(run, self.latent)
        if self.search is not None:
            return search(run, self.search, n=self.n)
        if self.by is not None:
            how = {"n": self.n, "order": self.by, "toward": self.toward, "text": self.text}
            ranking = ranking_of(run, measurement=measurement, **how)
            return as_text(ranking.sections(), is_whole=True)
        numbers = render(measurement, run.crosscoder.sites, n_examples=self.n_examples)
        return with_answer(run.path, numbers)

    def _measurement(self, run: "Run") -> "Measurement":
        from tl_crosscoder.analysis.measurement import Measurement
        from tl_crosscoder.report.figures import save_norm_figure

        if self.text:
            return run.measure(self.text)
        if self.fresh:
            found = run.measure()
            if run.mesh.is_first:
                save_norm_figure(found, run.path)
            return found
        return Measurement.load(run.path)

    def _comparison(self, run: "Run") -> "TableOfRows":
        from tl_crosscoder.analysis.agreement import agreement_over_seeds
        from tl_crosscoder.analysis.geometry import decoupled_pairs
        from tl_crosscoder.run.run import Run

        if self.decoupled:
            return decoupled_pairs(run.crosscoder)
        if self.seeds:
            runs = [run, *(Run(path=Path(o), device=self.device) for o in self.seeds)]
            active = [each.measurement().latents.n_active > 0 for each in runs]
            return agreement_over_seeds([each.crosscoder for each in runs], active=active)
        from tl_crosscoder.analysis.saelens_evals import site_evals
        from tl_crosscoder.interventions.context import InterventionContext

        text = run.some(run.text(run.documents(self.text)), N_EVAL_TOKENS)
        models = InterventionContext.of(run.models, run.crosscoder).models
        return site_evals(models, run.crosscoder, text, show_progress=True)


def _written(measurement: "Measurement", path: Path) -> str:
    from tl_crosscoder import files

    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"{path} must end in .parquet or .csv: the table is written as either.")
    frame = measurement.latents.to_frame()
    with files.replacing(path) as temporary:
        if path.suffix == ".csv":
            frame.to_csv(temporary)
        else:
            frame.to_parquet(temporary)
    return f"{len(frame):,} latents with {len(frame.columns)} measures are in {path}"
