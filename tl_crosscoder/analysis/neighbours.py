"""Nearest rows by cosine, without a matrix of all against all.

Contract: `nearest` takes queries `[n, d]` and keys `[m, d]` and gives cosines and positions
`[n, k]`, best first; no more than `[chunk, chunk]` cosines are held at a time. Rows are those of
decoders, or of encoders transposed, in the normalised space. A row of zeros has no direction: its
cosine is NaN and its position -1, and it is nobody's neighbour. Limit: which of several equally
near keys is named is left to chance.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.site_views import split_sites
from tl_crosscoder.site import Site, compared_sites, site_index

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
