"""Patching for KL recovery: how much of what the fine-tune does goes through which latents?

    h_S = x^0 + sum_{j in S} f_j (d_j^1 - d_j^0)      the fine-tuned model goes on from h_S
    recovery(S) = 1 - KL(S) / KL(empty set)           KL(p_finetuned || p_{h_S}), nats a token

over the tokens that the assistant says, and the first of them (Minder et al. 2025, arXiv
2504.02922). Contract: a `Variant` is an edit of the fine-tuned model's activation, and gives a row
a kind of token; intervals are bootstraps over prompts, paired between variants. Candidates, the
latents taken for the fine-tune's, are chosen by Delta-norm; give `patching` other sets by name.
Limit: the hook's layer is the only one patched, so KL(empty set) already tells how much of the
fine-tune happens below it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.geometry import LATENT_CLASSES, LatentClass
from tl_crosscoder.analysis.latents import MIN_ACTIVE_TOKENS, LatentMeasures, nu_keys
from tl_crosscoder.analysis.resampling import N_DRAWS, bootstrap_weights, interval, ratio_interval
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import (
    AddLatents,
    Edit,
    EditAtTokens,
    ErrorAndBias,
    ProjectOut,
    ReplaceActivation,
    ReplaceWithReconstruction,
    TokenFilter,
    unchanged,
)
from tl_crosscoder.interventions.latent_edits import random_like
from tl_crosscoder.interventions.running import EditScores, kinds_of, score_edits
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.results.tables import TableOfRows

N_RANDOM = 5
"""Draws of each random control."""
LEAST, SHARE = 10, 0.05
"""Where fewer latents are finetuned-only, this share of the active ones is taken."""


@dataclass(frozen=True, kw_only=True)
class PatchingRow:
    """One variant, on one kind of predicted token; intervals are at 95 %."""

    variant: str
    group: str
    """Heading under which tables and figures show it."""
    tokens: str
    """Kind of predicted token."""
    n_latents: int
    """Latents that are patched; 0 where it is none of them."""
    n_tokens: int
    n_prompts: int
    kl: float
    kl_low: float
    kl_high: float
    ce: float
    """Cross-entropy of the text, nats a token."""
    ce_low: float
    ce_high: float
    recovery: float
    """1 - KL / KL(base stream); NaN where that is 0."""
    recovery_low: float
    recovery_high: float


@dataclass(frozen=True, kw_only=True)
class PatchingResult(TableOfRows):
    """KL and recovery of every variant."""

    ROW: ClassVar[type] = PatchingRow
    rows: tuple[PatchingRow, ...]
    compared: tuple[str, str]
    """Names of the sites that stand for base and fine-tuned."""
    candidates: str
    """How the latents that are taken for the fine-tune's were chosen."""
    candidate_latents: tuple[int, ...]
    """Which they are, by Delta-norm, largest first."""

    def row(self, variant: str, tokens: str | None = None) -> PatchingRow:
        """One row; the first kind of token where none is named. Raises ValueError for none."""
        for row in self.rows:
            if row.variant == variant and tokens in (None, row.tokens):
                return row
        raise ValueError(
            f"there is no variant {variant!r} on {tokens or 'any'} tokens; there are "
            f"{sorted({r.variant for r in self.rows})} on {sorted({r.tokens for r in self.rows})}."
        )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is patched: one row of the table for each kind of token."""

    name: str
    group: str
    edit: Edit
    n_latents: int = 0


def patching(
    models: ModelPair,
    crosscoder: Crosscoder,
    text: TokenizedText,
    *,
    latents: LatentMeasures,
    extra: Mapping[str, Sequence[int]] | None = None,
    kinds: Mapping[str, TokenFilter] | None = None,
    batch_size: int = 16,
    n_draws: int = N_DRAWS,
    seed: int = 0,
    show_progress: bool = False,
) -> PatchingResult:
    """Patch every variant into the fine-tuned model.

    Args:
        models: a pair, or more sites; of a diff-SAE, its difference.
        crosscoder: trained on them.
        text: whole chats, unpacked, for KL over responses; else any text.
        latents: measures of the crosscoder, for halves by Delta-norm and by nu.
        extra: further sets of latents by name, each a variant of its own.
        kinds: which predicted tokens are measured; responses and the first 9 of each, or, of text
            without chats, all.
        batch_size: contexts a forward pass.
        n_draws: bootstrap resamples of prompts.
        seed: of random latents and directions, and of the resamples.
        show_progress: with a progress bar.

    Raises:
        ValueError: a dictionary of other models, latents out of range, or prompts without tokens
            of the kind measured.
    """
    ctx = InterventionContext.of(models, crosscoder)
    kinds = kinds or kinds_of(text)
    chosen, how = candidates(ctx, latents)
    variants = [
        *whole(ctx),
        *of_candidates(ctx, chosen, latents),
        *at_places(ctx, kinds),
        *random_controls(ctx, chosen, latents, seed=seed),
        *(patched(ctx, ids, name=name, group="chosen") for name, ids in (extra or {}).items()),
    ]
    scores = score_edits(
        ctx,
        text,
        [v.edit for v in variants],
        reference=unchanged(ctx.finetuned),
        kinds=kinds,
        batch_size=batch_size,
        description="Patching" if show_progress else None,
    )
    return PatchingResult(
        rows=tuple(_rows(variants, scores, list(kinds), n_draws=n_draws, seed=seed)),
        compared=ctx.models.compared_names,
        candidates=how,
        candidate_latents=tuple(chosen.tolist()),
    )


def _rows(
    variants: Sequence[Variant],
    scores: EditScores,
    kinds: Sequence[str],
    *,
    n_draws: int,
    seed: int,
) -> list[PatchingRow]:
    n_prompts = scores.counts.shape[1]
    weights = bootstrap_weights(n_prompts, n_draws=n_draws, seed=seed)
    rows = []
    for k, kind in enumerate(kinds):
        counts, empty = scores.counts[k], scores.kl[0, k]
        for i, variant in enumerate(variants):
            own = scores.kl[i, k]
            kl = ratio_interval(own, counts, weights=weights)
            ce = ratio_interval(scores.ce[i, k], counts, weights=weights)
            share = interval(
                (1 - own.sum() / empty.sum()).item(), 1 - (weights @ own) / (weights @ empty)
            )
            rows.append(
                PatchingRow(
                    variant=variant.name,
                    group=variant.group,
                    tokens=kind,
                    n_latents=variant.n_latents,
                    n_tokens=int(counts.sum()),
                    n_prompts=n_prompts,
                    **{"kl": kl.value, "kl_low": kl.low, "kl_high": kl.high},
                    **{"ce": ce.value, "ce_low": ce.low, "ce_high": ce.high},
                    recovery=share.value,
                    recovery_low=share.low,
                    recovery_high=share.high,
                )
            )
    return rows


# --- variants -------------------------------------------------------------------------------------


def patched(
    ctx: InterventionContext,
    chosen: Sequence[int] | Tensor,
    *,
    name: str,
    group: str,
    directions: Float[Tensor, "n d_model"] | None = None,
) -> Variant:
    """h_S, or the same along other directions than d_j^1 - d_j^0."""
    ids = ctx.latents(chosen)
    v = ctx.difference[ids] if directions is None else directions
    edit = AddLatents(site=ctx.finetuned, stream=ctx.base, latents=ids, directions=v)
    return Variant(name=name, group=group, n_latents=len(ids), edit=edit)


def whole(ctx: InterventionContext) -> list[Variant]:
    """The whole dictionary: activations, all latents, errors, and reconstructions of two sites."""
    site, base = ctx.finetuned, ctx.base

    def variant(name: str, edit: Edit) -> Variant:
        return Variant(name=name, group="dictionary", edit=edit)

    found = [
        variant("base stream", ReplaceActivation(site=site, stream=base)),
        patched(ctx, range(ctx.dictionary.cfg.d_sae), name="all latents", group="dictionary"),
        variant("errors and biases, no latents", ErrorAndBias(site=site, ctx=ctx)),
    ]
    if ctx.models.is_difference:
        return found
    for name, own, error in (
        ("base reconstruction", base, None),
        ("fine-tuned reconstruction", site, None),
        ("base reconstruction, fine-tuned error", base, site),
        ("fine-tuned reconstruction, base error", site, base),
    ):
        edit = ReplaceWithReconstruction(site=site, ctx=ctx, reconstruction=own, error=error)
        found.append(variant(name, edit))
    return found


def candidates(ctx: InterventionContext, latents: LatentMeasures) -> tuple[Int[Tensor, " n"], str]:
    """Latents taken for the fine-tune's, and how they were chosen.

    Active latents that are finetuned-only, or, where they are few, lean most to the fine-tune. Of
    a diff-SAE, which has no decoder norms to compare: those that write most of the difference.
    """
    active = latents.n_active >= MIN_ACTIVE_TOKENS
    n_least = max(2, min(LEAST, int(active.sum())))
    n_most = max(n_least, round(SHARE * int(active.sum())))
    name: LatentClass = "finetuned-only" if ctx.base < ctx.finetuned else "base-only"
    if ctx.models.is_difference:
        lean = latents.firing.sum_of_codes * ctx.difference.norm(dim=1).cpu()
        n, how = n_most, f"the {n_most} latents that write most of the difference"
    else:
        lean = latents.delta_norm if name == "finetuned-only" else 1 - latents.delta_norm
        n = int((active & (latents.class_ids == LATENT_CLASSES.index(name))).sum())
        how = f"the {n} {name} latents"
        if n < n_least:
            few = f"{n} {name} latents are too few"
            n, how = n_most, f"{few}: the {n_most} active latents with the most extreme Delta-norm"
    order = lean.masked_fill(~active, -torch.inf).nan_to_num(-torch.inf).argsort(descending=True)
    return order[:n].to(ctx.models.device), how


def of_candidates(
    ctx: InterventionContext, chosen: Int[Tensor, " n"], latents: LatentMeasures
) -> list[Variant]:
    """Candidates, their halves by what chose them and by nu, and other ways to patch them."""
    group, site = "candidates", ctx.finetuned
    found = [patched(ctx, chosen, name="candidates", group=group)]
    first = "what they write" if ctx.models.is_difference else "Delta-norm"
    for name, order in {first: chosen, "nu": by_nu(ctx, chosen, latents)}.items():
        if order is not None and len(order) >= 2:
            half = len(order) // 2
            found += [
                patched(ctx, order[:half], name=f"top half by {name}", group=group),
                patched(ctx, order[half:], name=f"bottom half by {name}", group=group),
            ]
    rows = ctx.decoder(site)[chosen]
    return [
        *found,
        patched(ctx, chosen, name="candidates, additive only", group=group, directions=rows),
        Variant(
            name="fine-tuned stream without candidates",
            group=group,
            n_latents=len(chosen),
            edit=ProjectOut(site=site, stream=site, directions=rows),
        ),
    ]


def by_nu(
    ctx: InterventionContext, chosen: Int[Tensor, " n"], latents: LatentMeasures
) -> Int[Tensor, " n"] | None:
    """Candidates by the sum of their ranks in |nu_error| and |nu_reconstruction|, lowest first."""
    scaling = latents.scaling.get("finetuned" if ctx.base < ctx.finetuned else "base")
    if scaling is None:
        return None
    own = chosen.cpu()
    keys = nu_keys(scaling.nu_error.cpu()[own], scaling.nu_reconstruction.cpu()[own])
    order = keys.nan_to_num(-torch.inf).argsort(descending=True, stable=True)
    return chosen[order.to(chosen.device)]


def at_places(ctx: InterventionContext, kinds: Mapping[str, TokenFilter]) -> list[Variant]:
    """The fine-tuned activation itself at some tokens, and the base activation elsewhere."""
    places = {"template": TokenFilter(roles=("template",)), **kinds}
    own = unchanged(ctx.finetuned)
    return [
        Variant(
            name=f"fine-tuned stream at {name} tokens",
            group="places",
            edit=EditAtTokens(edit=own, places=place, otherwise=ctx.base),
        )
        for name, place in places.items()
    ]


def random_controls(
    ctx: InterventionContext, chosen: Int[Tensor, " n"], latents: LatentMeasures, *, seed: int
) -> list[Variant]:
    """Controls: active latents drawn at random, and random directions in the candidates' place."""
    generator = torch.Generator().manual_seed(seed)
    active = (latents.n_active >= MIN_ACTIVE_TOKENS).nonzero().squeeze(1)
    found = []
    for i in range(N_RANDOM):
        drawn = active[torch.randperm(len(active), generator=generator)[: len(chosen)]]
        found.append(patched(ctx, drawn, name=f"random latents {i}", group="random"))
    for i in range(N_RANDOM):
        v = random_like(ctx.difference[chosen], generator)
        name = f"candidates, random directions {i}"
        found.append(patched(ctx, chosen, name=name, group="random", directions=v))
    return found
