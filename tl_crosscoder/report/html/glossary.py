"""What the report's numbers mean, with units and sources, and what they do not show.

Contract: terms by a key that the templates and the page's script name; plain text. Limit: one line
a term; the formulas are in `docs/concepts.md`, `docs/measures.md` and `docs/interventions.md`.
"""

from tl_crosscoder.analysis.latents import MIN_ACTIVE_TOKENS
from tl_crosscoder.report.html.data import ReportData
from tl_crosscoder.report.html.prompts import N_CANDIDATES

GLOSSARY = (
    "d_sae", "fve", "difference_fve", "difference_share", "l0", "dead_share", "latent_class",
    "relative_decoder_norm", "delta_norm", "decoder_norm", "decoder_cosine", "encoder_cosine",
    "score", "explained_difference", "explained_difference_drop", "nu_error", "nu_reconstruction",
    "is_specific", "n_active", "active_share", "template_share", "main_role", "code", "quantile",
    "logit", "kl", "recovery", "necessity", "insert", "steer", "random_mean", "p_random_holm",
    "off_target_kl", "strength", "ablation", "interval",
)  # fmt: skip
"""Measures that the page explains."""


def limits(data: ReportData) -> list[tuple[str, str]]:
    """What the numbers do not show: (what, why)."""
    shown = f"{len(data.latents):,} of {data.dictionary.d_sae:,} latents"
    found = [
        (
            f"Only {shown} are here",
            f"The first by {data.order}; latents active on fewer than {MIN_ACTIVE_TOKENS} held-out "
            "tokens are not ranked. `tl-crosscoder analyze --latent J` shows any of them.",
        ),
        (
            "Measures are no causes",
            "Norms, scaling and the share of the difference say which latents to test. Whether "
            "they cause what the fine-tune does is in the section on causes, if it was tested.",
        ),
        (
            "Rates and examples are of one text",
            f"{data.dictionary.n_tokens:,} held-out tokens from the same sources as the training "
            "text. A latent that is silent here may fire elsewhere.",
        ),
        (
            "One dictionary of one seed",
            "Another seed gives other latents. `tl-crosscoder analyze --seeds` tells how many of "
            "these are found again.",
        ),
        (
            "One hook point",
            "What the fine-tune does in the layers above the hook is in no latent and no patch.",
        ),
        (
            "The effect on the logits is direct",
            "Layers between the hook and the unembedding are skipped; far from the last layer it "
            "says little.",
        ),
    ]
    if data.samples is not None:
        found.append(
            (
                "Samples are anecdotes",
                f"Greedy, and after few prompts: of up to {N_CANDIDATES} held-out ones, first "
                "those after which the two models differ. They show what can happen, not how "
                "often.",
            )
        )
    if data.causes.sections:
        found.append(
            (
                "A p-value has a floor",
                "With n random controls it is 1 / (n + 1) or more; sets were chosen by a ranking "
                "on the same kind of text, not on the prompts of the test.",
            )
        )
    return found
