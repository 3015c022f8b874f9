"""Intervals and p-values by resampling: what a number is worth.

Contract: resampling is over units that are independent (prompts, contexts), seeded, and a pure
function of the numbers. Sources: Efron 1979 (percentile bootstrap); Phipson and Smyth 2010
(permutation p-values are never zero); Holm 1979. Limit: percentile intervals of a few units (below
ten or so) are too narrow.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

N_DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and its 95 % percentile interval."""

    value: float
    low: float
    high: float


def bootstrap_weights(
    n_units: int, *, n_draws: int = N_DRAWS, seed: int = 0
) -> Float[Tensor, "n_draws n_units"]:
    """How often each unit is in each resample with replacement.

    One set of weights for all quantities that are compared keeps them paired.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_units, (n_draws, n_units), generator=generator)
    weights = torch.zeros(n_draws, n_units, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(weights))


def interval(value: float, draws: Float[Tensor, " n_draws"]) -> Interval:
    """An estimate with the percentiles of its resamples; NaN where a resample has no value."""
    ends = torch.tensor([(1 - 0.95) / 2, (1 + 0.95) / 2], dtype=torch.float64)
    low, high = draws.double().quantile(ends).tolist()
    return Interval(value=value, low=low, high=high)


def ratio_interval(
    sums: Float[Tensor, " n_units"],
    counts: Float[Tensor, " n_units"],
    *,
    weights: Float[Tensor, "n_draws n_units"],
) -> Interval:
    """Sum / count over all units, such as nats a token where units are contexts."""
    sums, counts = sums.double(), counts.double()
    return interval((sums.sum() / counts.sum()).item(), (weights @ sums) / (weights @ counts))


def p_value(ours: float, controls: Float[Tensor, " n_controls"]) -> float:
    """Probability of a control at least as large as ours: (1 + #{c >= ours}) / (1 + n).

    One-sided; with 100 controls the smallest is 0.0099. NaN where ours is NaN.
    """
    if ours != ours:
        return float("nan")
    return (1 + int((controls >= ours).sum())) / (1 + len(controls))


def holm(p_values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """p-values corrected for how many there are (Holm's step-down); NaN are left out and stay."""
    corrected = p_values.double().clone()
    known = (~corrected.isnan()).nonzero().squeeze(1)
    order = known[corrected[known].argsort(stable=True)]
    factors = torch.arange(len(order), 0, -1, dtype=torch.float64)
    corrected[order] = (corrected[order] * factors).cummax(dim=0).values.clamp(max=1.0)
    return corrected


def effect_size(ours: float, controls: Float[Tensor, " n_controls"]) -> float:
    """How many standard deviations of the controls ours is above their mean; NaN of none."""
    if len(controls) < 2:
        return float("nan")
    spread = controls.double().std().item()
    return (ours - controls.double().mean().item()) / spread if spread > 0 else float("nan")
