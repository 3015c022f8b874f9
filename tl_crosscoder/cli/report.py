"""The verbs `report`, `serve`, `handoff` and `judge`: a run for readers, live, for others, named.

No torch is imported before they run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tl_crosscoder.integrations.config import HandoffConfig, JudgeConfig

if TYPE_CHECKING:
    from tl_crosscoder.report.html import SampleSettings


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML file about a run: measures, latents, causes, samples; it needs no network."""

    dictionary: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or an embedded dictionary (see `list`)."""
    output: str | None = None
    """The file; None is report.html in the folder."""
    n_latents: int = 2_000
    """The first of the ranking."""
    samples: bool = True
    """Show what the models write, steered by each latent and without it, and texts with codes."""
    prompts: tuple[str, ...] = ()
    """User turns to write after; none are beginnings of held-out chats or texts, first those after
    which the two models write different texts."""
    n_prompts: int = 4
    """How many of these beginnings."""
    n_sampled: int = 100
    """Latents that samples are steered by and ablated without, one by one; the first."""
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
            n_latents=self.n_sampled,
        )


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve the report with the models behind it, on this machine: type a prompt, edit latents."""

    dictionary: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or an embedded dictionary (see `list`)."""
    port: int = 0
    """Port of 127.0.0.1; 0 is a free one."""
    n_latents: int = 2_000
    """The first of the ranking."""
    device: str = "cpu"
    """Device of models and dictionary."""

    def __call__(self) -> None:
        """Make the report, print the address, and serve until it is interrupted."""
        from tl_crosscoder.notebook.model_diff import load_diff
        from tl_crosscoder.notebook.serve import serve
        from tl_crosscoder.report.html import ReportSettings

        diff = load_diff(self.dictionary, device=self.device)
        settings = ReportSettings(n_latents=self.n_latents, samples=None)
        served = serve(diff, port=self.port, settings=settings, show_progress=True)
        print(f"{served.url}\nOpen this address on this machine; Ctrl-C ends it.", flush=True)
        served.wait()


@dataclass(frozen=True, kw_only=True)
class Handoff:
    """Write a run for Neuronpedia, SAEDashboard or delphi."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or an embedded dictionary (see `list`)."""
    config: Annotated[HandoffConfig, tyro.conf.OmitArgPrefixes]
    output: str
    """Folder to write; must be new or empty."""
    device: str = "cpu"
    """Device of models and dictionary."""

    def __call__(self) -> None:
        """Run the models over the held-out text, write, and print where."""
        from tl_crosscoder import files
        from tl_crosscoder.integrations.handoff import hand_off
        from tl_crosscoder.run.run import Run

        run = Run(path=Path(self.run), device=self.device)
        output = hand_off(run, self.output, self.config, show_progress=True)
        print(f"Written for {self.config.to} in {output}:\n{files.listing(output)}")


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Let a language model name changes and latents, and score the latents' names by detection.

    Shows what it would ask and sends nothing; with --send it asks. Needs the extra `judge`, and the
    endpoint's key in OPENAI_API_KEY.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or an embedded dictionary (see `list`)."""
    config: Annotated[JudgeConfig, tyro.conf.OmitArgPrefixes]
    send: bool = False
    """Send the requests. Answers are kept: what was answered before is not sent again."""
    device: str = "cpu"
    """Device of models and dictionary."""

    def __call__(self) -> None:
        """Print what would be asked, or ask and print the answers."""
        from tl_crosscoder import files
        from tl_crosscoder.integrations import judging
        from tl_crosscoder.integrations.judge_client import AnswerCache
        from tl_crosscoder.integrations.judge_client import Judge as Client
        from tl_crosscoder.run.run import Run

        run = Run(path=Path(self.run), device=self.device)
        if self.send:
            judged = judging.judge_run(run, self.config, show_progress=True)
            path, changes = run.path / files.JUDGED_CHANGES_NAME, None
            if judging.changes_to_name(run, self.config):
                changes = judging.JudgedChanges.load(path)
            print(judging.judged_text(judged, changes))
            print(f"\nSaved in {run.path / files.JUDGED_NAME}")
            return
        cases = judging.prepare(run, self.config, show_progress=True)
        path = run.path / judging.CACHE_NAME
        with AnswerCache(path if path.is_file() else None) as cache:
            changes = judging.changes_to_name(run, self.config)
            print(judging.plan_text(cases, Client(self.config, cache), changes))
