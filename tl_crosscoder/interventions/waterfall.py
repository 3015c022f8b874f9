"""`Waterfall`: how much of the change passes the hook, and how much of that the latents hold.

    whole         KL(p_finetuned || p_base)
    reachable     KL(p_finetuned || p_{x^0}): what is lost if the stream at the hook is the base's
    latents S     KL(p_finetuned || p_{x^0}) - KL(p_finetuned || p_{h_S}), h_S as in `patching`

Contract: nats a predicted token; intervals are bootstraps over contexts, paired between rows. The
reachable part is the ceiling of any edit at this hook; where much of the change happens below and
above alike it may be more than the whole. Limit: one hook.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.analysis.resampling import N_DRAWS, Interval, bootstrap_weights, interval
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.interventions.attribution_result import MeasuredText, measured_text
from tl_crosscoder.interventions.behaviour import Predictions
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import ReplaceActivation, unchanged
from tl_crosscoder.interventions.patching import patched
from tl_crosscoder.interventions.running import score_edits
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.results.render import Section
from tl_crosscoder.results.tables import TableOfRows

WHOLE, REACHABLE, ALL = "the whole change", "passes this hook", "all latents"
SIZES = (1, 3, 10, 30)
"""Numbers of latents from the beginning of a ranking."""


@dataclass(frozen=True, kw_only=True)
class WaterfallRow:
    """One part of the change; intervals are at 95 %."""

    part: str
    n_latents: int
    kl: float
    """Nats a predicted token that this part carries."""
    kl_low: float
    kl_high: float
    share: float
    """Share of the whole change; NaN where nothing changed."""
    share_low: float
    share_high: float
    reachable_share: float
    """Share of what passes this hook; NaN of the whole change."""
    reachable_share_low: float
    reachable_share_high: float


@dataclass(frozen=True, kw_only=True)
class Waterfall(TableOfRows):
    """From the whole change down to the first latents."""

    ROW: ClassVar[type] = WaterfallRow
    rows: tuple[WaterfallRow, ...]
    effect: str
    compared: tuple[str, str]
    hook_name: str
    order: str
    """Order of the latents."""
    text: dict[str, object]
    """Which text it was measured on."""

    def row(self, part: str) -> WaterfallRow:
        """One row. Raises ValueError for an unknown part."""
        for row in self.rows:
            if row.part == part:
                return row
        raise ValueError(f"there is no part {part!r}; there are {[r.part for r in self.rows]}.")

    def line(self) -> str:
        """The waterfall in one sentence."""
        whole, reachable, *held = self.rows
        if not whole.kl > 0:
            return f"The models predict the same on {self.effect.partition(' of ')[2]}."
        shares = [f"{row.part} {row.reachable_share:.0%}" for row in held]
        return (
            f"KL {whole.kl:.3g} nats a token: {reachable.share:.0%} passes this hook"
            + (f", of which {', '.join(shares)}." if reachable.kl > 0 else ".")
        )  # fmt: skip

    def sections(self) -> list[Section]:
        """The sentence above the table."""
        columns = {name: values for name, values in self.columns().items() if name != "n_latents"}
        return [Section(title=self.line(), columns=columns)]


def waterfall(
    models: ModelPair,
    crosscoder: Crosscoder,
    predictions: Predictions,
    *,
    ranked: Sequence[int],
    order: str = "attribution",
    sizes: Sequence[int] = SIZES,
    part: str = "given",
    batch_size: int = 16,
    n_draws: int = N_DRAWS,
    seed: int = 0,
    show_progress: bool = False,
) -> Waterfall:
    """Measure every part in one pass of the layers below the hook.

    Args:
        models: a pair, or more sites; of a diff-SAE, its difference.
        crosscoder: trained on them.
        predictions: which are explained, on other text than `ranked` was chosen on.
        ranked: latents, first the most important.
        order: what they are ranked by.
        sizes: how many of them.
        part: what is recorded of where the text is from.
        batch_size: contexts a forward pass.
        n_draws: bootstrap resamples of contexts.
        seed: of the resamples.
        show_progress: with a progress bar.

    Raises:
        ValueError: a dictionary of other models, latents out of range, or contexts without a token
            to predict.
    """
    ctx = InterventionContext.of(models, crosscoder)
    site, base, d_sae = ctx.finetuned, ctx.base, crosscoder.cfg.d_sae
    first = {
        "the first" if n == 1 else f"the first {n}": [*ranked[:n]]
        for n in sizes
        if n <= len(ranked)
    }
    sets: dict[str, list[int]] = {ALL: [*range(d_sae)], **first}
    edits = [unchanged(base), ReplaceActivation(site=site, stream=base)]
    edits += [patched(ctx, ids, name=name, group="").edit for name, ids in sets.items()]
    scores = score_edits(
        ctx,
        predictions.text,
        edits,
        reference=unchanged(site),
        kinds={predictions.kind: predictions.places},
        batch_size=batch_size,
        description="Measuring what passes" if show_progress else None,
    )
    kl = scores.kl[:, 0]
    carried = torch.cat([kl[:2], kl[1] - kl[2:]])
    n_latents = [0, 0, *map(len, sets.values())]
    about = measured_text(
        predictions.text, n_predicted=int(scores.counts[0].sum()), part=part
    )  # fmt: skip
    weights = bootstrap_weights(kl.shape[1], n_draws=n_draws, seed=seed)
    return Waterfall(
        rows=tuple(
            _row(name, n, own, carried, scores.counts[0], weights)
            for name, n, own in zip([WHOLE, REACHABLE, *sets], n_latents, carried, strict=True)
        ),
        effect=predictions.name,
        compared=ctx.models.compared_names,
        hook_name=ctx.models.model_sites[site].hook_name,
        order=order,
        text=_plain(about),
    )


def _plain(text: MeasuredText) -> dict[str, object]:
    return {**vars(text), "sources": list(text.sources)}


def _row(
    name: str,
    n_latents: int,
    own: Float[Tensor, " n_contexts"],
    carried: Float[Tensor, "n_parts n_contexts"],
    counts: Float[Tensor, " n_contexts"],
    weights: Float[Tensor, "n_draws n_contexts"],
) -> WaterfallRow:
    def over(other: Float[Tensor, " n_contexts"]) -> Interval:
        return interval((own.sum() / other.sum()).item(), (weights @ own) / (weights @ other))

    kl, share, reachable = over(counts), over(carried[0]), over(carried[1])
    if name == WHOLE:
        reachable = Interval(value=math.nan, low=math.nan, high=math.nan)
    return WaterfallRow(
        part=name,
        n_latents=n_latents,
        **{"kl": kl.value, "kl_low": kl.low, "kl_high": kl.high},
        share=share.value,
        share_low=share.low,
        share_high=share.high,
        reachable_share=reachable.value,
        reachable_share_low=reachable.low,
        reachable_share_high=reachable.high,
    )
