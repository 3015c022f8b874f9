"""Decoder rows and encoder columns of latents: which model they belong to, and which are alike.

Contract: rows are in the normalised space (each row times its site's scale). Measures of two sites
have one orientation: 1 is the fine-tuned model, 0 the base. Queries `[n, d]` and keys `[m, d]` give
cosines and positions, best first; no more than `[CHUNK, m]` cosines are held at a time. A row of
zeros has no direction: its cosine is NaN, its position -1, and it is nobody's neighbour. Limits:
which of several equally near keys is named is left to chance; latents alike in direction may be
active on different tokens; norms alone say nothing about causes, see Latent Scaling for that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.site_views import checked_latents, split_sites
from tl_crosscoder.models.site import Site, compared_sites
from tl_crosscoder.results.tables import TableOfRows

LatentClass = Literal["base-only", "shared", "other", "finetuned-only"]
LATENT_CLASSES: tuple[LatentClass, ...] = get_args(LatentClass)
NORMS = ("relative_decoder_norm", "delta_norm", "decoder_cosine", "encoder_cosine")


def norm_measures(
    crosscoder: Crosscoder, pair: tuple[int, int] | None
) -> dict[str, Float[Tensor, " d_sae"]]:
    """The measures `NORMS` of two sites, base first; NaN for None, a single site."""
    if pair is None:
        none = crosscoder.W_dec.new_full((crosscoder.cfg.d_sae,), torch.nan)
        return dict.fromkeys(NORMS, none)
    decoders = normalised_decoders(crosscoder.W_dec, crosscoder.sites, pair)
    base, finetuned = (d.norm(dim=-1) for d in decoders)
    return {
        "relative_decoder_norm": relative_decoder_norm(base, finetuned),
        "delta_norm": delta_norm(base, finetuned),
        "decoder_cosine": decoder_cosine(*decoders),
        "encoder_cosine": decoder_cosine(*(crosscoder.encoder(i).detach().T for i in pair)),
    }


def normalised_decoders(
    W_dec: Float[Tensor, "d_sae d_in"], sites: Sequence[Site], pair: tuple[int, int]
) -> tuple[Float[Tensor, "d_sae _"], Float[Tensor, "d_sae _"]]:
    """The decoders of two sites, base first, in the normalised space.

    There the mean squared norm of a site is its width, so a wider site has longer rows: they are
    brought to the base's width, by a factor that is 1 where widths are equal.
    """
    rows = W_dec.detach().split([s.d_model for s in sites], dim=-1)
    base, finetuned = (rows[i] * sites[i].scale for i in pair)
    return base, finetuned * (base.shape[1] / finetuned.shape[1]) ** 0.5


def relative_decoder_norm(
    base: Float[Tensor, " d_sae"], finetuned: Float[Tensor, " d_sae"]
) -> Float[Tensor, " d_sae"]:
    """R_j = ||d_j^1|| / (||d_j^0|| + ||d_j^1||), in [0, 1], from the two norms.

    0 is base-only, 0.5 shared, 1 finetuned-only; NaN where both norms are zero.
    Source: Kassem et al. 2026, oriented to the fine-tune.
    """
    return finetuned / (base + finetuned)


def delta_norm(
    base: Float[Tensor, " d_sae"], finetuned: Float[Tensor, " d_sae"]
) -> Float[Tensor, " d_sae"]:
    """1/2 (1 + (||d_j^1|| - ||d_j^0||) / max(||d_j^0||, ||d_j^1||)), in [0, 1].

    0 is base-only, 0.5 equal norms, 1 finetuned-only; NaN where both norms are zero.
    Source: Minder et al. 2025, equation 5.
    """
    return (1 + (finetuned - base) / torch.maximum(base, finetuned)) / 2


def latent_class_ids(delta_norms: Float[Tensor, " d_sae"]) -> Int[Tensor, " d_sae"]:
    """Index into `LATENT_CLASSES`: >= 0.9 finetuned-only, <= 0.1 base-only, 0.4 to 0.6 shared.

    Everything else is `other`, a latent without norm (NaN) too. Source: Minder et al. 2025.
    """
    ids = torch.full_like(delta_norms, LATENT_CLASSES.index("other"), dtype=torch.long)
    ids[delta_norms >= 0.9] = LATENT_CLASSES.index("finetuned-only")
    ids[delta_norms <= 0.1] = LATENT_CLASSES.index("base-only")
    ids[(delta_norms >= 0.4) & (delta_norms <= 0.6)] = LATENT_CLASSES.index("shared")
    return ids


def decoder_cosine(
    base: Float[Tensor, "d_sae _"], finetuned: Float[Tensor, "d_sae _"]
) -> Float[Tensor, " d_sae"]:
    """Cosine of each latent's two decoder rows; 0 where one of them is zero.

    NaN for sites of unequal width, whose rows make no angle.
    """
    if base.shape != finetuned.shape:
        return base.new_full((len(base),), torch.nan)
    return torch.nn.functional.cosine_similarity(base, finetuned, dim=-1)


Rows = Literal["decoder", "encoder"]
CHUNK = 512


@torch.no_grad()
def nearest(
    queries: Float[Tensor, "n d"], keys: Float[Tensor, "m d"], *, k: int = 1
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k keys of highest cosine for each query, or all where they are fewer: (cosine, position).

    Raises ValueError for a k below 1.
    """
    if k < 1:
        raise ValueError(f"k={k} must be 1 or more.")
    found = [cosine.topk(min(k, len(keys))) for _, cosine in _blocks(queries, keys)]
    cosine, position = (torch.cat(parts) for parts in zip(*found, strict=True))
    is_none = cosine.isinf()
    return cosine.clamp(-1, 1).masked_fill(is_none, torch.nan), position.masked_fill(is_none, -1)


@torch.no_grad()
def pairs_above(
    queries: Float[Tensor, "n d"], keys: Float[Tensor, "m d"], *, threshold: float
) -> tuple[Float[Tensor, " pairs"], Int[Tensor, "pairs 2"]]:
    """All pairs (query, key) whose cosine is above a threshold, highest first."""
    cosines, pairs = [], []
    for start, cosine in _blocks(queries, keys):
        places = (cosine > threshold).nonzero()
        cosines.append(cosine[places[:, 0], places[:, 1]].clamp(-1, 1).cpu())
        pairs.append(places.cpu() + torch.tensor([start, 0]))
    found, order = torch.cat(cosines).sort(descending=True, stable=True)
    return found, torch.cat(pairs)[order]


def _blocks(queries: Tensor, keys: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First query and cosines `[CHUNK, m]` of each block; -inf where a row has no direction."""
    unit_keys, is_key = _unit(keys)
    # At least one block, so that results have a shape where there are no queries.
    for start in range(0, max(1, len(queries)), CHUNK):
        unit, is_query = _unit(queries[start : start + CHUNK])
        cosine = unit @ unit_keys.T
        yield start, cosine.masked_fill_(~(is_query[:, None] & is_key), -torch.inf)


@torch.no_grad()
def row_cosine(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Cosine of each row of one with the same row of the other; NaN where one of them is zero."""
    (a, is_a), (b, is_b) = _unit(a), _unit(b)
    return (a * b).sum(dim=-1).clamp(-1, 1).masked_fill(~(is_a & is_b), torch.nan)


def _unit(rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Bool[Tensor, " n"]]:
    rows = rows.detach().float()
    return normalize(rows, dim=-1, eps=1e-30), rows.abs().amax(dim=-1) > 0


def latent_rows(
    crosscoder: Crosscoder, *, by: Rows = "decoder", sites: Sequence[str] | None = None
) -> Float[Tensor, "d_sae d"]:
    """What each latent writes or reads, in the normalised space, sites side by side.

    Args:
        crosscoder: the dictionary.
        by: rows of the decoder, or columns of the encoder.
        sites: names of sites; None is all.

    Raises:
        ValueError: an unknown site, or another `by`.
    """
    if by not in get_args(Rows):
        raise ValueError(f"by={by!r} is not one of {get_args(Rows)}.")
    chosen = [crosscoder.site_index(name) for name in sites or [s.name for s in crosscoder.sites]]
    W = crosscoder.W_dec if by == "decoder" else crosscoder.W_enc.T
    parts = split_sites(W, crosscoder.sites)
    # The saved dictionary reads x where training read scale * x: rows shrank as columns grew.
    scales = [s.scale if by == "decoder" else 1 / s.scale for s in crosscoder.sites]
    return torch.cat([parts[i].detach().float() * scales[i] for i in chosen], dim=-1)


@dataclass(frozen=True, kw_only=True)
class DecoupledPair:
    """A finetuned-only and a base-only latent that write the same direction."""

    finetuned_only: int
    """Latent."""
    base_only: int
    """Latent."""
    cosine: float
    """Between d_i^1 and d_j^0, i the first latent and j the second."""
    encoder_cosine: float
    """Between the encoder columns that read the same two sites."""
    finetuned_delta_norm: float
    """Delta-norm of the finetuned-only latent, at least 0.9."""
    base_delta_norm: float
    """Delta-norm of the base-only latent, at most 0.1."""


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
    crosscoder: Crosscoder, *, threshold: float = 0.9, sites: tuple[str, str] | None = None
) -> DecoupledPairs:
    """Pairs of a finetuned-only and a base-only latent with a decoder cosine above the threshold.

    Such a pair explains one thing twice: it is the signature of Latent Decoupling, and its first
    latent is no news of the fine-tune. Source: Minder et al. 2025 (109 pairs in their L1
    crosscoder, none in their BatchTopK one).

    Args:
        crosscoder: the dictionary.
        threshold: cosines are above this.
        sites: names of two sites, base first; None is the two that are compared by default.

    Raises:
        ValueError: the dictionary has no two such sites of one width.
    """
    names = _two_sites(crosscoder, sites)
    base, finetuned = (latent_rows(crosscoder, sites=[name]) for name in names)
    deltas = delta_norm(base.norm(dim=-1), finetuned.norm(dim=-1))
    ours, theirs = _of_class(deltas, "finetuned-only"), _of_class(deltas, "base-only")
    cosine, found = pairs_above(finetuned[ours], base[theirs], threshold=threshold)
    i, j = ours[found[:, 0].to(ours.device)], theirs[found[:, 1].to(theirs.device)]
    base, finetuned = (latent_rows(crosscoder, by="encoder", sites=[name]) for name in names)
    columns = (i, j, cosine, row_cosine(finetuned[i], base[j]), deltas[i], deltas[j])
    fields = DecoupledPair.__dataclass_fields__
    return DecoupledPairs(
        rows=tuple(
            DecoupledPair(**dict(zip(fields, row, strict=True)))
            for row in zip(*(column.tolist() for column in columns), strict=True)
        ),
        threshold=threshold,
        n_finetuned_only=len(ours),
        n_base_only=len(theirs),
    )


def _two_sites(crosscoder: Crosscoder, names: tuple[str, str] | None) -> list[str]:
    """Names of two sites, whose rows make an angle."""
    pair = compared_sites(crosscoder.sites)
    if names is not None:
        pair = crosscoder.site_index(names[0]), crosscoder.site_index(names[1])
    chosen = [crosscoder.sites[i] for i in pair or ()]
    if len({s.name for s in chosen}) < 2 or len({s.d_model for s in chosen}) > 1:
        raise ValueError(
            f"{names} are not two sites of one width among "
            f"{[(s.name, s.d_model) for s in crosscoder.sites]} (name, width): name two of them, "
            "base first."
        )
    return [s.name for s in chosen]


def _of_class(deltas: Float[Tensor, " d_sae"], name: LatentClass) -> Int[Tensor, " n"]:
    return (latent_class_ids(deltas) == LATENT_CLASSES.index(name)).nonzero().squeeze(1)


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
    """Sites whose rows were compared, side by side."""


def similar_latents(
    crosscoder: Crosscoder,
    latents: Sequence[int] | Int[Tensor, " n"],
    *,
    k: int = 10,
    by: Rows = "decoder",
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
        ValueError: a latent out of range, or an unknown site.
    """
    ids = checked_latents(latents, crosscoder)
    sites = [s.name for s in crosscoder.sites] if site is None else [site]
    rows = latent_rows(crosscoder, by=by, sites=sites)
    # One more than requested: a latent is the nearest to itself, or as near as its copies.
    cosine, where = nearest(rows[ids], rows, k=k + 1)
    found: list[SimilarLatent] = []
    for latent, *best in zip(ids.tolist(), cosine.tolist(), where.tolist(), strict=True):
        others = [each for each in zip(*best, strict=True) if each[1] not in (latent, -1)][:k]
        found += [
            SimilarLatent(latent=latent, rank=rank, neighbour=other, cosine=value)
            for rank, (value, other) in enumerate(others, start=1)
        ]
    return SimilarLatents(rows=tuple(found), by=by, sites=tuple(sites))
