"""`Judged`: names, explanations and scores of latents, in the run's folder as `judged.json`.

Contract: a row a latent; each score stands beside that of the same windows judged by the
explanation of another latent. Limit: what is not scored (no name, no windows, no control) is NaN.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from tl_crosscoder.results.tables import TableOfRows

JUDGED_NAME = "judged.json"


@dataclass(frozen=True, kw_only=True)
class JudgedLatent:
    """A latent, what it is called, and how well that tells where it is active."""

    latent: int
    name: str
    """Empty where the judge gave none that could be read."""
    explanation: str
    detection: float
    """Balanced accuracy on held-out windows; 0.5 is chance."""
    low: float
    """Lower end of its 95 % interval."""
    high: float
    control: float
    """The same windows, judged by the explanation of latent `control_of`."""
    control_of: int | None
    n_active: int
    """Windows with the latent."""
    n_inactive: int
    """Windows without it."""
    n_read: int
    """Windows with an answer that could be read."""
    n_read_control: int


@dataclass(frozen=True, kw_only=True)
class Judged(TableOfRows):
    """Latents in the order in which they were judged."""

    ROW: ClassVar[type] = JudgedLatent
    rows: tuple[JudgedLatent, ...]
    model: str
    """The judge, as its endpoint names it."""
    seed: int
    n_hard: int
    """Windows without the latent in which another judged one was active."""

    def mean(self, measure: Callable[[JudgedLatent], float]) -> float:
        """Mean of a score over the latents that have it; NaN where none has."""
        known = [v for v in map(measure, self.rows) if not math.isnan(v)]
        return fmean(known) if known else math.nan
