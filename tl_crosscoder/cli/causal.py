"""The verbs `patch`, `ablate`, `steer` and `baselines`: what causes what the fine-tune does.

No torch here; see `causal` for what they do.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from tl_crosscoder.interventions.trials import CausalTest
    from tl_crosscoder.run.causal import CausalQuestion


@dataclass(frozen=True, kw_only=True)
class _Question:
    """What the verbs have in common."""

    output: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or an embedded dictionary (see `list`)."""
    text: str | None = None
    """Prompts to measure on: a file, a folder, or a `datasets` name. None is the run's held-out
    text; where there are chats, they alone."""
    n_prompts: int = 100
    """Measure on so many of them."""
    seed: int = 0
    """Of controls and resamples."""
    device: str = "cpu"
    """Device of models and dictionary."""

    def asked(self) -> "CausalQuestion":
        """Without what is about the command line."""
        from tl_crosscoder.run.causal import CausalQuestion

        known = {f.name for f in fields(CausalQuestion)}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name in known}
        return CausalQuestion(**values)

    def run(self) -> Any:
        """The run's folder, opened."""
        from tl_crosscoder.run.run import Run

        return Run(path=Path(self.output), device=self.device)


@dataclass(frozen=True, kw_only=True)
class _Chosen(_Question):
    """Of which latents."""

    latents: tuple[int, ...] | None = None
    """Latents to test, together; none are the first 3, 10 and 30 of the ranking."""


@dataclass(frozen=True, kw_only=True)
class _Effect(_Question):
    """On what, beside predictions, and against how many controls."""

    behaviour: str | None = None
    """JSONL of prompts and completions whose probability is the behaviour. None is the planted one
    of an embedded organism; else predictions alone are measured."""
    n_random: int = 100
    """Norm-matched random directions as controls."""


@dataclass(frozen=True, kw_only=True)
class _Tested(_Chosen, _Effect):
    """What `ablate` and `steer` have besides."""

    n_matched: int = 10
    """Sets of latents of the same firing rate as controls."""
    null: str | None = None
    """Folder of a dictionary of a null pair (the base against itself) at the same hook, whose
    directions are one more control."""
    prompts: tuple[str, ...] = ()
    """User turns after which to show what the models write."""


@dataclass(frozen=True, kw_only=True)
class Patch(_Chosen):
    """KL recovery: patch latents into the base stream; what of the fine-tune returns."""

    def __call__(self) -> None:
        """Run and print."""
        from tl_crosscoder.report.sections import patching_sections
        from tl_crosscoder.results.render import as_text
        from tl_crosscoder.run.causal import patch_run

        run = self.run()
        result = patch_run(run, self.asked())
        print(as_text(patching_sections(result)))
        print(f"\nSaved in {run.path / 'patching.json'}")


@dataclass(frozen=True, kw_only=True)
class Ablate(_Tested):
    """Necessity: take latents out of the fine-tuned model; what goes, and what it costs."""

    mode: Literal["delta", "zero", "project"] = "delta"
    """Take out what the fine-tune added to the latents (`delta`), all that they write (`zero`), or
    their directions at every token (`project`)."""
    export: str | None = None
    """Write the mitigation into this folder, as a hook for plain TransformerLens that needs the
    fine-tuned model alone."""

    def __call__(self) -> None:
        """Run and print."""
        from tl_crosscoder.files import new_folder
        from tl_crosscoder.report.sections import samples_text
        from tl_crosscoder.run import causal

        if self.export:
            new_folder(self.export)  # before long work
        run, asked = self.run(), self.asked()
        results = causal.ablate_run(run, asked, mode=self.mode)
        _print_tests(results)
        if self.prompts:
            samples = causal.ablation_samples(run, asked, self.prompts, mode=self.mode)
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

        run, asked = self.run(), self.asked()
        results = causal.steer_run(run, asked, strengths=self.strengths)
        _print_tests(results)
        if self.prompts:
            samples = causal.steering_samples(run, asked, self.prompts, strengths=self.strengths)
            print(f"\n{samples_text(samples)}")
        _print_saved(run.path)


@dataclass(frozen=True, kw_only=True)
class Baselines(_Effect):
    """The same tests without a dictionary: mean difference (ADL), principal components."""

    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Strengths of steering, in units of the mean norm of the stream."""

    def __call__(self) -> None:
        """Run and print."""
        from tl_crosscoder.interventions.context import InterventionContext
        from tl_crosscoder.report.sections import lens_section
        from tl_crosscoder.results.render import as_text
        from tl_crosscoder.run import causal

        run = self.run()
        results, adl = causal.baseline_run(run, self.asked(), strengths=self.strengths)
        _print_tests(results)
        lens = lens_section(adl, InterventionContext.of(run.models).models)
        print(f"\n{as_text([lens])}")
        _print_saved(run.path)


def _print_tests(results: "list[CausalTest]") -> None:
    from tl_crosscoder.report.sections import causal_sections
    from tl_crosscoder.results.render import as_text

    sections = [s for result in results for s in causal_sections(result, is_brief=True)]
    print(as_text(sections))


def _print_saved(folder: Path) -> None:
    from tl_crosscoder.run.causal import saved_files

    names = ", ".join(path.name for path in saved_files(folder))
    print(f"\nSaved in {folder}: {names}")
