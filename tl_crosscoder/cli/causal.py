"""The verbs from `changes` and `attribute` to `curves` and `baselines`: what causes it all.

No torch here; see `causal` for what they do.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from tl_crosscoder.config.causal import (
    AttributionQuestion,
    CausalQuestion,
    ChangesQuestion,
    CurvesQuestion,
    EffectQuestion,
    LatentsQuestion,
)
from tl_crosscoder.config.null import NullConfig
from tl_crosscoder.files import (
    ATTRIBUTION_NAMES,
    CHANGES_NAME,
    FLOOR_NAME,
    PATCHING_NAME,
    WATERFALL_NAME,
)

if TYPE_CHECKING:
    from tl_crosscoder.interventions.causal_rows import CausalTest
    from tl_crosscoder.mesh import Mesh
    from tl_crosscoder.run.run import Run


@dataclass(frozen=True, kw_only=True)
class _OfRun:
    output: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or an embedded dictionary (see `list`)."""
    device: str = "cpu"
    """Device of models and dictionary."""

    def run(self, mesh: "Mesh | None" = None) -> "Run":
        """The run's folder, opened."""
        from tl_crosscoder.mesh import Mesh
        from tl_crosscoder.run.run import Run

        return Run(path=Path(self.output), device=self.device, mesh=mesh or Mesh())


@dataclass(frozen=True, kw_only=True)
class _Tested(_OfRun):
    question: Annotated[CausalQuestion, tyro.conf.OmitArgPrefixes]
    prompts: tuple[str, ...] = ()
    """User turns after which to show what the models write."""


@dataclass(frozen=True, kw_only=True)
class Changes(_OfRun):
    """Say what changed: a few changes, each with texts, its latents and what removing them does."""

    question: Annotated[ChangesQuestion, tyro.conf.OmitArgPrefixes]

    def __call__(self) -> None:
        """Run and print."""
        from tl_crosscoder.results.render import as_text
        from tl_crosscoder.run.changes import changes_run

        run = self.run()
        print(as_text(changes_run(run, self.question).sections()))
        print(f"\nSaved in {run.path / CHANGES_NAME}")


@dataclass(frozen=True, kw_only=True)
class Attribute(_OfRun):
    """Share the change out over latents: how many nats each carries, and how much passes here."""

    question: Annotated[AttributionQuestion, tyro.conf.OmitArgPrefixes]
    n: int = 10
    """Latents that are printed."""
    workers: int = 1
    """Processes that share the contexts out, each with its models."""

    def __call__(self) -> None:
        """Run and print."""
        from tl_crosscoder.mesh import mesh_of, ran_by_workers
        from tl_crosscoder.progress import silenced
        from tl_crosscoder.results.render import as_text
        from tl_crosscoder.run.attribution import attribute_run, waterfall_run

        if ran_by_workers(self.workers):
            return
        with mesh_of(None, 1, device=self.device) as mesh:
            run = self.run(mesh)
            with silenced(not run.mesh.is_first):
                found = attribute_run(run, self.question)
        if not run.mesh.is_first:
            return
        run = run.alone()
        print(as_text(found.sections(n=self.n), is_whole=True))
        print(f"\n{as_text(waterfall_run(run, self.question).sections())}")
        print(f"\nSaved in {run.path}: {', '.join([*ATTRIBUTION_NAMES, WATERFALL_NAME])}")


@dataclass(frozen=True, kw_only=True)
class Null(_OfRun):
    """Noise floor: the same numbers for the base against itself, or fine-tuned on its own text."""

    how: Annotated[NullConfig, tyro.conf.OmitArgPrefixes]
    text: str | None = None
    """The text that the run was trained on, where its record does not name it."""
    resume: bool = False
    """Continue the null pair in the run's folder; one that is complete is measured again."""

    def __call__(self) -> None:
        """Make, measure and print."""
        from tl_crosscoder.run.null import null_run

        run = self.run()
        print(null_run(run, self.how, text=self.text, resume=self.resume))
        print(f"\nSaved in {run.path / FLOOR_NAME}")


@dataclass(frozen=True, kw_only=True)
class Patch(_OfRun):
    """KL recovery: patch latents into the base stream; what of the fine-tune returns."""

    question: Annotated[LatentsQuestion, tyro.conf.OmitArgPrefixes]

    def __call__(self) -> None:
        """Run and print."""
        from tl_crosscoder.report.causes import patching_sections
        from tl_crosscoder.results.render import as_text
        from tl_crosscoder.run.causal import patch_run

        run = self.run()
        print(as_text(patching_sections(patch_run(run, self.question))))
        print(f"\nSaved in {run.path / PATCHING_NAME}")


@dataclass(frozen=True, kw_only=True)
class Ablate(_Tested):
    """Necessity: take latents out of the fine-tuned model; what goes, and what it costs."""

    mode: Literal["delta", "zero", "project"] = "delta"
    """Take out what the fine-tune added to the latents (`delta`), all that they write (`zero`), or
    their directions at every token (`project`)."""
    every_hook: bool = False
    """Of a dictionary over several hooks: edit all of them in one forward pass too, beside the
    highest one alone, and take no difference out twice."""
    export: str | None = None
    """Write the mitigation into this folder, as a hook for plain TransformerLens that needs the
    fine-tuned model alone."""

    def __call__(self) -> None:
        """Run and print."""
        from tl_crosscoder.files import new_folder
        from tl_crosscoder.report.sections import samples_text
        from tl_crosscoder.run import causal

        if self.export and self.every_hook:
            raise ValueError("an export is of one hook: leave out --export or --every-hook.")
        if self.export:
            new_folder(self.export)  # before long work
        run, asked = self.run(), self.question
        how = {"mode": self.mode, "every_hook": self.every_hook}
        results = causal.ablate_run(run, asked, **how)
        _print_tests(results)
        if self.prompts:
            samples = causal.ablation_samples(run, asked, self.prompts, **how)
            print(f"\n{samples_text(samples)}")
        if self.export:
            print(f"\n{causal.export_run(run, asked, Path(self.export), mode=self.mode)}")
        _print_saved(run.path)


@dataclass(frozen=True, kw_only=True)
class Steer(_Tested):
    """Sufficiency: put what latents add into the base model, and steer it by their directions."""

    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Strengths of steering, in units of the mean norm of the stream."""

    def __call__(self) -> None:
        """Run and print."""
        from tl_crosscoder.report.sections import samples_text
        from tl_crosscoder.run import causal

        run, asked = self.run(), self.question
        results = causal.steer_run(run, asked, strengths=self.strengths)
        _print_tests(results)
        if self.prompts:
            samples = causal.steering_samples(run, asked, self.prompts, strengths=self.strengths)
            print(f"\n{samples_text(samples)}")
        _print_saved(run.path)


@dataclass(frozen=True, kw_only=True)
class Curves(_OfRun):
    """Necessity and sufficiency by number of latents, in every order, beside other methods."""

    question: Annotated[CurvesQuestion, tyro.conf.OmitArgPrefixes]

    def __call__(self) -> None:
        """Run and print."""
        from tl_crosscoder.run.curves import curves_run

        run = self.run()
        _print_tests(curves_run(run, self.question))
        _print_saved(run.path)


@dataclass(frozen=True, kw_only=True)
class Baselines(_OfRun):
    """Without a dictionary: tests of mean difference (ADL) and PCA; telling tokens and texts."""

    question: Annotated[EffectQuestion, tyro.conf.OmitArgPrefixes]
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Strengths of steering, in units of the mean norm of the stream."""
    n_texts: int = 50
    """Texts that the fine-tuned model, and amplified logits, write from random beginnings; 0 leaves
    them out."""
    alpha: float = 1.0
    """Of amplified logits, l¹ + alpha (l¹ - l⁰)."""

    def __call__(self) -> None:
        """Run and print."""
        from tl_crosscoder.interventions.context import InterventionContext
        from tl_crosscoder.report.causes import lens_section
        from tl_crosscoder.results.render import as_text
        from tl_crosscoder.run.baselines import baseline_run, mined_tokens, written_texts

        run = self.run()
        results, adl = baseline_run(run, self.question, strengths=self.strengths)
        _print_tests(results)
        sections = [lens_section(adl, InterventionContext.of(run.models).models)]
        sections += mined_tokens(run, self.question).sections()
        if self.n_texts:
            texts = written_texts(run, self.question, n=self.n_texts, alpha=self.alpha)
            sections += [section for each in texts for section in each.sections()]
        print(f"\n{as_text(sections)}")
        _print_saved(run.path)


def _print_tests(results: "list[CausalTest]") -> None:
    from tl_crosscoder.interventions.causal_rows import causal_sections
    from tl_crosscoder.results.render import as_text

    print(as_text(causal_sections(*results, is_brief=True)))


def _print_saved(folder: Path) -> None:
    from tl_crosscoder.run.causal import saved_files

    names = ", ".join(path.name for path in saved_files(folder))
    print(f"\nSaved in {folder}: {names}")
