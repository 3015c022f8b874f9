"""The verbs `handoff` and `judge`: a run in other tools' formats, and names from a language model.

No torch is imported before they run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tl_crosscoder.integrations.config import HandoffConfig, JudgeConfig


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
    """Let a language model name latents, and score the names by detection.

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
        from tl_crosscoder.integrations import judging
        from tl_crosscoder.integrations.judge_client import AnswerCache
        from tl_crosscoder.integrations.judge_client import Judge as Client
        from tl_crosscoder.run.run import Run

        run = Run(path=Path(self.run), device=self.device)
        if self.send:
            print(judging.judged_text(judging.judge_run(run, self.config, show_progress=True)))
            print(f"\nSaved in {run.path / judging.JUDGED_NAME}")
            return
        cases = judging.prepare(run, self.config, show_progress=True)
        path = run.path / judging.CACHE_NAME
        with AnswerCache(path if path.is_file() else None) as cache:
            print(judging.plan_text(cases, Client(self.config, cache)))
