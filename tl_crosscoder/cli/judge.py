"""The verbs `handoff` and `judge`: a run in other tools' formats, and names from a language model.

No torch is imported before they run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Handoff:
    """Write a run for Neuronpedia, SAEDashboard or delphi."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or an embedded dictionary (see `list`)."""
    to: Literal["neuronpedia", "sae-dashboard", "delphi"]
    """Whose format."""
    output: str
    """Folder to write; must be new or empty."""
    latents: tuple[int, ...] | None = None
    """Only these latents; none are all that are active on the held-out text."""
    site: str | None = None
    """Dashboards: whose directions and logits are shown. None is the fine-tuned model's."""
    model_id: str | None = None
    """Dashboards: the model's name there, such as gemma-2-2b-it. None is the end of its name."""
    set_name: str = "tl-crosscoder"
    """Dashboards: the set of dictionaries it belongs to."""
    release: str = "tl-crosscoder"
    """Neuronpedia: name of the release, in letters, digits and dashes."""
    title: str = "Crosscoder latents"
    """Neuronpedia: title of the release."""
    creator: str = "tl_crosscoder"
    """Neuronpedia: who made it."""
    creator_id: str | None = None
    """Neuronpedia: a user's id in that database. None is its default user."""
    url: str = ""
    """Neuronpedia: address of the paper or the project."""
    device: str = "cpu"
    """Device of models and dictionary."""

    def __call__(self) -> None:
        """Run the models over the held-out text, write, and say where."""
        from tl_crosscoder.integrations.handoff import HandoffSettings, hand_off
        from tl_crosscoder.integrations.neuronpedia import CREATOR_ID, Release
        from tl_crosscoder.run.run import Run

        release = Release(
            name=self.release,
            title=self.title,
            creator=self.creator,
            creator_id=self.creator_id or CREATOR_ID,
            url=self.url,
        )
        settings = HandoffSettings(
            latents=self.latents,
            site=self.site,
            model_id=self.model_id,
            set_name=self.set_name,
            release=release,
        )
        run = Run(path=Path(self.run), device=self.device)
        output = hand_off(run, self.output, to=self.to, settings=settings, show_progress=True)
        print(f"Written for {self.to} in {output}:")
        for path in sorted(p for p in output.rglob("*") if p.is_file()):
            print(f"  {path.relative_to(output)!s:<60} {path.stat().st_size / 1e3:8,.0f} kB")


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Let a language model name latents, and score the names by detection.

    Says what it would ask and sends nothing; with --send it asks. Needs the extra `judge`, and the
    endpoint's key in OPENAI_API_KEY.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or an embedded dictionary (see `list`)."""
    model: str
    """The judge, as its endpoint names it."""
    base_url: str | None = None
    """An OpenAI-compatible endpoint, such as http://localhost:8000/v1. None is OpenAI's."""
    send: bool = False
    """Send the requests. Answers are kept: what was answered before is not sent again."""
    latents: tuple[int, ...] | None = None
    """Latents to judge; none are the first of the ranking."""
    n: int = 10
    """How many of the ranking."""
    n_active: int = 20
    """Windows of held-out text with each latent."""
    n_inactive: int = 20
    """Windows without it."""
    n_hard: int = 0
    """Of those without it, so many in which another judged latent is active."""
    n_per_request: int = 5
    """Windows judged in one request."""
    n_promoted: int = 10
    """Tokens that the latent promotes most, shown for its name; 0 for hooks off the residual
    stream."""
    control: bool = True
    """Judge the windows by another latent's explanation too, which doubles the requests."""
    n_parallel: int = 4
    """Requests under way at once."""
    seed: int = 0
    """Of windows, controls and the judge."""
    device: str = "cpu"
    """Device of models and dictionary."""

    def __call__(self) -> None:
        """Print what would be asked, or ask and print what was said."""
        from tl_crosscoder.integrations.judge import judging
        from tl_crosscoder.integrations.judge.client import AnswerCache, Endpoint
        from tl_crosscoder.integrations.judge.client import Judge as Client
        from tl_crosscoder.integrations.judge.judging import judged_table, plan_text
        from tl_crosscoder.integrations.judge.naming import WindowSettings
        from tl_crosscoder.run.run import Run

        windows = WindowSettings(
            n_active=self.n_active, n_inactive=self.n_inactive, n_hard=self.n_hard, seed=self.seed
        )
        settings = judging.JudgeSettings(
            latents=self.latents,
            n_latents=self.n,
            n_promoted=self.n_promoted,
            windows=windows,
            n_per_request=self.n_per_request,
            is_controlled=self.control,
        )
        endpoint = Endpoint(
            model=self.model, base_url=self.base_url, seed=self.seed, n_parallel=self.n_parallel
        )
        run = Run(path=Path(self.run), device=self.device)
        if self.send:
            print(judged_table(judging.judge_run(run, endpoint, settings, show_progress=True)))
            print(f"\nSaved in {run.path / judging.JUDGED_NAME}")
            return
        cases = judging.prepare(run, settings, show_progress=True)
        path = judging.cache_path(run.path)
        with AnswerCache(path if path.is_file() else None) as cache:
            print(plan_text(judging.plan(cases, Client(endpoint, cache), settings), self.model))
