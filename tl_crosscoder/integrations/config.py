"""Settings of `handoff` and `judge`: the same in Python and on the command line.

No torch here: the command line reads these classes to print its help.
"""

import os
import re
from dataclasses import dataclass
from typing import Literal

CREATOR_ID = "clkht01d40000jv08hvalcvly"
"""The user that SAEDashboard's exporter and Neuronpedia's own exports file under by default."""


@dataclass(frozen=True, kw_only=True)
class HandoffConfig:
    """What is handed off to which tool, under which names."""

    to: Literal["neuronpedia", "sae-dashboard", "delphi"]
    """Tool whose format is written."""
    latents: tuple[int, ...] | None = None
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
        names = (self.release, self.set_name, self.model_id or "-")
        for name in names if self.to == "neuronpedia" else ():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(
                    f"{name!r} is not a name on Neuronpedia: use letters, digits, '-' and '_' "
                    "alone."
                )


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """What is judged, by which language model, and how hard it is asked."""

    model: str
    """The judge, as its endpoint names it."""
    base_url: str | None = None
    """An OpenAI-compatible endpoint, such as http://localhost:8000/v1; None is what OPENAI_BASE_URL
    holds, or else OpenAI's."""
    latents: tuple[int, ...] | None = None
    """Latents to judge; None is the first `n` of the ranking."""
    n: int = 10
    """Latents of the ranking to judge, where `latents` is None."""
    n_top: int = 10
    """Examples with the largest activations, shown in the request for a name."""
    n_quantile: int = 10
    """Examples from the quantiles of activations, shown in the request for a name."""
    n_promoted: int = 10
    """Tokens that the latent promotes most, shown in the request for a name; 0 for hooks off the
    residual stream."""
    n_active: int = 20
    """Windows of held-out text with each latent."""
    n_inactive: int = 20
    """Windows of held-out text without each latent."""
    n_hard: int = 0
    """How many of the windows without the latent have another judged latent active."""
    n_quantiles: int = 5
    """Bins of equal counts that the windows with the latent are spread over."""
    n_before: int = 16
    """Tokens of a window before its centre."""
    n_after: int = 8
    """Tokens of a window after its centre."""
    n_per_request: int = 5
    """Windows judged in one request."""
    control: bool = True
    """Judge the windows by another latent's explanation too, which doubles the requests."""
    n_parallel: int = 4
    """Requests under way at once."""
    n_retries: int = 5
    """Times that a request is sent again where the endpoint is busy or out of reach."""
    timeout_s: float = 120.0
    """Longest wait for one answer."""
    seed: int = 0
    """Seed of windows, controls and the judge."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("the judge has no model: name one as its endpoint does.")
        positive = ("n", "n_active", "n_inactive", "n_quantiles", "n_per_request", "n_parallel")
        natural = ("n_top", "n_quantile", "n_promoted", "n_before", "n_after", "n_retries")
        for name in (*positive, *natural):
            least, value = int(name in positive), getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}; it must be {least} or more.")
        if not self.n_top + self.n_quantile:
            raise ValueError("n_top and n_quantile are 0, but a name needs at least one example.")
        if not 0 <= self.n_hard <= self.n_inactive:
            raise ValueError(
                f"n_hard is {self.n_hard}; it must be in [0, n_inactive], {self.n_inactive}."
            )
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s is {self.timeout_s}; it must be above 0.")

    def endpoint(self) -> str:
        """Where requests are sent; empty for the library's default."""
        return self.base_url or os.environ.get("OPENAI_BASE_URL", "")
