"""Latents of one dictionary that say the same thing: decoupled pairs, encoders, neighbours.

Contract: cosines of rows `[d_sae, d_model]` in the normalised space; tables name latents by their
number. A latent without a direction at a site is in no pair, and its cosine is NaN. Limit: alike
in direction is not alike in use; see when both are active for that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.decoder_norms import (
    LATENT_CLASSES,
    LatentClass,
    delta_norm,
    latent_class_ids,
)
from tl_crosscoder.analysis.neighbours import (
    Side,
    checked_latents,
    compared_positions,
    latent_rows,
    nearest,
    pairs_above,
    row_cosine,
)
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.tables import TableOfColumns, TableOfRows


@dataclass(frozen=True, kw_only=True)
class DecoupledPair:
    """A finetuned-only and a base-only latent that write the same direction."""

    finetuned_only: int
    """Latent."""
    base_only: int
    """Latent."""
    cosine: float
    """Of d_i^1 and d_j^0, i the first latent and j the second."""
    encoder_cosine: float
    """Of the columns that read the same two sites."""
    finetuned_delta_norm: float
    """Of the finetuned-only latent, at least 0.9."""
    base_delta_norm: float
    """Of the base-only latent, at most 0.1."""


@dataclass(frozen=True, kw_only=True)
class DecoupledPairs(TableOfRows):
    """All such pairs, highest cosine first."""

    ROW: ClassVar[type] = DecoupledPair
    threshold: float
    """Cosines are above this."""
    n_finetuned_only: int
    """Latents that could have been the first of a pair."""
    n_base_only: int
    """Latents that could have been the second."""


def decoupled_pairs(
    crosscoder: Crosscoder, *, threshold: float = 0.9, compared: tuple[str, str] | None = None
) -> DecoupledPairs:
    """Pairs of a finetuned-only and a base-only latent with a decoder cosine above the threshold.

    Such a pair says one thing twice: it is the signature of Latent Decoupling, and its first latent
    is no news of the fine-tune. Source: Minder et al. 2025 (109 pairs in their L1 crosscoder, none
    in their BatchTopK one).

    Raises:
        ValueError: the dictionary has no two such sites.
    """
    pair = compared_positions(crosscoder.sites, compared)
    names = [crosscoder.sites[i].name for i in pair]
    base, finetuned = (latent_rows(crosscoder, sites=[name]) for name in names)
    deltas = delta_norm(base.norm(dim=-1), finetuned.norm(dim=-1))
    ours, theirs = _of_class(deltas, "finetuned-only"), _of_class(deltas, "base-only")
    cosine, found = pairs_above(finetuned[ours], base[theirs], threshold=threshold)
    i, j = ours[found[:, 0].to(ours.device)], theirs[found[:, 1].to(theirs.device)]
    base, finetuned = (latent_rows(crosscoder, by="encoder", sites=[name]) for name in names)
    columns = {
        "finetuned_only": i,
        "base_only": j,
        "cosine": cosine,
        "encoder_cosine": row_cosine(finetuned[i], base[j]),
        "finetuned_delta_norm": deltas[i],
        "base_delta_norm": deltas[j],
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return DecoupledPairs(
        rows=tuple(DecoupledPair(**dict(zip(columns, row, strict=True))) for row in rows),
        threshold=threshold,
        n_finetuned_only=len(ours),
        n_base_only=len(theirs),
    )


def _of_class(deltas: Float[Tensor, " d_sae"], name: LatentClass) -> Int[Tensor, " n"]:
    return (latent_class_ids(deltas) == LATENT_CLASSES.index(name)).nonzero().squeeze(1)


@dataclass(frozen=True, kw_only=True)
class EncoderCounterparts(TableOfColumns):
    """Whether each latent reads the same direction in both models."""

    cosine: Float[Tensor, " d_sae"]
    """Of its two encoder columns; NaN where one of them is zero."""
    base_norm: Float[Tensor, " d_sae"]
    """||W_enc^0[:, j]|| in the normalised space."""
    finetuned_norm: Float[Tensor, " d_sae"]
    """||W_enc^1[:, j]|| in the normalised space."""
    sites: tuple[str, str]
    """Base first."""


@torch.no_grad()
def encoder_counterparts(
    crosscoder: Crosscoder, *, compared: tuple[str, str] | None = None
) -> EncoderCounterparts:
    """Cosine and norms of each latent's two encoder columns.

    Near 1, the latent reads one direction in both models, whichever of them it writes to (methods,
    section 3). Raises ValueError where the dictionary has no two such sites.
    """
    i, j = compared_positions(crosscoder.sites, compared)
    names = crosscoder.sites[i].name, crosscoder.sites[j].name
    base, finetuned = (latent_rows(crosscoder, by="encoder", sites=[n]) for n in names)
    return EncoderCounterparts(
        cosine=row_cosine(base, finetuned),
        base_norm=base.norm(dim=-1),
        finetuned_norm=finetuned.norm(dim=-1),
        sites=names,
    )


@dataclass(frozen=True, kw_only=True)
class SimilarLatent:
    """One neighbour of one latent."""

    latent: int
    rank: int
    """1 is the nearest."""
    neighbour: int
    cosine: float


@dataclass(frozen=True, kw_only=True)
class SimilarLatents(TableOfRows):
    """Neighbours of latents within one dictionary, nearest first."""

    ROW: ClassVar[type] = SimilarLatent
    by: str
    """`decoder` or `encoder`."""
    sites: tuple[str, ...]
    """Whose rows were compared, side by side."""


def similar_latents(
    crosscoder: Crosscoder,
    latents: Sequence[int] | Int[Tensor, " n"],
    *,
    k: int = 10,
    by: Side = "decoder",
    site: str | None = None,
) -> SimilarLatents:
    """The k latents nearest to each one, itself excepted.

    Args:
        crosscoder: the dictionary.
        latents: whose neighbours.
        k: how many of each; fewer where the dictionary has fewer with a direction.
        by: compare what latents write, or what they read.
        site: at this site alone; None is all sites side by side, in the normalised space.

    Raises:
        ValueError: a latent out of range, an unknown site or side.
    """
    ids = checked_latents(latents, crosscoder)
    sites = [s.name for s in crosscoder.sites] if site is None else [site]
    rows = latent_rows(crosscoder, by=by, sites=sites)
    # One more than asked for: a latent is the nearest to itself, or as near as its copies.
    cosine, where = nearest(rows[ids], rows, k=k + 1)
    found: list[SimilarLatent] = []
    for latent, *best in zip(ids.tolist(), cosine.tolist(), where.tolist(), strict=True):
        others = [each for each in zip(*best, strict=True) if each[1] not in (latent, -1)][:k]
        found += [
            SimilarLatent(latent=latent, rank=rank, neighbour=other, cosine=value)
            for rank, (value, other) in enumerate(others, start=1)
        ]
    return SimilarLatents(rows=tuple(found), by=by, sites=tuple(sites))
