"""Nearest rows by cosine, without a matrix of all against all.

Contract: `nearest` takes queries `[n, d]` and keys `[m, d]` and gives cosines and positions
`[n, k]`, best first; no more than `[chunk, chunk]` cosines are held at a time. Rows are those of
decoders, or of encoders transposed, in the normalised space. A row of zeros has no direction: its
cosine is NaN and its position -1, and it is nobody's neighbour. Limit: which of several equally
near keys is named is left to chance.

Latents of one dictionary that say the same thing: decoupled pairs, encoders, neighbours.

Contract: cosines of rows `[d_sae, d_model]` in the normalised space; tables name latents by their
number. A latent without a direction at a site is in no pair, and its cosine is NaN. Limit: alike
in direction is not alike in use; see when both are active for that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from tl_crosscoder.analysis.norms import LATENT_CLASSES, LatentClass, delta_norm, latent_class_ids
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.site_views import split_sites
from tl_crosscoder.models.site import Site, compared_sites, site_index
from tl_crosscoder.results.tables import TableOfColumns, TableOfRows

Side = Literal["decoder", "encoder"]
CHUNK = 4096


@torch.no_grad()
def nearest(
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "m d"],
    *,
    k: int = 1,
    chunk: int = CHUNK,
    exclude_self: bool = False,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k keys of highest cosine for each query: (cosine, position).

    Args:
        queries: rows to find neighbours for.
        keys: rows to find them among.
        k: how many.
        chunk: rows of a block.
        exclude_self: queries and keys are the same rows, and none is its own neighbour.

    Raises:
        ValueError: k or chunk below 1, or `exclude_self` for two sets of unequal size.
    """
    if k < 1 or chunk < 1 or (exclude_self and len(queries) != len(keys)):
        raise ValueError(
            f"k={k}, chunk={chunk}, {len(queries)} queries, {len(keys)} keys: k and chunk are at "
            "least 1, and exclude_self=True needs the same rows as queries and keys."
        )
    unit_keys, is_key = _unit(keys)
    found = []
    for start in range(0, len(queries), chunk):
        unit, is_query = _unit(queries[start : start + chunk])
        best = unit.new_full((len(unit), k), -torch.inf)
        where = torch.full_like(best, -1, dtype=torch.long)
        for first in range(0, len(keys), chunk):
            cosine = unit @ unit_keys[first : first + chunk].T
            cosine[:, ~is_key[first : first + chunk]] = -torch.inf
            if exclude_self and first == start:
                cosine.fill_diagonal_(-torch.inf)
            new = cosine.topk(min(k, cosine.shape[1]))
            best, order = torch.cat([best, new.values], dim=1).topk(k)
            where = torch.cat([where, new.indices + first], dim=1).gather(1, order)
        is_none = best.isinf() | ~is_query[:, None]
        found.append((best.clamp(-1, 1).masked_fill(is_none, torch.nan),
                      where.masked_fill(is_none, -1)))  # fmt: skip
    if not found:
        return keys.new_zeros((0, k), dtype=torch.float32), torch.zeros((0, k), dtype=torch.long)
    cosines, positions = zip(*found, strict=True)
    return torch.cat(cosines), torch.cat(positions)


@torch.no_grad()
def pairs_above(
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "m d"],
    *,
    threshold: float,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, " pairs"], Int[Tensor, "pairs 2"]]:
    """All pairs (query, key) whose cosine is above a threshold, highest first."""
    unit_keys, is_key = _unit(keys)
    cosines, pairs = [unit_keys.new_zeros(0)], [torch.zeros((0, 2), dtype=torch.long)]
    for start in range(0, len(queries), chunk):
        unit, is_query = _unit(queries[start : start + chunk])
        for first in range(0, len(keys), chunk):
            cosine = unit @ unit_keys[first : first + chunk].T
            is_pair = is_query[:, None] & is_key[first : first + chunk]
            row, column = ((cosine > threshold) & is_pair).nonzero(as_tuple=True)
            cosines.append(cosine[row, column].clamp(-1, 1))
            pairs.append(torch.stack([row + start, column + first], dim=1).cpu())
    cosine, order = torch.cat(cosines).cpu().sort(descending=True, stable=True)
    return cosine, torch.cat(pairs)[order]


@torch.no_grad()
def row_cosine(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Cosine of each row of one with the same row of the other; NaN where one of them is zero."""
    (a, is_a), (b, is_b) = _unit(a), _unit(b)
    return (a * b).sum(dim=-1).clamp(-1, 1).masked_fill(~(is_a & is_b), torch.nan)


def latent_rows(
    crosscoder: Crosscoder, *, by: Side = "decoder", sites: Sequence[str] | None = None
) -> Float[Tensor, "d_sae d"]:
    """What each latent writes or reads, in the normalised space, sites side by side.

    Args:
        crosscoder: the dictionary.
        by: rows of the decoder, or columns of the encoder.
        sites: names of sites; None is all.

    Raises:
        ValueError: an unknown site or side.
    """
    if by not in get_args(Side):
        raise ValueError(f"by={by!r} is not one of {get_args(Side)}.")
    chosen = [crosscoder.site_index(name) for name in sites or [s.name for s in crosscoder.sites]]
    parts = split_sites(crosscoder.W_dec if by == "decoder" else crosscoder.W_enc.T,
                        crosscoder.sites)  # fmt: skip
    # The saved dictionary reads x where training read scale * x: rows shrank as columns grew.
    scales = [s.scale if by == "decoder" else 1 / s.scale for s in crosscoder.sites]
    return torch.cat([parts[i].detach().float() * scales[i] for i in chosen], dim=-1)


def compared_positions(
    sites: Sequence[Site], compared: tuple[str, str] | None = None
) -> tuple[int, int]:
    """Positions of two sites, base first; None is `compared_sites`.

    Raises ValueError where there are no two of one width, whose rows would make no angle.
    """
    if compared is None:
        pair = compared_sites(sites)
    else:
        pair = site_index(sites, compared[0]), site_index(sites, compared[1])
    widths = set() if pair is None else {sites[i].d_model for i in pair}
    if pair is None or pair[0] == pair[1] or len(widths) > 1:
        raise ValueError(
            f"{compared or 'the default'} does not name two sites of one width among "
            f"{[(s.name, s.d_model) for s in sites]}; name them with compared=(base, finetuned)."
        )
    return pair


def checked_latents(
    latents: Sequence[int] | Int[Tensor, " n"], crosscoder: Crosscoder
) -> Int[Tensor, " n"]:
    """Latents as a tensor. Raises ValueError where there is none, or one is out of range."""
    d_sae = crosscoder.cfg.d_sae
    ids = torch.as_tensor(latents, dtype=torch.long).to(crosscoder.W_dec.device)
    bad = ids[(ids < 0) | (ids >= d_sae)].tolist()
    if bad or not len(ids):
        raise ValueError(
            f"latents {bad or '[]'} are not in the dictionary: name at least one of its {d_sae:,}, "
            f"numbered 0 to {d_sae - 1}."
        )
    return ids


def _unit(rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Bool[Tensor, " n"]]:
    rows = rows.detach().float()
    return normalize(rows, dim=-1, eps=1e-30), rows.abs().amax(dim=-1) > 0


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
