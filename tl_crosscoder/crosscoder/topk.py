"""Selections: sparsities that keep the k largest weighted codes, of a token or of a batch.

Two forms of one selection: `keep` over the codes of all latents, and `find`, which gives the same
entries without them. Limit: between batches only the threshold and a guess are remembered.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_crosscoder.config.settings import NaturalInt, PositiveFloat, Share
from tl_crosscoder.crosscoder.partition import Partition
from tl_crosscoder.crosscoder.sparse.codes import Codes
from tl_crosscoder.crosscoder.sparse.selection import Found, Scores, batch_topk, largest, token_topk
from tl_crosscoder.crosscoder.sparsity import Groups, Sparsity


@dataclass(frozen=True, kw_only=True)
class Selection(Sparsity, ABC):
    """The largest weighted codes f_j n_j stay, f_j unscaled; each group has its own threshold.

    In training the threshold is a running mean of the smallest kept f_j n_j; at the end it is
    calibrated on held-out tokens to keep k on average.
    """

    k: PositiveFloat = 100
    """Mean number of active latents a token."""
    threshold_momentum: Share = 0.999
    """Momentum of the running threshold, which starts at its first observation. It lags in short
    runs: the trainer here replaces it at the end; for SAELens's trainer choose 0.9 to 0.99."""

    @abstractmethod
    def keep(
        self, weighted: Float[Tensor, "batch n"], k: float, *, latents: slice | None = None
    ) -> Bool[Tensor, "batch n"]:
        """Which weighted codes of a group stay; of equal ones the first."""

    def groups(self, partitions: Sequence[tuple[Partition, slice]], d_sae: int) -> Groups:
        """Each partition with a k of its own, and the rest together.

        Raises:
            ValueError: a k above the number of latents, or partitions without a k that do not lie
                side by side.
        """
        groups = [(latents, p.k) for p, latents in partitions if p.k is not None]
        pooled = [latents for p, latents in partitions if p.k is None]
        if not partitions:
            pooled = [slice(0, d_sae)]
        if any(a.stop != b.start for a, b in pairwise(pooled)):
            raise ValueError("partitions that share one k must lie side by side.")
        if pooled:
            groups.append((slice(pooled[0].start, pooled[-1].stop), self.k))
        for latents, k in groups:
            if k > latents.stop - latents.start:
                raise ValueError(
                    f"k is {k:g}, but the dictionary has only {latents.stop - latents.start} "
                    f"latents to choose from{'' if partitions else ' (d_sae)'}. Choose a smaller k "
                    "or a larger dictionary."
                )
        return sorted(groups, key=lambda group: group[0].start)

    def observe_(self, threshold: Tensor, codes: Codes, norms: Tensor, groups: Groups) -> None:
        """Running mean of each group's smallest kept f_j n_j, from its first observation on."""
        for latents, _ in groups:
            smallest, own = self.smallest(codes, norms, latents), threshold[latents]
            updated = torch.lerp(smallest, own, self.threshold_momentum)
            updated = torch.where(own > 0, updated, smallest)
            # No branch on values: that would wait for the GPU at every step.
            own.copy_(torch.where(smallest.isfinite(), updated, own))

    def smallest(self, codes: Codes, norms: Tensor, latents: slice) -> Float[Tensor, ""]:
        """The smallest kept f_j n_j of a range of latents; infinity without any."""
        return codes.smallest(norms, latents)

    def calibrate_(self, threshold: Tensor, batches: Iterable[Tensor], groups: Groups) -> None:
        """The value that keeps k of each group. Raises ValueError without any token."""
        values, n_tokens = [[] for _ in groups], 0
        for weighted in batches:
            n_tokens += len(weighted)
            for (latents, k), own in zip(groups, values, strict=True):
                # A batch can hold more than its share of the largest: three times the share is
                # exact unless one batch of tokens is three times as active as the mean.
                flat, n = weighted[:, latents].flatten(), round(3 * k * len(weighted)) + 1
                own.append(flat.topk(min(n, len(flat)), sorted=False).values)
        if n_tokens == 0:
            raise ValueError("there are no tokens to calibrate the threshold on.")
        for (latents, k), own in zip(groups, values, strict=True):
            threshold[latents] = self.threshold_keeping(k, n_tokens, torch.cat(own))

    def threshold_keeping(
        self, k: float, n_tokens: int, values: Float[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        """The threshold that k a token of the weighted codes of some tokens are above."""
        return threshold_keeping(round(k * n_tokens), values)


@dataclass(frozen=True, kw_only=True)
class TopK(Selection):
    """For each token the k largest f_j n_j stay; k is a whole number.

    Source: Gao et al. 2024.
    """

    kind: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k != round(self.k):
            raise ValueError(f"k is {self.k}; TopK takes a whole number above 0.")

    def groups(self, partitions: Sequence[tuple[Partition, slice]], d_sae: int) -> Groups:
        """Latents that are selected together; each k must be whole."""
        groups = super().groups(partitions, d_sae)
        for _, k in groups:
            if k != round(k):
                raise ValueError(f"a partition has k = {k:g}; TopK takes whole numbers.")
        return groups

    def keep(
        self, weighted: Tensor, k: float, *, latents: slice | None = None
    ) -> Bool[Tensor, "batch n"]:
        """The k largest of each row."""
        del latents
        n = min(round(k), weighted.shape[1])
        kth = weighted.topk(n, dim=-1).values[:, -1:]
        above, tied = weighted > kth, weighted == kth
        kept = above | (tied & (tied.cumsum(dim=-1) <= n - above.sum(dim=-1, keepdim=True)))
        return kept & (weighted > 0)

    def find(
        self, scores: Scores, latents: slice, *, k: float, guess: float | None
    ) -> tuple[Found, None]:
        """See `token_topk`."""
        del guess
        return token_topk(scores, round(k), latents), None


@dataclass(frozen=True, kw_only=True)
class BatchTopK(Selection):
    """Over a batch the k * B largest f_j n_j stay.

    Source: Bussmann et al. 2024; the weighting by decoder norms is Minder et al. 2025.
    """

    kind: ClassVar[str] = "batchtopk"

    k_initial: PositiveFloat | None = None
    """k of the first step, from which k falls linearly over `k_anneal_steps`."""
    k_anneal_steps: NaturalInt = 0
    """Steps until k is reached; 0 is k from the first step on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k_initial is not None and self.k_initial < self.k:
            raise ValueError(f"k_initial is {self.k_initial}, below k = {self.k}: k only falls.")
        if (self.k_anneal_steps > 0) != (self.k_initial is not None):
            raise ValueError(
                "annealing k needs both k_initial and k_anneal_steps above 0, got "
                f"{self.k_initial} and {self.k_anneal_steps}."
            )

    def k_factor(self, step: int) -> float:
        """From k_initial / k to 1."""
        if self.k_initial is None or step >= self.k_anneal_steps:
            return 1.0
        return 1.0 + (self.k_initial / self.k - 1.0) * (1.0 - step / self.k_anneal_steps)

    def keep(
        self, weighted: Tensor, k: float, *, latents: slice | None = None
    ) -> Bool[Tensor, "batch n"]:
        """The k * batch largest of all."""
        del latents
        return largest(weighted.flatten(), round(k * len(weighted))).view_as(weighted)

    def find(
        self, scores: Scores, latents: slice, *, k: float, guess: float | None
    ) -> tuple[Found, float]:
        """See `batch_topk`."""
        return batch_topk(scores, round(k * len(scores.x)), latents, guess=guess)


def threshold_keeping(n_kept: int, values: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """The threshold that `n_kept` of these values are above.

    Midway to the next value, so that neither sits on the edge. Never below 0: where fewer are
    positive, all positive ones are kept.
    """
    n_kept = min(n_kept, len(values) - 1)
    top = values.topk(n_kept + 1).values
    return ((top[-1] + top[-2]) / 2 if n_kept > 0 else top[-1]).clamp(min=0)
