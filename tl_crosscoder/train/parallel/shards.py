"""Which latents a process holds, and tensors of a dictionary put together from its shards.

Every range of latents with rules of its own, partition or nested prefix, is shared out evenly: a
shard is a dictionary of the same kind with an n-th of the latents of each range. Limit: ranges that
do not divide evenly are refused, with the nearest size that does.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_crosscoder.crosscoder.config import CrosscoderTrainingConfig

UNSHARDED = ("b_dec", "mean_squared_difference")
"""Tensors that every process holds whole."""


def edges_of(cfg: CrosscoderTrainingConfig) -> list[int]:
    """First latent of each range, and the end of the last."""
    placed = [own.start for _, own in cfg.placed_partitions()]
    prefixes = [max(1, round(share * cfg.d_sae)) for share in cfg.matryoshka]
    return sorted({0, *placed, *prefixes, cfg.d_sae})


def shard_config(cfg: CrosscoderTrainingConfig, n: int, **changes: Any) -> CrosscoderTrainingConfig:
    """The dictionary of one of n shards.

    Raises:
        ValueError: a range whose latents do not divide evenly, or a k above a shard's latents.
    """
    if not _divides(cfg, cfg.d_sae, n):
        near = (d for i in range(cfg.d_sae) for d in (cfg.d_sae - i, cfg.d_sae + i))
        fitting = next((d for d in near if d >= n and _divides(cfg, d, n)), None)
        raise ValueError(
            f"d_sae {cfg.d_sae:,} cannot be shared out to {n} processes (latent_parallel): its "
            f"ranges {[*pairwise(edges_of(cfg))]} do not divide by {n}. Choose d_sae "
            f"{fitting if fitting is None else format(fitting, ',')}, or fewer processes."
        )
    return replace(cfg, d_sae=cfg.d_sae // n, **changes)


def _divides(cfg: CrosscoderTrainingConfig, d_sae: int, n: int) -> bool:
    if d_sae % n:
        return False
    try:
        whole, own = (edges_of(replace(cfg, d_sae=d)) for d in (d_sae, d_sae // n))
    except ValueError:  # a partition without a latent, or with fewer than its k
        return False
    return whole == [n * edge for edge in own]


def latents_of(cfg: CrosscoderTrainingConfig, index: int, n: int) -> Int[Tensor, " n_own"]:
    """The latents of a shard in the whole dictionary, in their order."""
    parts = [torch.arange(a, b).chunk(n)[index] for a, b in pairwise(edges_of(cfg))]
    return torch.cat(parts)


def latent_dim(name: str, tensor: Tensor) -> int | None:
    """The dimension of a tensor that counts latents, by its name or that of its parameter."""
    parameter = name.split("/")[0]
    if tensor.ndim == 0 or parameter in UNSHARDED:
        return None
    return 1 if parameter == "W_enc" else 0


def add_shard_(
    whole: dict[str, Tensor],
    own: Int[Tensor, " n_own"],
    shard: Mapping[str, Tensor],
    theirs: Int[Tensor, " n_theirs"],
) -> None:
    """Copy what a shard has of the latents `own` to their places in `whole`."""
    is_own = torch.isin(theirs, own)
    places = torch.searchsorted(own, theirs[is_own])
    for name, tensor in shard.items():
        dim = latent_dim(name, tensor)
        if dim is None:
            whole[name] = tensor
        elif len(places):
            shape = [len(own) if d == dim else size for d, size in enumerate(tensor.shape)]
            into = whole.setdefault(name, tensor.new_zeros(shape))
            into.index_copy_(dim, places, tensor.index_select(dim, is_own.nonzero().squeeze(1)))
