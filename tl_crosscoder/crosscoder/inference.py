"""Codes of a trained crosscoder as entries: the latents that are active, and nothing else.

Contract: the entries of `crosscoder.encode(x)` that are above zero, in the order of tokens and then
of latents. Limit: the search holds dense codes of `N_ROWS` tokens at a time.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.crosscoder.codes import Pattern, SparseCodes
from tl_crosscoder.crosscoder.crosscoder import Crosscoder

N_ROWS = 4096
"""Tokens encoded at a time."""


@torch.no_grad()
def sparse_codes(crosscoder: Crosscoder, x: Float[Tensor, "batch *row"]) -> SparseCodes:
    """Codes of rows of raw activations, at inference."""
    parts = [_of_rows(crosscoder, rows) for rows in x.split(N_ROWS)]
    if len(parts) == 1:
        return parts[0]
    latents, values = (
        torch.cat(each)
        for each in zip(*((p.pattern.latents, p.values) for p in parts), strict=True)
    )
    counts = torch.cat([p.pattern.offsets.diff() for p in parts])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=counts.dtype)])
    pattern = Pattern(latents=latents, offsets=offsets, d_sae=crosscoder.cfg.d_sae)
    return SparseCodes(pattern=pattern, values=values)


def _of_rows(crosscoder: Crosscoder, x: Float[Tensor, "batch *row"]) -> SparseCodes:
    """What `encode` computes, with one pass over the pre-activations where it has four."""
    pre = crosscoder.process_sae_in(crosscoder.flatten(x)) @ crosscoder.W_enc
    pre += crosscoder.b_enc
    positions = (pre > crosscoder.threshold.clamp(min=0)).flatten().nonzero().squeeze(1)
    return SparseCodes(
        pattern=Pattern.at(positions, shape=(len(pre), pre.shape[1])),
        values=pre.flatten()[positions],
    )
