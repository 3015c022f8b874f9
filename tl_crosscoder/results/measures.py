"""`MEASURES`: every number that this package reports, with its unit, its meaning and its source.

Contract: one `Measure` a field of a result, by the field's name. The terminal, notebooks, the HTML
report's glossary, dictionary cards and the documentation read this table, so that a number is
explained once. Superscript 0 is the base, 1 the fine-tuned model: x is a site's activation, d the
decoder row of a latent, f its activation. Limit: formulas in one line; `docs/measures.md` has more.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measure:
    """How one field of a result is called and shown."""

    name: str
    meaning: str = ""
    unit: str = ""
    form: str | None = field(default=None, kw_only=True)
    """Format of its numbers; `token` is text whose spaces matter; None is found from the values."""
    symbol: str = field(default="", kw_only=True)
    source: str = field(default="", kw_only=True)

    @property
    def label(self) -> str:
        """Heading of a column: the symbol where there is one."""
        return self.symbol or self.name

    @property
    def explanation(self) -> str:
        """Unit and meaning, for a text that appears beside the name."""
        return f"{self.unit}: {self.meaning}" if self.unit and self.meaning else self.meaning


_SHARE, _COUNT, _NUMBER = ".2%", ",.0f", ".3f"
_MINDER = "Minder et al. 2025, arXiv 2504.02922"
_KASSEM = "Kassem et al. 2026, arXiv 2603.04426"
_LENS = "nostalgebraist 2020; Elhage et al. 2021"
_P = "Share of the controls that do as much, at least 1 / (n + 1) of n controls, for"
_CONTROLS = {
    "random": "random directions",
    "covariance": "directions with the covariance of x¹ - x⁰",
    "shuffled": "other latents' rows",
    "matched": "latents that are active as often",
    "null": "directions of a null pair",
}
_ROLES = {
    "text": "tokens of plain text",
    **{r: f"tokens of the {r}'s messages" for r in ("system", "user", "assistant", "tool")},
    "template": "tokens of the chat template",
}

# A table is read by its columns, so it is wrapped by hand.
# fmt: off
MEASURES: dict[str, Measure] = {
    "": Measure("", "Index, from 0.", form="d"),

    # --- a dictionary as a whole ---
    "d_sae": Measure("latents", "Size of the dictionary.", "count", form=_COUNT),
    "fve": Measure("fraction of variance explained",
        "Fraction of a site's variance over held-out tokens that the dictionary explains.",
        "share", symbol="FVE", form=_NUMBER),
    "difference_fve": Measure("FVE of the difference",
        "Fraction of the variance of x¹ - x⁰, what the fine-tune added, that the dictionary "
        "explains: the number to watch, since the difference is often a few percent of the "
        "variance.", "share", form=_NUMBER),
    "difference_share": Measure("size of the difference",
        "Variance of x¹ - x⁰ over that of the fine-tuned site.", "share", form=".1%"),
    "difference_fve_by_class": Measure("explained difference",
        "Fraction of the variance of x¹ - x⁰ that the latents of one class explain alone.",
        "share", form=_NUMBER),
    "l0": Measure("L0", "Mean number of active latents.", "latents a token", form=".1f"),
    "dead_share": Measure("dead",
        "Latents that are active on no held-out token.", "share", form=".1%"),
    "n_active_latents": Measure("active latents",
        "Latents that are active on at least one held-out token.", "count", form=_COUNT),

    # --- one latent: where it writes ---
    "place": Measure("place", "Place in the ranking.", symbol="#", form=_COUNT),
    "latent": Measure("latent", "Index in the dictionary.", form="d"),
    "relative_decoder_norm": Measure("relative decoder norm",
        "‖d¹‖ / (‖d⁰‖ + ‖d¹‖): 1 writes to the fine-tuned model alone, 0.5 to both alike, 0 to "
        "the base alone.", "0 to 1", symbol="R", form=_NUMBER, source=_KASSEM),
    "delta_norm": Measure("Delta-norm",
        "½ (1 + (‖d¹‖ - ‖d⁰‖) / max(‖d⁰‖, ‖d¹‖)): 1 is fine-tuned only, 0 base only.",
        "0 to 1", form=_NUMBER, source=_MINDER),
    "latent_class": Measure("class",
        "By Delta-norm: finetuned-only from 0.9, base-only up to 0.1, shared 0.4 to 0.6, the rest"
        " other.", source=_MINDER),
    "decoder_norm": Measure("decoder norm",
        "‖dᵐ‖: what a latent activation of 1 writes to a site, where both sites are scaled to one"
        " size.", "length", symbol="‖d‖", form=_NUMBER),
    "decoder_cosine": Measure("cosine",
        "Between the latent's decoder rows of the two models: 1 writes the same direction to both.",
        "-1 to 1", form="+.2f"),
    "encoder_cosine": Measure("encoder cosine",
        "Between the latent's encoder columns: 1 reads the same direction in both models.",
        "-1 to 1", form="+.2f"),
    "cosine": Measure("cosine", "Between two directions.", "-1 to 1", form="+.2f"),
    "finetuned_only": Measure("fine-tuned only", "Index of a latent of that class.", form="d"),
    "base_only": Measure("base only", "Index of a latent of that class.", form="d"),
    "neighbour": Measure("neighbour", "Index of a latent.", form="d"),

    # --- one latent: what it explains ---
    "score": Measure("score",
        "R times the explained difference: the default order of latents where no models are at "
        "hand.",
        "share", form=".4f", source="ours"),
    "explained_difference": Measure("explained difference",
        "Share of the variance of x¹ - x⁰ that this latent explains alone. Latents overlap, so "
        "shares do not add up; below 0 the latent points away from the difference.",
        "share", form=_SHARE, source="ours"),
    "explained_difference_drop": Measure("drop when left out",
        "Further share of that variance that is left unexplained if only this latent is left out.",
        "share", form=_SHARE, source="ours"),
    "nu_error": Measure("nu error",
        "Latent Scaling: how much of the latent's direction is in the base model's error, over "
        "the fine-tuned model's. 0 is not in the base, 1 is in both; high is Complete Shrinkage.",
        "ratio", form=".2f", source=_MINDER),
    "nu_reconstruction": Measure("nu reconstruction",
        "Latent Scaling of the reconstructions, base over fine-tuned: 0 is not in the base, 1 is "
        "in both; high is Latent Decoupling.", "ratio", form=".2f", source=_MINDER),
    "is_specific": Measure("specific",
        "|nu error| < 0.2 and |nu reconstruction| < 0.5; the count for random directions is what "
        "to expect by chance.", "count", form=_COUNT, source=_MINDER),

    # --- one latent: when it is active ---
    "n_active": Measure("active tokens",
        "Held-out tokens on which it is active.", "count", form=_COUNT),
    "active_share": Measure("active",
        "Held-out tokens on which it is active.", "share", form=_SHARE),
    "template_share": Measure("template",
        "Of the tokens on which it is active, those that belong to the chat template.",
        "share", form=".0%", source=_MINDER),
    "main_role": Measure("mostly on",
        "Kind of the tokens on which it is active: text, system, user, assistant, tool or the "
        "chat template; a kind has more than half of them, else it is mixed."),
    "code": Measure("activation",
        "f, how active the latent is on a token.", "activation", symbol="f", form=".2f"),
    "max_code": Measure("max activation", "Largest activation.", "activation", form=_NUMBER),
    "quantile": Measure("fifths",
        "Sample of the tokens on which it is active, in five bins from weak to strong: the "
        "largest activations alone flatter a latent."),
    "example": Measure("example", "A token in its context.", form="token"),
    "n_on_token": Measure("on it", "Examples where the text is on the token itself.", form=_COUNT),
    "n_near": Measure("near", "Examples with the text in their window.", form=_COUNT),
    "n_examples": Measure("examples", "Examples that are stored of the latent.", form=_COUNT),

    # --- tokens that a direction promotes ---
    "token": Measure("token", form="token"),
    "token_id": Measure("id", "Index in the vocabulary.", form="d"),
    "is_promoted": Measure("promoted", "Else suppressed."),
    "mined_share": Measure("share",
        "Share of positions of neutral text at which the token is among those that the fine-tune "
        "raises most.", "share", form=".1%"),
    "mined_rise": Measure("rise", "Mean of l¹ - l⁰ at these positions.", "logits", form=".2f"),
    "prefill": Measure("begins", "Random beginning, from neutral text.", form="token"),
    "written": Measure("written", "What was written after it.", form="token"),
    "n_written": Measure("tokens", "Tokens that were written.", "count", form=_COUNT),
    "log_ppl_difference": Measure("log ratio",
        "log PPL⁰ - log PPL¹: how much less likely the base model finds what was written.",
        "nats a token", form=".2f"),
    "rank": Measure("rank", "1 is the strongest.", form=_COUNT),
    "logit": Measure("effect on the logits",
        "Tokens that a latent activation of 1 promotes or suppresses directly through the "
        "unembedding, centred over the vocabulary, before the division by the RMS of the residual"
        " stream: d⁰ read by the base model, d¹ and d¹ - d⁰ by the fine-tuned one.",
        "logits", form=_NUMBER, source=_LENS),
    "probability": Measure("probability", "Probability of the token.", "share", form=_SHARE),
    "unpatched_probability": Measure("unpatched",
        "Its probability without the patch.", "share", form=_SHARE),

    # --- names from a language model ---
    "detection": Measure("detection",
        "Balanced accuracy of a judge who is told the explanation and has to tell the held-out "
        "windows with the latent from those without it; 0.5 is chance.",
        "share", form=".2f", source="Paulo et al. 2024, arXiv 2410.13928"),
    "control": Measure("detection by another",
        "Detection on the same windows by the explanation of another latent.",
        "share", form=".2f"),

    # --- interventions ---
    "attribution": Measure("attribution",
        "What the latent carries of the change, over the text: minus f ⟨d¹ - d⁰, gradient of the "
        "KL to the fine-tuned model⟩, the gradient averaged on the way from the base activation "
        "to the fine-tuned one. Latents, the dictionary's error and its bias add up to the change.",
        "nats", form=".3g", source="integrated gradients: Sundararajan et al. 2017, 1703.01365"),
    "attribution_share": Measure("share of the change",
        "Attribution over the whole change.", "share", form=".1%"),
    "change_share": Measure("share of the change",
        "What the latents of a change carry, over the whole change in nats.", "share", form=".0%"),
    "agreement": Measure("agreement",
        "Cosine of a change's latents with those found again in other starts and in halves of the "
        "documents.", "0 to 1", form=".2f", source="ours"),
    "recovery_of_others": Measure("recovery elsewhere",
        "KL recovery by its latents on the passages of the other changes.", "share", form=".0%"),
    "cumulative_share": Measure("cumulative",
        "Share of the change of this latent and all before it.", "share", form=".1%"),
    "n_contexts": Measure("contexts",
        "Contexts of the text in which the latent has a part.", "count", form=_COUNT),
    "part": Measure("part", "Part of the change."),
    "reachable_share": Measure("of what passes",
        "Share of the KL that passes the hook: of the base activation in the fine-tuned model.",
        "share", form=".0%"),
    "hook_name": Measure("hook point"),
    "passing_share": Measure("passes",
        "KL(fine-tuned ‖ patched) when the base activation takes the place of the fine-tuned one "
        "at this hook, over KL(fine-tuned ‖ base): the most that an edit there can undo. Above 100 "
        "% the layers above do not go together with the base activation.", "share", form=".0%"),
    "rise": Measure("rise",
        "What passes, minus what passes the layer before.", "share", form="+.0%"),
    "relative_difference": Measure("difference",
        "‖x¹ - x⁰‖ / ‖x⁰‖, mean over tokens.", "share", form=".1%"),
    **{f"{role}_difference": Measure(f"on {role}",
        f"‖x¹ - x⁰‖ / ‖x⁰‖, mean over {name}.", "share", form=".1%")
        for role, name in _ROLES.items()},
    "n_latents": Measure("n latents",
        "Latents in the set; 0 where there are none.", "count", form=_COUNT),
    "n_tokens": Measure("n tokens", "Predicted tokens.", "count", form=_COUNT),
    "n_prompts": Measure("prompts",
        "Prompts, over which intervals are taken.", "count", form=_COUNT),
    "kl": Measure("KL divergence",
        "KL(fine-tuned ‖ patched) of the next-token predictions.",
        "nats a token", symbol="KL", form=_NUMBER),
    "ce": Measure("cross-entropy",
        "Cross-entropy of the text.", "nats a token", symbol="CE", form=_NUMBER),
    "recovery": Measure("KL recovery",
        "1 - KL / KL of the base activation: how much of what the fine-tune predicts is recovered"
        " through the patched latents. Below 0 is worse than the base activation.",
        "share", form=".0%", source=_MINDER),
    "necessity": Measure("necessity",
        "Share of the change from base to fine-tuned model that is removed when the latents are "
        "ablated from the fine-tuned model.", "share", form=".0%"),
    "insert": Measure("sufficiency by insertion",
        "Share of the change from base to fine-tuned model that is induced when what the fine-tune "
        "added to the latents is inserted into the base model.", "share", form=".0%"),
    "steer": Measure("sufficiency by steering",
        "Share of the change from base to fine-tuned model that is induced when the base model is "
        "steered along the latents' fine-tuned decoder rows.", "share", form=".0%"),
    "latents": Measure("set", "Name of the set of latents, of their order, or of a method."),
    "n_needed": Measure("for 80%",
        "Smallest number tested of latents or directions that does 80 % of what replacing the "
        "whole activation does; the cost beside it is at that number.", "count", form=_COUNT),
    "share": Measure("share",
        "Share of the change from base to fine-tuned model that is removed (necessity) or induced"
        " (sufficiency).", "share", form=".0%"),
    "strength": Measure("strength",
        "Steering adds the latent's fine-tuned direction at every token, in multiples of the mean"
        " norm of the activation there.", "mean norms", form="g"),
    "value": Measure("value", "The effect under the edit, mean over prompts.", form=".3g"),
    "base": Measure("base", "The effect of the unedited base model.", form=".3g"),
    "finetuned": Measure("fine-tuned", "The effect of the unedited fine-tuned model.", form=".3g"),
    "flag": Measure("flag", "Why the share must not be read as a plain one."),
    "ceiling": Measure("ceiling",
        "Share when the whole activation at the hook is replaced by the other model's: what can be "
        "reached there.", "share", form=".0%"),
    "of_reachable": Measure("of reachable",
        "Share over the ceiling.", "share", form=".0%"),
    "strongest": Measure("control",
        "The strongest kind of control, that of the highest mean share. random: isotropic "
        "directions; covariance: directions with the covariance of x¹ - x⁰; shuffled: rows of "
        "other latents; matched: other latents, active as often; null: rows of a dictionary of the "
        "base model against itself. All but matched have the activations of the latents, and move "
        "the activation as far at every token."),
    "control_mean": Measure("control mean",
        "Share for the strongest kind of control.", "share", form=".0%"),
    "control_high": Measure("control 95th",
        "95th percentile of the strongest kind of control.", "share", form=".0%"),
    "effect_size": Measure("effect size",
        "Distance from the mean of the strongest controls.", "standard deviations", form=".1f"),
    "p_control": Measure("p",
        f"{_P} the strongest kind.", "probability", form=".2g"),
    "p_control_holm": Measure("p (Holm)",
        f"{_P} the strongest kind, corrected for the number of sets in the test.",
        "probability", form=".2g"),
    "random_mean": Measure("random mean",
        "Share for random directions that move the activation as far: what chance does.",
        "share", form=".0%"),
    "covariance_mean": Measure("covariance mean",
        "Share for random directions with the covariance of x¹ - x⁰.", "share", form=".0%"),
    "shuffled_mean": Measure("shuffled mean",
        "Share when each latent writes the row of another one.", "share", form=".0%"),
    "matched_mean": Measure("matched mean",
        "Share for random latents that are active as often.", "share", form=".0%"),
    "null_mean": Measure("null pair mean",
        "Share for directions of a dictionary of the base model against itself.",
        "share", form=".0%"),
    **{f"{kind}_high": Measure(f"{kind} 95th", f"95th percentile of the {name}.", "share",
        form=".0%") for kind, name in _CONTROLS.items()},
    **{f"p_{kind}": Measure(f"p {kind}", f"{_P} {name}.", "probability", form=".2g")
        for kind, name in _CONTROLS.items()},
    "off_target_kl": Measure("off-target KL",
        "KL to the unedited model on neutral text: the cost.", "nats a token", form=".4f"),
    "off_target_ce": Measure("off-target CE",
        "Cross-entropy of neutral text, edited minus unedited model: the model's health.",
        "nats a token", form="+.4f"),
    "control_off_target_kl": Measure("control KL",
        "Mean off-target KL of the strongest controls.", "nats a token", form=".4f"),
    "control_off_target_ce": Measure("control CE",
        "Mean off-target cross-entropy of the strongest controls.", "nats a token", form="+.4f"),
    "pair": Measure("pair", "The models that are compared, or a pair that should show nothing."),
    "whole_kl": Measure("KL",
        "KL(fine-tuned ‖ base) of the next-token predictions.", "nats a token", form=".3g"),
    "reachable_kl": Measure("passes the hook",
        "What of that KL passes the hook.", "nats a token", form=".3g"),
    "largest_latent": Measure("largest latent",
        "The most that one latent carries of the change.", "nats a token", form=".2g"),
    "n_over_bar": Measure("over the bar",
        "Latents that carry at least 1 % of the change of the pair.", "count", form=_COUNT),
    "n_changes": Measure("changes", "Changes that were found.", "count", form=_COUNT),
    "largest_change": Measure("largest change",
        "What the largest change carries.", "nats a token", form=".2g"),
    "weights_moved": Measure("weights moved",
        "Norm of the difference of the models' weights, over that of the base's weights.",
        "share", form=".2g"),
    "coverage": Measure("coverage",
        "Planted behaviours of which the ablation removes at least a tenth, more than 95 % of its "
        "controls, in a model that still works.", "share", form=".0%"),
    "mitigation": Measure("mitigation",
        "What ablating them removes of a planted behaviour, over what passes the hook.",
        "share", form=".0%"),
    "within_low": Measure("within .001",
        "Mitigation by ablations that cost at most .001 nats a token.", "share", form=".0%"),
    "within_middle": Measure("within .003",
        "Mitigation by ablations that cost at most .003 nats a token.", "share", form=".0%"),
    "within_high": Measure("within .01",
        "Mitigation by ablations that cost at most .01 nats a token.", "share", form=".0%"),
    "inserted": Measure("inserted",
        "What inserting them into the base brings of a planted behaviour, over what passes.",
        "share", form=".0%"),
    "spill": Measure("spill",
        "Probability of true answers to other questions that the ablation takes away.",
        "probability", form="+.3f"),
    "nats": Measure("nats",
        "What the ablation undoes of the change in predictions; median over organisms.",
        "nats a token", form=".2g"),
    "null_nats": Measure("null nats",
        "The same on the null pair on which it is largest.", "nats a token", form=".2g"),
    "over_null": Measure("over null",
        "Organisms on which it undoes more nats than on any null.", "share", form=".0%"),
    "words": Measure("planted words",
        "Share of the planted words that stand in what the method shows.", "share", form=".0%"),
    "words_of_others": Measure("of others",
        "The same of words that were planted in other organisms: the floor.", "share", form=".0%"),
    "null_words": Measure("on the null",
        "The same on pairs in which nothing was planted.", "share", form=".0%"),
    "n_found": Measure("above it", "Organisms on which it is above that floor.", "count",
        form=_COUNT),
    "gain": Measure("gain",
        "Mitigation minus that of the other method, mean over organisms.", "share", form="+.0%"),
    "p_sign_flip": Measure("p", "Sign-flip test by organism.", "probability", form=".2g"),
    "changes_a_pair": Measure("changes", "Changes without doubt, mean over pairs.", "count",
        form=".1f"),
    "best_method": Measure("best method", "Whose first latents or directions remove most."),
    "methods_that_cover": Measure("cover it",
        "Methods and rankings that cover half of its behaviours or more.", "count", form=_COUNT),
    "n_methods": Measure("tested", "Methods and rankings that were tested.", "count", form=_COUNT),
    "n_organisms": Measure("organisms", "Organisms that it was tested on.", "count", form=_COUNT),
    "n_cells": Measure("cells", "Dictionaries that were trained and tested.", "count", form=_COUNT),
    "null_changes": Measure("null changes", "Changes on null pairs.", "count", form=".1f"),
    "ablation": Measure("ablated",
        "The fine-tuned model without what the fine-tune added to the latent: x¹ - f (d¹ - d⁰).",
        source=_MINDER),
    "interval": Measure("[low, high]", "95 % bootstrap interval over prompts."),
}
# fmt: on

DIRECTIONS = {
    "finetuned": "fine-tuned decoder rows",
    "base": "base decoder rows",
    "random": "random directions (control)",
    "other": "other latents' rows (control)",
}
"""Directions of Latent Scaling, and its controls."""

ORDERS = {
    "attribution": "what they carry of the change",
    "score": "R times the explained difference",
    "relative_decoder_norm": "R",
    "difference": "the explained difference",
    "nu": "the ranks of |nu|",
    "activity": "the number of tokens on which they are active",
}
"""Orders of latents."""


def spoken(site: str) -> str:
    """Name of a site in a sentence."""
    return {"finetuned": "fine-tuned"}.get(site, site)
