"""Changes: what a fine-tune changed, grouped by the latents that carry it, with its causes.

What latents carry in each passage is grouped on the documents for rankings (`grouping`: how many
groups there are is found there, and may be none). Everything else is measured on documents for
tests: passages belong to the group that has most of what is carried in them, and on these passages
the group's latents are ablated (necessity, with controls and cost, as in `causal`) and patched into
the base's activation (recovery, as in `patching`). A group whose latents undo no more than controls
is in doubt, and not counted. Limit: a change is found by which latents carry it together.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.latents import LatentMeasures
from tl_crosscoder.config.causal import AttributionSettings
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.attribution import attribution
from tl_crosscoder.interventions.attribution_result import KL_UNIT, Attribution
from tl_crosscoder.interventions.behaviour import Predictions
from tl_crosscoder.interventions.causal import causal_test
from tl_crosscoder.interventions.change_texts import texts_of
from tl_crosscoder.interventions.changes_result import Change, Changes
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.controls import ControlSettings
from tl_crosscoder.interventions.edits import ReplaceActivation, unchanged
from tl_crosscoder.interventions.grouping import Groups, grouped
from tl_crosscoder.interventions.passages import passage_text
from tl_crosscoder.interventions.patching import patched
from tl_crosscoder.interventions.running import score_edits
from tl_crosscoder.models.pair import ModelPair

N_LATENTS = 100
"""First latents of the ranking, which are grouped."""
COVERED, N_TESTED = 0.8, 10
"""A change's latents are the fewest that carry this share of it, and at most so many."""
N_PASSAGES = 32
"""Passages of a change on which its causes are measured: those in which most is carried."""
MATERIAL = math.log(2)
"""Nats that the latents of a change carry in half of its passages at least: what the fine-tuned
model writes there is twice as likely as in the base. Half of the passages of the embedded
organisms' changes carry 0.97 at least; of 20 bases that were fine-tuned on their own samples or on
neutral text one has a group above the bar."""
CONTROLS = ControlSettings(controls=("covariance", "shuffled"), n_random=19, n_matched=0)
"""The two strongest kinds, as few as a p-value of 0.05 needs."""


def find_changes(
    models: ModelPair,
    crosscoder: Crosscoder,
    found: Attribution,
    predictions: Predictions,
    *,
    neutral: TokenizedText,
    latents: LatentMeasures,
    settings: ControlSettings = CONTROLS,
    show_progress: bool = False,
) -> Changes:
    """Group what latents carry into changes, and measure what causes each.

    Args:
        models: those of the attribution.
        crosscoder: trained on them.
        found: attribution of predictions, on the documents for rankings.
        predictions: of other documents, for the tests.
        neutral: text that has nothing to do with the fine-tune, for the cost of ablations.
        latents: measures of the crosscoder.
        settings: of the controls, and the seed.
        show_progress: with a progress bar.

    Raises:
        ValueError: the attribution is of something else, or as `attribution` and `causal_test`.
    """
    if found.unit != KL_UNIT:
        raise ValueError(
            f"the attribution is of {found.effect} ({found.unit}), but changes are found in "
            "predictions: give an attribution of `Predictions`."
        )
    ctx = InterventionContext.of(models, crosscoder)
    ids = torch.tensor(
        [j for j in found.ranking(N_LATENTS) if latents.n_active[j] > 0], dtype=torch.long
    )
    A = found.of_passages(ids)
    groups = grouped(A, found.spans[:, 0], seed=settings.seed)
    rows, tests = [], None
    if len(groups.rows):
        how = AttributionSettings(n_steps=found.n_steps, at_base=found.at_base)
        tests = attribution(
            models,
            crosscoder,
            predictions,
            settings=how,
            part="documents for tests",
            show_progress=show_progress,
        )
        maker = _Maker(
            ctx=ctx, found=found, tests=tests, groups=groups, ids=ids, predictions=predictions,
            neutral=neutral, latents=latents, settings=settings, show_progress=show_progress,
        )  # fmt: skip
        rows = maker.rows()
    return Changes(
        rows=tuple(rows),
        agreements=groups.tried,
        effect=found.effect,
        compared=found.compared,
        hook_name=found.hook_name,
        nats=found.change / max(1, found.text.n_predicted),
        texts={each.text.part: _plain(each) for each in (found, tests) if each is not None},
    )


def _plain(found: Attribution) -> dict[str, object]:
    return {**asdict(found.text), "sources": list(found.text.sources)}


@dataclass(frozen=True, eq=False, kw_only=True)
class _Group:
    """A group of latents with its passages."""

    share: float
    agreement: float
    latents: tuple[int, ...]
    attributions: tuple[float, ...]
    text: TokenizedText
    """Its passages in the documents for tests, as contexts, most carried first."""
    predictions: Predictions
    nats: Float[Tensor, " n_passages"]
    """Carried in each of them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Maker:
    """Makes the rows of groups."""

    ctx: InterventionContext
    found: Attribution
    tests: Attribution
    groups: Groups
    ids: Int[Tensor, " n_latents"]
    predictions: Predictions
    neutral: TokenizedText
    latents: LatentMeasures
    settings: ControlSettings
    show_progress: bool

    def rows(self) -> list[Change]:
        """Counted ones first, each kind by share."""
        groups = sorted(self._groups(), key=lambda group: -group.share)
        recovered = self._recoveries(groups)
        rows = [self._row(g, own) for g, own in zip(groups, recovered, strict=True)]
        rows.sort(key=lambda row: bool(row.doubt))
        return [replace(row, place=place) for place, row in enumerate(rows, 1)]

    def _groups(self) -> list[_Group]:
        parts = self.groups.parts(self.found.of_passages(self.ids).double())
        B = self.tests.of_passages(self.ids).double()
        carried = self.groups.parts(B).sum(dim=2)
        owner = carried.argmax(dim=0)
        return [
            self._group(c, parts[c].sum(dim=0), torch.where(owner == c, carried[c], 0.0))
            for c in range(len(parts))
        ]

    def _group(
        self, c: int, nats: Float[Tensor, " n_latents"], carried: Float[Tensor, " n_passages"]
    ) -> _Group:
        order = nats.argsort(descending=True)
        covered = nats[order].cumsum(dim=0) / nats.clamp(min=0).sum().clamp(min=1e-30)
        n = min(N_TESTED, 1 + int((covered < COVERED).sum()))
        first = order[:n]
        places = carried.argsort(descending=True, stable=True)[:N_PASSAGES]
        places = places[carried[places] > 0]
        text, chosen = passage_text(self.predictions.text, self.tests.spans[places])
        return _Group(
            share=nats.sum().item() / self.found.change,
            agreement=self.groups.agreement[c].item(),
            latents=tuple(self.ids[first].tolist()),
            attributions=tuple(nats[first].tolist()),
            text=text,
            predictions=replace(self.predictions, text=text, kind="passage", places=chosen),
            nats=carried[places],
        )

    def _recoveries(self, groups: Sequence[_Group]) -> list[tuple[float, float]]:
        """Recovery by patching each group's latents: on its own passages, and on all others."""
        ctx, site = self.ctx, self.ctx.finetuned
        sets = [patched(ctx, g.latents, name="", group="").edit for g in groups]
        kl = torch.zeros(1 + len(groups), len(groups), dtype=torch.float64)
        for i, group in enumerate(groups):
            if len(group.text):
                scores = score_edits(
                    ctx,
                    group.text,
                    [ReplaceActivation(site=site, stream=ctx.base), *sets],
                    reference=unchanged(site),
                    kinds={"passage": group.predictions.places},
                )
                kl[:, i] = scores.kl[:, 0].sum(dim=1)
        empty, patched_kl = kl[0], kl[1:]
        other = ~torch.eye(len(groups), dtype=torch.bool)
        own = (1 - patched_kl.diagonal() / empty).tolist()
        others = [
            (1 - patched_kl[i, other[i]].sum() / empty[other[i]].sum()).item()
            for i in range(len(groups))
        ]
        return [*zip(own, others, strict=True)]

    def _row(self, group: _Group, recovered: tuple[float, float]) -> Change:
        known: dict[str, Any] = {
            "place": 0,
            "change_share": group.share,
            "agreement": group.agreement,
            "latents": group.latents,
            "attributions": group.attributions,
            "n_passages": len(group.text),
            "recovery": recovered[0],
            "recovery_of_others": recovered[1],
            **texts_of(self.ctx, group.predictions, group.nats),
        }
        if len(group.text) < 2 or group.nats.median() < MATERIAL:
            doubt = "in half of their passages what is written changes by less than a factor of two"
            return Change(**known, **UNTESTED, doubt=doubt)
        test = causal_test(
            self.ctx.models,
            self.ctx.dictionary,
            group.predictions,
            self.neutral,
            latents=self.latents,
            sets={"change": group.latents},
            tests=["necessity"],
            settings=self.settings,
            show_progress=self.show_progress,
        )
        (row,) = test.rows
        return Change(
            **known,
            necessity=row.share,
            necessity_low=row.share_low,
            necessity_high=row.share_high,
            **{name: getattr(row, name) for name in SAME},
            doubt=row.doubt(),
        )


SAME = ("strongest", "control_mean", "control_high", "p_control", "off_target_kl", "off_target_ce")
"""Columns of a causal test that a change has under the same name."""
UNTESTED: dict[str, Any] = {
    **dict.fromkeys(("necessity", "necessity_low", "necessity_high", *SAME), math.nan),
    "strongest": "",
}
