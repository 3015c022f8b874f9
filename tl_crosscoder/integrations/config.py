"""Settings of `handoff` and `judge`: the same in Python and on the command line.

No torch here: the command line reads these classes to print its help.
"""

import os
import re
from dataclasses import dataclass
from typing import Literal

from tl_crosscoder.config.settings import NaturalInt, PositiveFloat, PositiveInt, Settings

CREATOR_ID = "clkht01d40000jv08hvalcvly"
"""The user that SAEDashboard's exporter and Neuronpedia's own exports file under by default."""


@dataclass(frozen=True, kw_only=True)
class HandoffConfig(Settings):
    """What is handed off to which tool, under which names."""

    to: Literal["neuronpedia", "sae-dashboard", "delphi"]
    """Tool whose format is written."""
    latents: tuple[NaturalInt, ...] | None = None
    """Only these latents; None is all that are active on the held-out text."""
    site: str | None = None
    """Dashboards: whose directions and logits are shown; None is the fine-tuned model's."""
    model_id: str | None = None
    """Dashboards: the model's name there, such as gemma-2-2b-it; None is the end of its name."""
    set_name: str = "tl-crosscoder"
    """Dashboards: the set of dictionaries it belongs to."""
    release: str = "tl-crosscoder"
    """Neuronpedia: name of the release, in letters, digits and dashes."""
    title: str = "Crosscoder latents"
    """Neuronpedia: title of the release."""
    creator: str = "tl_crosscoder"
    """Neuronpedia: who made it."""
    creator_id: str = CREATOR_ID
    """Neuronpedia: a user's id in that database."""
    url: str = ""
    """Neuronpedia: address of the paper or the project."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = (self.release, self.set_name, self.model_id or "-")
        for name in names if self.to == "neuronpedia" else ():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(
                    f"{name!r} is not a name on Neuronpedia: use letters, digits, '-' and '_' "
                    "alone."
                )


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(Settings):
    """What is judged, by which language model, and how hard it is asked."""

    model: str
    """The judge, as its endpoint names it."""
    base_url: str | None = None
    """An OpenAI-compatible endpoint, such as http://localhost:8000/v1; None is what OPENAI_BASE_URL
    holds, or else OpenAI's."""
    latents: tuple[NaturalInt, ...] | None = None
    """Latents to judge; None is the first `n` of the ranking."""
    n: PositiveInt = 10
    """Latents of the ranking to judge, where `latents` is None."""
    changes: bool = True
    """Name the changes of the run's folder as well, where it has any."""
    n_top: NaturalInt = 10
    """Examples with the largest activations, shown in the request for a name."""
    n_quantile: NaturalInt = 10
    """Examples from the quantiles of activations, shown in the request for a name."""
    n_promoted: NaturalInt = 10
    """Tokens that the latent promotes most, shown in the request for a name; 0 for hooks off the
    residual stream."""
    n_active: PositiveInt = 20
    """Windows of held-out text with each latent."""
    n_inactive: PositiveInt = 20
    """Windows of held-out text without each latent."""
    n_hard: NaturalInt = 0
    """How many of the windows without the latent have another judged latent active."""
    n_quantiles: PositiveInt = 5
    """Bins of equal counts that the windows with the latent are spread over."""
    n_before: NaturalInt = 16
    """Tokens of a window before its centre."""
    n_after: NaturalInt = 8
    """Tokens of a window after its centre."""
    n_per_request: PositiveInt = 5
    """Windows judged in one request."""
    control: bool = True
    """Judge the windows by another latent's explanation too, which doubles the requests."""
    n_parallel: PositiveInt = 4
    """Requests under way at once."""
    n_retries: NaturalInt = 5
    """Times that a request is sent again where the endpoint is busy or out of reach."""
    timeout_s: PositiveFloat = 120.0
    """Longest wait for one answer."""
    seed: NaturalInt = 0
    """Seed of windows, controls and the judge."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ValueError("the judge has no model: name one as its endpoint does.")
        if not self.n_top + self.n_quantile:
            raise ValueError("n_top and n_quantile are 0, but a name needs at least one example.")
        if self.n_hard > self.n_inactive:
            raise ValueError(
                f"n_hard is {self.n_hard}; it must be in [0, n_inactive], {self.n_inactive}."
            )

    def endpoint(self) -> str:
        """Where requests are sent; empty for the library's default."""
        return self.base_url or os.environ.get("OPENAI_BASE_URL", "")
