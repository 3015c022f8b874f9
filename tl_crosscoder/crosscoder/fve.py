"""Fraction of variance explained, per site and of the difference between sites, of one batch.

Activations and reconstructions are `[batch, n_sites, d_model]`, in raw space. The streaming twin
for whole texts is `analysis.reconstruction`.
"""

from jaxtyping import Float
from torch import Tensor


def fve(
    x: Float[Tensor, "batch n_sites d_model"], x_hat: Float[Tensor, "batch n_sites d_model"]
) -> Float[Tensor, " n_sites"]:
    """1 - sum ||x^m - x̂^m||^2 / sum ||x^m - mean||^2 for each site."""
    residual = (x - x_hat).pow(2).sum(dim=(0, 2))
    return 1 - residual / (x - x.mean(dim=0)).pow(2).sum(dim=(0, 2))


def difference_fve(
    x: Float[Tensor, "batch n_sites d_model"], x_hat: Float[Tensor, "batch n_sites d_model"]
) -> Float[Tensor, ""]:
    """The same for x^1 - x^0, last site minus first.

    The FVE of a site hides it: x^1 - x^0 can be a percent of the variance. NaN where both sites
    are equal everywhere.
    """
    difference, reconstructed = x[:, -1] - x[:, 0], x_hat[:, -1] - x_hat[:, 0]
    return fve(difference[:, None], reconstructed[:, None]).squeeze()
