"""What trials found: a row a trial, an interval and its controls in each.

Contract: `share` is of the change from base to fine-tuned model, in the direction of the test.
Limit: plain numbers; what they mean is in `trials`.
"""

from dataclasses import dataclass
from typing import ClassVar

from tl_crosscoder.tables import TableOfRows


@dataclass(frozen=True, kw_only=True)
class CausalRow:
    """One set of latents in one test; `share` is of the change from base to fine-tuned model."""

    test: str
    """`necessity`, `insert` or `steer`; the last two are sufficiency."""
    latents: str
    """Name of the set."""
    n_latents: int
    strength: float
    """alpha of steering, else NaN."""
    value: float
    """Mean of the effect over prompts under the edit, such as the probability of a behaviour."""
    base: float
    """The same of the base model as it is."""
    finetuned: float
    """Of the fine-tuned one."""
    share: float
    """How much of the change goes (necessity) or comes (sufficiency)."""
    share_low: float
    share_high: float
    random_mean: float
    """Mean share of random directions."""
    random_high: float
    """95th percentile of them."""
    effect_size: float
    """Standard deviations of the random directions above their mean."""
    p_random: float
    """Random directions that do as much."""
    p_random_holm: float
    """The same, corrected for the number of sets in this test."""
    matched_mean: float
    """Mean share of random latents of the same firing rate; NaN of steering."""
    p_matched: float
    null_mean: float
    """Mean share of directions of a null pair's dictionary; NaN without one."""
    off_target_kl: float
    """KL to the unedited model on neutral text, nats a token."""
    off_target_low: float
    off_target_high: float
    random_off_target_kl: float
    """Mean of the random directions."""


@dataclass(frozen=True, kw_only=True)
class CausalTest(TableOfRows):
    """Every set in every test, and what the models do unedited."""

    ROW: ClassVar[type] = CausalRow
    rows: tuple[CausalRow, ...]
    effect: str
    """What was measured."""
    unit: str
    """What its values are."""
    n_prompts: int
    n_random: int
    n_matched: int
    sets: dict[str, list[int]]
    """The latents of each set."""
