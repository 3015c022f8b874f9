"""What the report's numbers mean, with units and sources, and what they do not show.

Contract: terms by a key that the templates and the page's script name; plain text. Limit: one line
a term; the formulas are in `docs/concepts.md`, `docs/measures.md` and `docs/interventions.md`.
"""

from dataclasses import dataclass

from tl_crosscoder.analysis.latents import MIN_ACTIVE_TOKENS
from tl_crosscoder.report.html.data import ReportData
from tl_crosscoder.report.html.prompts import N_CANDIDATES

_MINDER = "Minder et al. 2025, arXiv 2504.02922"


@dataclass(frozen=True, kw_only=True)
class Term:
    """One number's name."""

    name: str
    unit: str
    meaning: str
    source: str = ""


GLOSSARY = {
    "d_sae": Term(name="latents", unit="count", meaning="Size of the dictionary."),
    "fve": Term(
        name="FVE",
        unit="share",
        meaning="Share of a site's variance over held-out tokens that the dictionary explains.",
    ),
    "difference_fve": Term(
        name="FVE of the difference",
        unit="share",
        meaning="Share of the variance of what the fine-tune added, x¹ - x⁰, that the dictionary "
        "explains: the number to watch, since the "
        "difference is often a few percent of the variance.",
    ),
    "difference_share": Term(
        name="size of the difference",
        unit="share",
        meaning="Variance of x¹ - x⁰ over that of the fine-tuned site.",
    ),
    "l0": Term(name="L0", unit="latents a token", meaning="Mean number of active latents."),
    "dead": Term(
        name="dead", unit="share", meaning="Latents that are active on no held-out token."
    ),
    "class": Term(
        name="class",
        unit="",
        meaning="By Delta-norm: finetuned-only from 0.9, base-only to 0.1, shared 0.4 to 0.6, "
        "the rest other.",
        source=_MINDER,
    ),
    "R": Term(
        name="R",
        unit="0 to 1",
        meaning="Relative decoder norm ‖d¹‖ / (‖d⁰‖ + ‖d¹‖): 1 writes to the fine-tuned model "
        "alone, 0.5 to both alike, 0 to the base alone.",
        source="Kassem et al. 2026, arXiv 2603.04426",
    ),
    "delta_norm": Term(
        name="Delta-norm",
        unit="0 to 1",
        meaning="½ (1 + (‖d¹‖ - ‖d⁰‖) / max): 1 fine-tuned only, 0 base only.",
        source=_MINDER,
    ),
    "norm": Term(
        name="decoder norm",
        unit="length",
        meaning="‖dᵐ‖, of what one unit of code writes to a site, where both sites are scaled to "
        "one size.",
    ),
    "cosine": Term(
        name="cosine",
        unit="-1 to 1",
        meaning="Between the latent's two decoder rows: 1 writes the same direction to both.",
    ),
    "encoder_cosine": Term(
        name="encoder cosine",
        unit="-1 to 1",
        meaning="Between its two encoder columns: 1 reads the same direction in both.",
    ),
    "score": Term(
        name="score",
        unit="share",
        meaning="R times the share of the difference that the latent says alone; latents are "
        "ranked by it.",
        source="ours",
    ),
    "alone": Term(
        name="says",
        unit="share",
        meaning="Share of the variance of x¹ - x⁰ that goes if only this latent speaks. Latents "
        "overlap, so shares do not add up; below 0 it misleads.",
        source="ours",
    ),
    "lost": Term(
        name="lost without",
        unit="share",
        meaning="Share of that variance that is left unexplained besides if only this latent is "
        "silent.",
        source="ours",
    ),
    "nu_error": Term(
        name="nu error",
        unit="ratio",
        meaning="Latent Scaling: how much of the latent's direction the base model's error needs, "
        "over the fine-tuned model's. 0 is not in the base, 1 is in both; high is Complete "
        "Shrinkage.",
        source=_MINDER,
    ),
    "nu_reconstruction": Term(
        name="nu reconstruction",
        unit="ratio",
        meaning="Latent Scaling of the reconstructions, base over fine-tuned: 0 is not in the "
        "base, 1 is in both; high is Latent Decoupling.",
        source=_MINDER,
    ),
    "specific": Term(
        name="specific",
        unit="count",
        meaning="|nu error| < 0.2 and |nu reconstruction| < 0.5; the same count for random "
        "directions says what to expect by chance.",
        source=_MINDER,
    ),
    "fires": Term(
        name="fires", unit="share", meaning="Held-out tokens on which the latent is active."
    ),
    "template": Term(
        name="template",
        unit="share",
        meaning="Of its active tokens, those that belong to the chat template.",
        source=_MINDER,
    ),
    "role": Term(
        name="role",
        unit="",
        meaning="Whose the tokens are: text, system, user, assistant, tool or the chat template. A "
        "latent has a role if more than half of its active tokens have it.",
    ),
    "code": Term(name="code", unit="activation", meaning="f, how active the latent is on a token."),
    "quantile": Term(
        name="fifths",
        unit="",
        meaning="A sample of its active tokens in five bins from weak to strong: the largest codes "
        "alone flatter a latent.",
    ),
    "logits": Term(
        name="effect on the logits",
        unit="logits",
        meaning="Tokens that a unit of code promotes or suppresses directly through the "
        "unembedding, centred over the vocabulary, before the division by the stream's RMS: d⁰ "
        "read by the base model, d¹ and d¹ - d⁰ by the fine-tuned one.",
        source="nostalgebraist 2020; Elhage et al. 2021",
    ),
    "kl": Term(
        name="KL", unit="nats a token", meaning="KL(p of the fine-tuned model ‖ p of the patched)."
    ),
    "recovery": Term(
        name="KL recovery",
        unit="share",
        meaning="1 - KL / KL of the base stream: how much of the fine-tune, as predictions, passes "
        "through the patched latents. Below 0 is worse than the base stream.",
        source=_MINDER,
    ),
    "necessity": Term(
        name="necessity",
        unit="share",
        meaning="How much of the change from base to fine-tuned model goes if the latents are "
        "taken out of the fine-tuned one.",
    ),
    "insert": Term(
        name="sufficiency",
        unit="share",
        meaning="How much of that change comes if what the latents add is put into the base model.",
    ),
    "random": Term(
        name="random",
        unit="share",
        meaning="What random directions of the same norms do, with the same codes, "
        "which is what chance does.",
    ),
    "steering": Term(
        name="steered",
        unit="strength",
        meaning="The base model with the latent's fine-tuned direction added at every token, in "
        "multiples of the mean norm of its stream.",
    ),
    "ablation": Term(
        name="without",
        unit="",
        meaning="The fine-tuned model without what the fine-tune added to the latent: "
        "x¹ - f (d¹ - d⁰).",
        source=_MINDER,
    ),
    "interval": Term(name="[low, high]", unit="", meaning="95 % bootstrap interval over prompts."),
}


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
    if data.causes.tables:
        found.append(
            (
                "A p-value has a floor",
                "With n random controls it is 1 / (n + 1) or more; sets were chosen by a ranking "
                "on the same kind of text, not on the prompts of the test.",
            )
        )
    return found
