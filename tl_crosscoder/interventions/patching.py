"""Patching for KL recovery: how much of what the fine-tune does goes through which latents?

    h_S = x^0 + sum_{j in S} f_j (d_j^1 - d_j^0)      the fine-tuned model goes on from h_S
    recovery(S) = 1 - KL(S) / KL(empty set)           KL(p_finetuned || p_{h_S}), nats a token

over the tokens that the assistant says, and the first of them (Minder et al. 2025, arXiv
2504.02922). Intervals are bootstraps over prompts, paired between variants. Limit: the hook's layer
is the only one patched, so KL(empty set) already tells how much of the fine-tune happens below it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tl_crosscoder.analysis.latents import LatentMeasures
from tl_crosscoder.analysis.resampling import N_DRAWS, bootstrap_weights, interval, ratio_interval
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import TokenFilter
from tl_crosscoder.interventions.running import EditScores, kinds_of, score_edits, unchanged
from tl_crosscoder.interventions.variants import (
    Variant,
    at_places,
    candidates,
    of_candidates,
    patched,
    random_controls,
    whole,
)
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.results.tables import TableOfRows


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

    @property
    def drawn_as(self) -> str:
        """The variant without the number that tells draws of one kind of control apart."""
        return self.variant.rstrip("0123456789 ")


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
    """Patch every variant (`variants`) into the fine-tuned model.

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
    chosen = candidates(ctx, latents)
    variants = [
        *whole(ctx),
        *of_candidates(ctx, chosen.latents, latents),
        *at_places(ctx, kinds),
        *random_controls(ctx, chosen.latents, latents, seed=seed),
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
        candidates=chosen.how,
        candidate_latents=tuple(chosen.latents.tolist()),
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
