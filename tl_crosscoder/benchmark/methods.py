"""The methods that are compared: dictionaries by their presets, directions without one, and texts.

    def mine(pair: Pair) -> Float[Tensor, "n d_model"]:     # raw space, the best direction first
        ...

    run_benchmark(config, directions={"mine": mine})

A dictionary is trained on the pair and its latents are put in several orders; a method of your own
is one function from a pair to ranked directions. Both are then tested alike: the first n are
ablated in the fine-tuned model and inserted into the base. Methods that give tokens or texts cannot
be ablated: of theirs it is counted how many of the planted words they show.
Contract: a method sees the models and text, never a behaviour, a label or what was planted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.baselines.difference import component_rows, mean_rows
from tl_crosscoder.baselines.generations import generations, prefills
from tl_crosscoder.baselines.mining import diff_mining
from tl_crosscoder.baselines.weights import weight_directions
from tl_crosscoder.config.causal import Order
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.pair import ModelPair

Rows = Float[Tensor, "n d_model"]
RANKINGS: tuple[Order, ...] = ("attribution", "relative_decoder_norm", "nu")
"""Orders of a crosscoder's latents: by what they carry of the change in predictions, by relative
decoder norm alone as in Kassem et al. 2026, and by Latent Scaling (Minder et al. 2025)."""
OF_ONE_SITE: tuple[Order, ...] = ("attribution", "activity")
"""Those of a diff-SAE, whose latents have one decoder row."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Pair:
    """What a method sees."""

    models: ModelPair
    text: TokenizedText
    """Held-out text of all kinds, what the fine-tune was taught included."""
    neutral: TokenizedText
    """The same without what the fine-tune was taught."""
    n: int
    """Directions that will be tested at most."""


Directions = Callable[[Pair], Rows]
"""A method without a dictionary: directions in raw space, the first ones first."""
Texts = Callable[[Pair], list[str]]
"""A method that shows tokens or texts, the most telling ones first."""


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """A dictionary as a method."""

    preset: Mapping[str, Any]
    """Name and options; k or the coefficient is the grid's."""
    text: Literal["all", "neutral"] = "all"
    """Whether it is trained and ranked on text with what the fine-tune was taught."""
    k_multiple: float = 1.0
    """Of the grid's k."""
    rankings: tuple[Order, ...] = RANKINGS


_DELTA: dict[str, Any] = {"name": "delta", "delta_loss_weight": 1.0}
"""Of the weight that the embedded Delta dictionaries have; the paper's 0.005 is
`delta-paper-weight`."""
DICTIONARIES: dict[str, Dictionary] = {
    "batchtopk": Dictionary(preset={"name": "batchtopk"}),
    "batchtopk-2k": Dictionary(preset={"name": "batchtopk"}, k_multiple=2),
    "l1": Dictionary(preset={"name": "l1"}),
    "dsf": Dictionary(preset={"name": "dsf"}),
    "dfc": Dictionary(preset={"name": "dfc"}),
    "delta": Dictionary(preset=_DELTA),
    "delta-paper-weight": Dictionary(preset={"name": "delta"}),
    "delta-without-loss": Dictionary(preset={"name": "dual-k"}),
    "delta-without-mask": Dictionary(preset=_DELTA | {"delta_loss_masked": False}),
    "delta-without-dual-k": Dictionary(preset=_DELTA | {"name": "delta-competing"}),
    "delta-relative-scale": Dictionary(preset=_DELTA | {"delta_loss_scale": "relative"}),
    "delta-neutral-text": Dictionary(preset=_DELTA, text="neutral"),
    "batchtopk-neutral-text": Dictionary(preset={"name": "batchtopk"}, text="neutral"),
    "structured": Dictionary(preset={"name": "structured"}),
    "diff-sae": Dictionary(preset={"name": "diff-sae"}, rankings=OF_ONE_SITE),
}
"""The field's dictionaries, Delta without each of its parts, and ours."""

DIRECTIONS: dict[str, Directions] = {
    "pca": lambda pair: component_rows(pair.models, pair.text, pair.n),
    "pca-neutral": lambda pair: component_rows(pair.models, pair.neutral, pair.n),
    "adl": lambda pair: mean_rows(pair.models, pair.neutral, pair.n),
    "weights": lambda pair: weight_directions(pair.models, n=pair.n),
}
"""Methods without a dictionary: principal components of x^1 - x^0 on all text and on neutral text,
its mean (over all tokens, then by position), singular vectors of the weights' difference."""


def _written(pair: Pair, *, alpha: float) -> list[str]:
    """The texts that the base finds least likely, of those written from random beginnings."""
    beginnings = prefills(pair.neutral, pair.models, n=N_BEGINNINGS)
    rows = generations(pair.models, beginnings, alpha=alpha).rows
    return [row.prefill + row.written for row in rows[:N_TEXTS]]


N_TOKENS_SHOWN, N_BEGINNINGS, N_TEXTS = 50, 50, 10
TEXTS: dict[str, Texts] = {
    "diff-mining": lambda pair: [
        row.token for row in diff_mining(pair.models, pair.neutral, n=N_TOKENS_SHOWN).rows
    ],
    "perplexity-difference": lambda pair: _written(pair, alpha=0.0),
    "contrastive-decoding": lambda pair: _written(pair, alpha=1.0),
}
"""Methods that show tokens or texts, of neutral text: the 50 tokens that the fine-tune raises most
often; of 50 texts by the fine-tuned model, or from amplified logits, the 10 that the base finds
least likely."""


@dataclass(frozen=True, kw_only=True)
class Methods:
    """All methods of a grid by name; your own directions among them."""

    dictionaries: Mapping[str, Dictionary] = field(default_factory=lambda: DICTIONARIES)
    directions: Mapping[str, Directions] = field(default_factory=lambda: DIRECTIONS)
    texts: Mapping[str, Texts] = field(default_factory=lambda: TEXTS)

    def names(self) -> list[str]:
        """Dictionaries first."""
        return [*self.dictionaries, *self.directions, *self.texts]

    def chosen(self, names: tuple[str, ...]) -> "Methods":
        """Those of these names; none are all. Raises ValueError for an unknown name."""
        unknown = sorted(set(names) - set(self.names()))
        if unknown:
            raise ValueError(f"unknown methods {unknown}; valid: {', '.join(self.names())}")
        wanted = names or tuple(self.names())
        return Methods(
            dictionaries={k: v for k, v in self.dictionaries.items() if k in wanted},
            directions={k: v for k, v in self.directions.items() if k in wanted},
            texts={k: v for k, v in self.texts.items() if k in wanted},
        )
