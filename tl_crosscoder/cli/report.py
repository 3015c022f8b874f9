"""The verb `report`: one HTML file about a run.

No torch is imported before it runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from tl_crosscoder.report.html import SampleSettings


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML file about a run: measures, latents, causes, samples; it needs no network."""

    dictionary: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or an embedded dictionary (see `list`)."""
    output: str | None = None
    """The file; None is report.html in the folder."""
    n_latents: int = 200
    """The first of the ranking."""
    samples: bool = True
    """Show what the models write, steered by each latent and without it, and texts with codes."""
    prompts: tuple[str, ...] = ()
    """User turns to write after; none are beginnings of held-out chats or texts, first those after
    which the two models write different texts."""
    n_prompts: int = 4
    """How many of these beginnings."""
    strengths: tuple[float, ...] = (0.5, 1.0)
    """Strengths of steering, in units of the mean norm of the base stream."""
    max_new_tokens: int = 40
    """Longest text that is written."""
    text: str | None = None
    """Text for prompts: a file, a folder, or a `datasets` name. None is the run's held-out text."""
    models: bool = True
    """Load the models. Without them there is no effect on the logits, and there are no samples."""
    device: str = "cpu"
    """Device of models and dictionary."""

    def __call__(self) -> None:
        """Write, and say where."""
        from tl_crosscoder.report.html import ReportSettings, report
        from tl_crosscoder.run.run import Run

        if self.prompts and not (self.models and self.samples):
            raise ValueError(
                "--prompts are for samples, which --no-models and --no-samples leave out: give "
                "neither of these, or no prompts."
            )
        settings = ReportSettings(
            n_latents=self.n_latents, samples=self._samples(), models=self.models, text=self.text
        )
        run = Run(path=Path(self.dictionary), device=self.device)
        path = report(run, settings=settings, output=self.output, show_progress=True)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; opens without a network")

    def _samples(self) -> "SampleSettings | None":
        from tl_crosscoder.report.html import SampleSettings

        if not self.samples:
            return None
        return SampleSettings(
            prompts=self.prompts,
            n_prompts=self.n_prompts,
            strengths=self.strengths,
            max_new_tokens=self.max_new_tokens,
        )
