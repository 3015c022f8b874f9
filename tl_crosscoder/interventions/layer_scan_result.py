"""`LayerScan`: what passes each layer, the size of the difference there, and the hook to choose.

Contract: plain values, saved as JSON or parquet; shares are of KL(p_finetuned || p_base), and
`recommended`, a pure function of them, is the rule. Limit: a layer through which the change passes
is where it can be undone; whether a dictionary finds it there is not known before one is trained.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.interventions.trials import MIN_CEILING, WHOLE
from tl_crosscoder.results.render import Section
from tl_crosscoder.results.tables import TableOfRows

ENOUGH = 0.8
"""Share of the change that should pass a hook."""
NEARLY = 0.9
"""Share of the largest passing share that is as good, where no layer passes enough."""
LAST = 0.25
"""Share of the layers, the last ones, that are not recommended: their activations are nearly the
output, so that the last passes everything, whatever was changed where."""
SAME_KL = 1e-6
"""Nats a token up to which models predict the same: rounding makes as much."""


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer; intervals are at 95 %."""

    layer: int
    hook_name: str
    kl: float
    """KL to the fine-tuned model when the base's activation stands here, nats a predicted token."""
    kl_low: float
    kl_high: float
    passing_share: float
    """`kl` over that of the base model; NaN where nothing changed."""
    passing_share_low: float
    passing_share_high: float
    rise: float
    """`passing_share` minus that of the layer above it in the table."""
    relative_difference: float
    """|x^1 - x^0| / |x^0|, mean over tokens of all roles."""
    text_difference: float
    """The same over the tokens of one role; NaN where there are none."""
    system_difference: float
    user_difference: float
    assistant_difference: float
    tool_difference: float
    template_difference: float


@dataclass(frozen=True, kw_only=True)
class LayerScan(TableOfRows):
    """Where the change passes, layer by layer, and the hook point that follows from it."""

    ROW: ClassVar[type] = LayerRow
    rows: tuple[LayerRow, ...]
    hook_name: str
    """Recommended hook point; see `recommended`."""
    reason: str
    """Why, as the end of a sentence about it."""
    kl: float
    """KL(p_finetuned || p_base), nats a predicted token."""
    kl_low: float
    kl_high: float
    n_layers: int
    """Layers of the models, scanned or not."""
    models: tuple[str, str]
    """Names of the models, base first."""
    effect: str
    text: dict[str, object]
    """Which text it was measured on."""

    @property
    def changes(self) -> bool:
        """Whether the models predict differently at all."""
        return self.kl > SAME_KL

    def line(self) -> str:
        """The recommendation in one sentence."""
        return f"Hook at {self.hook_name}: {self.reason}."

    def sections(self) -> list[Section]:
        """The sentence above the table; the difference by role where there are several."""
        left_out = ("layer", "kl", "kl_low", "kl_high")
        columns = {name: v for name, v in self.columns().items() if name not in left_out}
        of_role = {f"{role}_difference": columns.pop(f"{role}_difference") for role in ROLES}
        of_role = {n: v for n, v in of_role.items() if not all(map(math.isnan, v))}
        n, n_contexts = (self.text[name] for name in ("n_predicted", "n_contexts"))
        change = f"{self.kl:.3g} [{self.kl_low:.3g}, {self.kl_high:.3g}]" if self.changes else "0"
        notes = [
            f"{' -> '.join(self.models)}: KL {change} nats a token, {self.effect}: {n:,} in "
            f"{n_contexts:,} contexts."
        ]
        if self.changes:
            most = max(self.rows, key=lambda row: row.rise)
            notes += [f"What passes rises most at {most.hook_name}, by {most.rise:.0%}."]
        columns |= of_role if len(of_role) > 1 else {}
        return [Section(title=self.line(), columns=columns, notes=notes, n_rows=None)]


def n_recommendable(n_layers: int) -> int:
    """How many of a model's layers are below the last quarter."""
    return int((1 - LAST) * n_layers)


def recommended(
    shares: Sequence[float], layers: Sequence[int], *, n_layers: int
) -> tuple[int, str]:
    """Place of the layer to hook at, and why, as the end of a sentence about it.

    An edit at a hook undoes at most what passes it, so at least `ENOUGH` of the change should, or
    where no layer passes so much, `NEARLY` the most that one does. What passes grows towards the
    output, which the last quarter of the layers is close to, and that is left out. Of the layers
    that remain it is the one nearest to the middle of the model, as in the papers.

    Args:
        shares: passing share of each layer; NaN where the models predict the same.
        layers: their numbers, rising.
        n_layers: of the model.
    """
    own = [0.0 if math.isnan(share) else min(share, 1.0) for share in shares]
    places = range(len(layers))

    def distance(i: int) -> tuple[int, float]:
        return abs(layers[i] - n_layers // 2), -own[i]

    middle = min(places, key=distance)
    if all(map(math.isnan, shares)):
        return middle, "the models predict the same on this text, and it is a middle layer"
    if max(own) < MIN_CEILING:
        return middle, (
            f"less than {MIN_CEILING:.0%} of the change passes any of these hook points, so that "
            "no dictionary at one of them holds it, and it is a middle layer. What changed is "
            "above the last of them or passes beside them: try others, such as the residual stream"
        )
    below = [i for i in places if layers[i] < n_recommendable(n_layers)] or [*places]
    if max(own[i] for i in below) < MIN_CEILING:
        first = next(i for i in places if own[i] >= min(ENOUGH, NEARLY * max(own)))
        return first, (
            f"{_passes(shares[first])}, and less than {MIN_CEILING:.0%} passes any layer below the "
            "last quarter: what changed is close to the output"
        )
    most = max(below, key=lambda i: (own[i], -layers[i]))
    bound = min(ENOUGH, NEARLY * own[most])
    chosen = min((i for i in below if own[i] >= bound), key=distance)
    if own[chosen] >= ENOUGH:
        why = f"; of the layers where {ENOUGH:.0%} does it is the nearest to the middle"
    elif chosen == most:
        why = ", more than any other layer"
    else:
        why = f", nearly as much as layer {layers[most]} ({own[most]:.0%}), the most of all; of the"
        why += " layers where so much does it is the nearest to the middle"
    return chosen, (
        f"{_passes(shares[chosen])}{why} (the last quarter, close to the output, is left out)"
    )


def _passes(share: float) -> str:
    beyond = (
        " (more than the whole: the layers above do not go together with the base's activation)"
    )
    return f"{share:.0%} of the change passes it{beyond * (share > WHOLE)}"
