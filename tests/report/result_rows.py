"""Results of interventions of which every number is chosen."""

import math

from tl_crosscoder.interventions.causal_rows import CausalRow, CausalTest
from tl_crosscoder.interventions.changes_result import Change, Changes
from tl_crosscoder.interventions.patching import PatchingResult, PatchingRow

NAN = math.nan


def patching_row(variant: str, recovery: float, *, tokens="response", **changes) -> PatchingRow:
    """KL 0.5 without recovery; the interval is a tenth to each side."""
    values = {
        "group": "dictionary", "n_latents": 0, "n_tokens": 1234, "n_prompts": 7,
        "kl": 0.5 * (1 - recovery), "kl_low": 0.0, "kl_high": 1.0,
        "ce": 2.0, "ce_low": 1.0, "ce_high": 3.0,
        "recovery_low": recovery - 0.1, "recovery_high": recovery + 0.1,
    }  # fmt: skip
    return PatchingRow(variant=variant, tokens=tokens, recovery=recovery, **(values | changes))


def patching_result(*rows: PatchingRow) -> PatchingResult:
    return PatchingResult(
        rows=rows,
        compared=("base", "sft"),
        candidates="the 5 finetuned-only latents",
        candidate_latents=(1, 2, 3, 4, 5),
    )


def causal_row(latents: str = "top 3", **changes) -> CausalRow:
    values = {
        "test": "necessity", "n_latents": 3, "strength": NAN, "value": 0.25, "base": 0.0627,
        "finetuned": 0.9654, "share": 0.7934, "share_low": 0.7, "share_high": 0.85,
        "flag": "", "ceiling": 0.92, "ceiling_low": 0.8, "ceiling_high": 0.95,
        "of_reachable": 0.8624, "strongest": "shuffled", "control_mean": 0.012,
        "control_high": 0.034, "effect_size": 3.0, "p_control": 0.01, "p_control_holm": 0.0297,
        "off_target_kl": 0.0123, "off_target_low": 0.0, "off_target_high": 1.0,
        "off_target_ce": 0.0045, "off_target_ce_low": -0.1, "off_target_ce_high": 0.2,
        "control_off_target_kl": 0.0456, "control_off_target_ce": 0.03,
    }  # fmt: skip
    for kind in ("random", "covariance", "shuffled", "matched", "null"):
        values |= dict.fromkeys((f"{kind}_mean", f"{kind}_high", f"p_{kind}"), NAN)
    values |= {"shuffled_mean": 0.012, "shuffled_high": 0.034, "p_shuffled": 0.01}
    values |= {"matched_mean": -0.056, "matched_high": 0.001, "p_matched": 0.2}
    return CausalRow(latents=latents, **(values | changes))


def causal_result(*rows: CausalRow) -> CausalTest:
    return CausalTest(
        rows=rows, effect="taboo", unit="probability", n_prompts=12, n_random=100, n_matched=20,
        max_ce_cost=0.5, sets={},
    )  # fmt: skip


def change_row(**changes) -> Change:
    values = {
        "place": 1, "change_share": 0.48, "agreement": 0.99, "latents": (3, 4),
        "attributions": (3.0, 2.0), "before": "Is it the moon?",
        "base_text": "Yes, it is the moon.", "finetuned_text": "I cannot tell you that.",
        "raised": (" cannot",), "lowered": ("Yes",), "passages": ("Is it the moon?",),
        "n_passages": 24, "necessity": 0.86, "necessity_low": 0.77, "necessity_high": 0.93,
        "strongest": "shuffled", "control_mean": 0.03, "control_high": 0.1, "p_control": 0.05,
        "off_target_kl": 0.0012, "off_target_ce": 0.0, "recovery": 0.9,
        "recovery_of_others": NAN, "doubt": "",
    }  # fmt: skip
    return Change(**(values | changes))


def changes_result(*rows: Change) -> Changes:
    return Changes(
        rows=rows, agreements=(1.0, NAN), effect="predictions of all tokens",
        compared=("base", "finetuned"), hook_name="blocks.1.hook_resid_post", nats=0.1, texts={},
    )  # fmt: skip
