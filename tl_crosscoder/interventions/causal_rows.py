"""`CausalTest`: the table of causal tests, a row a set of latents and test.

Contract: plain values, saved as JSON; shares are of the change from base to fine-tuned model, costs
in nats a token of neutral text; `flag` says why a share must not be read as a plain one. Limit: a
kind of control has mean, 95th percentile and p-value, not its draws.
"""

from dataclasses import dataclass
from typing import ClassVar

from tl_crosscoder.results.tables import TableOfRows

NOTHING_PASSES = "nothing passes this hook"
FLAGS = {
    NOTHING_PASSES: "replacing the whole activation changes less than 5 % of the "
    "effect, or its interval holds 0",
    "broken model": "the edit raises the cross-entropy of neutral text beyond the bound, so the "
    "behaviour may be gone with everything else",
    "above 100 %": "more than the whole change from one model to the other",
    "broken control": "the model is broken under the strongest control",
    "control above 100 %": "the strongest control, or its 95th percentile, does more than the "
    "whole change",
}
"""Why a share must not be read as a plain one."""


@dataclass(frozen=True, kw_only=True)
class CausalRow:
    """One set of latents in one test; `share` is of the change from base to fine-tuned model."""

    test: str
    """`necessity`, `insert` or `steer`; the last two are sufficiency."""
    latents: str
    """Name of the set, or of a method without latents."""
    n_latents: int
    """Latents, or directions of a method that is compared with them; else 0."""
    strength: float
    """alpha of steering, else NaN."""
    value: float
    """Mean of the effect over prompts under the edit, such as the probability of a behaviour."""
    base: float
    """Mean of the effect in the base model as it is."""
    finetuned: float
    """Mean of the effect in the fine-tuned model as it is."""
    share: float
    """Share of the change that is removed (necessity) or induced (sufficiency)."""
    share_low: float
    share_high: float
    flag: str
    """Why the share must not be read as a plain one, among `FLAGS`; empty where it may."""
    ceiling: float
    """Share for the whole activation of the other model at this hook: what can be reached there."""
    ceiling_low: float
    ceiling_high: float
    of_reachable: float
    """share / ceiling; NaN where nothing passes the hook."""
    strongest: str
    """The strongest kind of control, that of the highest mean share; empty without any."""
    control_mean: float
    """Its mean share."""
    control_high: float
    """Its 95th percentile."""
    effect_size: float
    """Standard deviations of the strongest controls above their mean."""
    p_control: float
    """p-value among the strongest controls."""
    p_control_holm: float
    """`p_control`, corrected for the number of sets in this test."""
    random_mean: float
    """Mean share of isotropic directions; mean, 95th percentile and p-value of a kind that was not
    run are NaN."""
    random_high: float
    p_random: float
    covariance_mean: float
    """Mean share of directions with the covariance of x^1 - x^0."""
    covariance_high: float
    p_covariance: float
    shuffled_mean: float
    """Mean share of other latents' rows at the same codes."""
    shuffled_high: float
    p_shuffled: float
    matched_mean: float
    """Mean share of other latents of the same firing rate; NaN of steering."""
    matched_high: float
    p_matched: float
    null_mean: float
    """Mean share of directions of a null pair's dictionary."""
    null_high: float
    p_null: float
    off_target_kl: float
    """KL to the unedited model on neutral text, nats a token."""
    off_target_low: float
    off_target_high: float
    off_target_ce: float
    """Cross-entropy of neutral text, edited minus unedited model, nats a token."""
    off_target_ce_low: float
    off_target_ce_high: float
    control_off_target_kl: float
    """Mean of the strongest controls."""
    control_off_target_ce: float
    """Mean of the strongest controls."""

    def doubt(self, *, max_p: float = 0.05) -> str:
        """Why the share proves nothing; empty where it does."""
        if self.flag:
            return self.flag
        if not (self.p_control <= max_p and self.share > self.control_high):
            return "controls do as much"
        return "" if self.share_low > 0 else "the interval holds 0"


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
    max_ce_cost: float
    """Bound of `off_target_ce` above which a model is called broken."""
    sets: dict[str, list[int]]
    """The latents of each set."""
