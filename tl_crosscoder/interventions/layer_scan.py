"""`scan_layers`: how much of the change passes each layer, and at which one to hook.

    passes(l) = KL(p_finetuned || p_{x^0 at l}) / KL(p_finetuned || p_base)

where the fine-tuned model goes on from the base's activation x^0 at the hook of layer l: the
reachable share of `waterfall`, at every layer and without a dictionary. Beside it the size of the
difference, |x^1 - x^0| / |x^0|, a mean over tokens.

Contract: nats a predicted token; intervals are bootstraps over contexts, paired between layers.
Cost: both models once, and the fine-tuned one from each hook up; the activations of one batch at
all hooks are held. Limit: one hook a layer; where much of the change happens below and above alike,
a share may be more than the whole.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.analysis.resampling import (
    N_DRAWS,
    Interval,
    bootstrap_weights,
    ratio_interval,
)
from tl_crosscoder.config.scan import ScanSettings
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.interventions.attribution_result import measured_text
from tl_crosscoder.interventions.behaviour import Predictions
from tl_crosscoder.interventions.context import InterventionContext, SiteActivations
from tl_crosscoder.interventions.edits import ReplaceActivation, unchanged
from tl_crosscoder.interventions.layer_scan_result import SAME_KL, LayerRow, LayerScan, recommended
from tl_crosscoder.interventions.running import MAX_LOGITS, EditScores, score_edits
from tl_crosscoder.models.pair import ModelPair


def scan_layers(
    models: ModelPair,
    predictions: Predictions,
    *,
    settings: ScanSettings | None = None,
    part: str = "given",
    batch_size: int = 16,
    n_draws: int = N_DRAWS,
    seed: int = 0,
    show_progress: bool = False,
) -> LayerScan:
    """Measure what passes each layer, and recommend one.

    Args:
        models: two models, at any hook point.
        predictions: which are compared.
        settings: which layers, and which hook point of each.
        part: what is recorded of where the text is from.
        batch_size: contexts at a time; fewer where logits or activations take more than
            `MAX_LOGITS` entries.
        n_draws: bootstrap resamples of contexts.
        seed: of the resamples.
        show_progress: with a progress bar.

    Raises:
        ValueError: hook points that the models do not have, or of another width in each; one model
            compared with itself; contexts without a token to predict; or predictions that are no
            numbers.
    """
    n_layers, text = int(models.models[0].cfg.n_layers), predictions.text
    hooks = (settings or ScanSettings()).hook_names(n_layers)
    ctx, sites = _at_layers(models, [*hooks.values()])
    differences = _Differences(sites)
    d_in = sum(site.d_model for site in ctx.models.model_sites)
    room = MAX_LOGITS // (text.context_size * max(d_in, ctx.models.d_vocab))
    scores = score_edits(
        ctx,
        text,
        [unchanged(ctx.base), *(ReplaceActivation(site=j, stream=i) for i, j in sites)],
        reference=unchanged(ctx.finetuned),
        kinds={predictions.kind: predictions.places},
        batch_size=max(1, min(batch_size, room)),
        seen=differences.add,
        description="Scanning layers" if show_progress else None,
    )
    weights = bootstrap_weights(len(text), n_draws=n_draws, seed=seed)
    whole, rows = _rows(hooks, scores, differences, weights)
    how = {"layers": [*hooks], "n_layers": n_layers}
    chosen, reason = recommended([row.passing_share for row in rows], **how)
    n_predicted = int(scores.counts[0].sum())
    labels = [site.label for site in ctx.models.model_sites]
    about = measured_text(text, n_predicted=n_predicted, part=part)
    return LayerScan(
        rows=rows,
        hook_name=rows[chosen].hook_name,
        reason=reason,
        **whole,
        n_layers=n_layers,
        models=(labels[ctx.base], labels[ctx.finetuned]),
        effect=predictions.name,
        text={**vars(about), "sources": list(about.sources)},
    )


def _at_layers(
    models: ModelPair, hook_names: Sequence[str]
) -> tuple[InterventionContext, list[tuple[int, int]]]:
    """Models at every hook, and positions of the base's and the fine-tuned model's site at each."""
    base, tuned = (models.model_sites[i] for i in models.check_one_width())
    if base.owner == tuned.owner:
        raise ValueError(
            "a layer scan compares two models, but these sites are of one. Give the fine-tuned "
            "model too (--finetuned or --adapter)."
        )
    read = models.side_by_side().at(hook_names)
    places = {(site.owner, site.hook_name): i for i, site in enumerate(read.model_sites)}
    sites = [(places[base.owner, name], places[tuned.owner, name]) for name in hook_names]
    return InterventionContext.of(read), sites


class _Differences:
    """Sums of |x^1 - x^0| / |x^0| by layer and role, over the tokens that count."""

    def __init__(self, sites: Sequence[tuple[int, int]]) -> None:
        self._sites = sites
        self._sums = torch.zeros(len(sites), len(ROLES), dtype=torch.float64)
        self._counts = torch.zeros(len(ROLES), dtype=torch.float64)

    def add(self, acts: SiteActivations) -> None:
        """Take some contexts into account."""
        counted = acts.counted
        roles = acts.text.role_ids[counted.cpu()].long()
        self._counts += torch.bincount(roles, minlength=len(ROLES))
        for sums, (i, j) in zip(self._sums, self._sites, strict=True):
            base, finetuned = acts.x[i][counted], acts.x[j][counted]
            sizes = (finetuned - base).norm(dim=-1) / base.norm(dim=-1).clamp_min(1e-12)
            sums += torch.bincount(roles, weights=sizes.double().cpu(), minlength=len(ROLES))

    def means(self) -> list[dict[str, float]]:
        """Fields of each layer's row."""
        by_role = [f"{role}_difference" for role in ROLES]
        over_all = (self._sums.sum(dim=1) / self._counts.sum()).tolist()
        return [
            {"relative_difference": mean, **dict(zip(by_role, own, strict=True))}
            for mean, own in zip(over_all, (self._sums / self._counts).tolist(), strict=True)
        ]


def _rows(
    hooks: Mapping[int, str],
    scores: EditScores,
    differences: _Differences,
    weights: Float[Tensor, "n_draws n_contexts"],
) -> tuple[dict[str, float], tuple[LayerRow, ...]]:
    """The whole change as fields, and a row a layer."""
    kl, counts = scores.kl[:, 0], scores.counts[0]
    whole = ratio_interval(kl[0], counts, weights=weights)
    if not math.isfinite(whole.value):
        raise ValueError(
            f"KL(fine-tuned || base) is {whole.value} on this text: a model predicts what is no "
            "number. float16 ends at 65,504: load the models in bfloat16 or float32 (--dtype), or "
            "check their weights."
        )
    rows, before = [], 0.0
    for (layer, name), own, sizes in zip(hooks.items(), kl[1:], differences.means(), strict=True):
        share = ratio_interval(own, kl[0], weights=weights)
        if not whole.value > SAME_KL:
            share = Interval(value=math.nan, low=math.nan, high=math.nan)
        rows.append(
            LayerRow(
                layer=layer,
                hook_name=name,
                **_named("kl", ratio_interval(own, counts, weights=weights)),
                **_named("passing_share", share),
                rise=share.value - before,
                **sizes,
            )
        )
        before = share.value
    return _named("kl", whole), tuple(rows)


def _named(name: str, found: Interval) -> dict[str, float]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
