"""The terms of the loss, each a pure function of errors, activations and decoded parts.

Shapes: activations, reconstructions and errors are flat, `[batch, d_in]`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.choices import Reconstruction
from tl_crosscoder.crosscoder.config import AuxK
from tl_crosscoder.crosscoder.site_views import split_sites
from tl_crosscoder.site import Site, subtracted_sites


def reconstruction_loss(
    x: Float[Tensor, "batch d_in"],
    x_hat: Float[Tensor, "batch d_in"],
    sites: tuple[Site, ...],
    *,
    reduction: Reconstruction,
) -> Float[Tensor, ""]:
    """Mean over tokens of the summed error of the sites.

    `sum` is sum_m ||e^m||^2 (Lindsey et al. 2024), `mean` divides each site by its width, and
    `norm` is sum_m ||e^m||.
    """
    if reduction == "sum":
        return torch.nn.functional.mse_loss(x_hat, x, reduction="sum") / len(x)
    per_site = split_sites(x - x_hat, sites)
    if reduction == "mean":
        return torch.stack([e.pow(2).mean(dim=-1) for e in per_site]).sum(dim=0).mean()
    return torch.stack([e.norm(dim=-1) for e in per_site]).sum(dim=0).mean()


def site_difference(
    flat: Float[Tensor, "*batch d_in"], sites: tuple[Site, ...]
) -> Float[Tensor, "*batch d_model"]:
    """What the fine-tuned site has more than the base; which these are, `subtracted_sites` says."""
    compared = subtracted_sites(sites)
    assert compared is not None, "the config refuses sites that cannot be subtracted"
    base, finetuned = compared
    per_site = split_sites(flat, sites)
    return per_site[finetuned] - per_site[base]


def delta_loss(
    x: Float[Tensor, "batch d_in"],
    explained: Float[Tensor, "batch d_in"],
    sites: tuple[Site, ...],
) -> Float[Tensor, ""]:
    """Mean over tokens of ||(x^1 - x^0) - (y^1 - y^0)||^2, y being what some latents decode to.

    Source: Kassem et al. 2026, equation of L_delta; the reduction is [open] there.
    """
    return site_difference(x - explained, sites).pow(2).sum(dim=-1).mean()


def auxk_codes(
    pre: Float[Tensor, "batch n_dead"],
    norms: Float[Tensor, " n_dead"],
    *,
    k: int,
) -> Float[Tensor, "batch n_dead"]:
    """For each token the codes of the dead latents with the k largest f_j n_j, 0 elsewhere."""
    codes = pre.relu()
    if k >= pre.shape[1]:
        return codes
    top = (codes.detach() * norms.detach()).topk(k, dim=-1).indices
    return codes * torch.zeros_like(codes).scatter_(-1, top, 1.0)


def auxk_loss(
    residual: Float[Tensor, "batch d_in"], decoded: Float[Tensor, "batch d_in"], auxk: AuxK
) -> Float[Tensor, ""]:
    """Squared error of the residual as the dead latents reconstruct it, over its variance.

    The decoder bias takes no part, since it is in the residual already. Source: Gao et al. 2024,
    appendix A.2.
    """
    residual = residual.detach()
    error = (residual - decoded).pow(2).sum(dim=-1).mean()
    variance = (residual - residual.mean(dim=0)).pow(2).sum(dim=-1).mean()
    return auxk.weight * error / variance.clamp(min=1e-12)
