"""What the parts of a dictionary, and its latents, say of the difference x^1 - x^0.

Beside the difference FVE by class of `tl_crosscoder.analysis`: the same by the parts of the recipe
(shared, delta), the share of activations of each part, and how much each latent adds to the
difference. A single site is taken for the difference, as a diff-SAE has it. Rows are raw
activations, as the source gives them. Limit: what two parts say in common counts for both.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.analysis.reconstruction import Moments
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.partition import Partition
from tl_crosscoder.models.site import site_parts

N_ROWS = 4096
"""Tokens encoded at a time."""


@dataclass(frozen=True, kw_only=True)
class DifferenceParts:
    """Sums over tokens, which add up over batches."""

    finetuned: Moments
    """x^1."""
    difference: Moments
    """x^1 - x^0."""
    said: Moments
    """What all latents say of it."""
    left_by_part: Moments
    """What remains of it beside what each part says."""
    n_active: Float[Tensor, " d_sae"]
    squared_codes: Float[Tensor, " d_sae"]

    @classmethod
    def of(
        cls, x: Tensor, crosscoder: Crosscoder, parts: Sequence[tuple[Partition, slice]]
    ) -> "DifferenceParts":
        """Sums of one batch of rows."""
        sites = site_parts(x, crosscoder.sites)
        difference = sites[-1] - sites[0] if len(sites) > 1 else sites[0]
        codes, delta = crosscoder.encode(x), decoder_difference(crosscoder)
        by_part = [codes[:, own] @ delta[own] for _, own in parts]
        left = [difference - said for said in by_part]
        return cls(
            finetuned=Moments.of(sites[-1]),
            difference=Moments.of(difference),
            said=Moments.of(codes @ delta),
            left_by_part=Moments.of(
                torch.stack(left, dim=1) if left else difference[:, None][:, :0]
            ),
            n_active=(codes > 0).sum(dim=0).double(),
            squared_codes=codes.double().pow(2).sum(dim=0),
        )

    def __add__(self, other: "DifferenceParts") -> "DifferenceParts":
        """Sums of both."""
        names = [f.name for f in fields(self)]
        return DifferenceParts(**{n: getattr(self, n) + getattr(other, n) for n in names})

    def result(
        self, crosscoder: Crosscoder, parts: Sequence[tuple[Partition, slice]]
    ) -> dict[str, Any]:
        """Plain numbers; None where there are no parts, and the FVE where there is no difference.

        `claimed_difference_share` is the variance of x̂^1 - x̂^0 over that of x^1, of two sites.
        """
        names = [p.name for p, _ in parts]
        variance = self.difference.sum_of_squared_deviations
        fve = 1 - self.left_by_part.sum_of_squared_deviations / variance
        active = torch.stack([self.n_active[own].sum() for _, own in parts]) if parts else None
        total = self.n_active.sum().clamp(min=1)
        claimed = self.said.sum_of_squared_deviations / self.finetuned.sum_of_squared_deviations
        return {
            "difference_fve_by_part": dict(zip(names, fve.tolist(), strict=True))
            if parts and variance > 0
            else None,
            "activations_by_part": dict(zip(names, (active / total).tolist(), strict=True))
            if active is not None
            else None,
            "claimed_difference_share": claimed.item() if crosscoder.n_sites > 1 else None,
        }

    def contribution(self, crosscoder: Crosscoder) -> Float[Tensor, " d_sae"]:
        """Mean over tokens of ||f_j (d_j^1 - d_j^0)||^2."""
        squares = decoder_difference(crosscoder).double().pow(2).sum(dim=-1)
        return self.squared_codes * squares / self.difference.n


def decoder_difference(crosscoder: Crosscoder) -> Float[Tensor, "d_sae d_model"]:
    """d_j^1 - d_j^0, raw space; of a single site d_j."""
    if crosscoder.n_sites == 1:
        return crosscoder.W_dec.detach()
    return (crosscoder.decoder(-1) - crosscoder.decoder(0)).detach()


@torch.no_grad()
def difference_parts(
    crosscoder: Crosscoder, batches: Iterable[Tensor], parts: Sequence[tuple[Partition, slice]]
) -> DifferenceParts:
    """Sums over all rows of these batches."""
    rows = (x for batch in batches for x in batch.split(N_ROWS))
    return reduce(add, (DifferenceParts.of(x, crosscoder, parts) for x in rows))
