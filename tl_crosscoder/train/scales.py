"""Site scales: in training every site has a mean squared norm equal to its width.

Measured on the first rows of the text; folded into the dictionary at save and recorded in its
sites. Shapes: rows of activations, `[n_sites, d_model]` or `[d_in]` (see `site.row_shape`).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.site import Site, row_shape, site_parts


def site_scales(
    activations: Float[Tensor, "tokens n_sites d_model"],
) -> tuple[float, ...]:
    """For each site the factor that makes its mean squared norm equal to its width."""
    mean_squared_norm = activations.pow(2).sum(dim=-1).cpu().double().mean(dim=0)
    return tuple((activations.shape[-1] / mean_squared_norm).sqrt().tolist())


def scales_of_rows(rows: Float[Tensor, "tokens *row"], sites: Sequence[Site]) -> tuple[float, ...]:
    """The same of rows of either shape."""
    if len(row_shape(sites)) == 2:
        return site_scales(rows)
    return tuple(site_scales(part[:, None])[0] for part in site_parts(rows, sites))


def row_factors(scales: Sequence[float], sites: Sequence[Site]) -> Float[Tensor, "..."]:
    """What a row is multiplied by: `[n_sites, 1]`, or `[d_in]` with each site's factor repeated."""
    factors = torch.tensor(scales)
    if len(row_shape(sites)) == 2:
        return factors[:, None]
    return factors.repeat_interleave(torch.tensor([site.d_model for site in sites]))
