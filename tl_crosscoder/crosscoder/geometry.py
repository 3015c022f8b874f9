"""Vector geometry that the dictionary starts from: the geometric median."""

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def geometric_median(
    points: Float[Tensor, "batch d_model"], *, n_iterations: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, " d_model"]:
    """The point with the smallest sum of distances to `points` (Weiszfeld's iteration).

    Unlike the mean it is not moved by the few tokens of enormous norm. Stops when a step is
    below `tolerance` of the median's own norm, or after `n_iterations`.
    """
    median = points.mean(dim=0)
    for _ in range(n_iterations):
        weights = 1 / (points - median).norm(dim=-1).clamp(min=1e-8)
        moved = (weights[:, None] * points).sum(dim=0) / weights.sum()
        step = (moved - median).norm()
        median = moved
        if step <= tolerance * median.norm():
            break
    return median
