"""What stays active: from pre-activations to the sparse code, and what sparsity costs.

Each sparsity is a small frozen object: `codes` (in training, which latents a batch keeps),
`penalties` (added to the loss) and `coefficients` (their weights). At inference every crosscoder
is a JumpReLU: a latent is kept where f_j n_j is above its threshold, with n_j the sum of its
decoder's site norms.

Shapes: pre-activations and codes `[batch, d_sae]`, norms `[d_sae]`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainCoefficientConfig
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class L1:
    """ReLU codes with the penalty mu * mean_tokens sum_j f_j n_j.

    Source: Lindsey et al. 2024; mu = 4.1e-2 is Minder et al. 2025 at d_model 2,304. A code counts
    as active where it is above zero.
    """

    kind: ClassVar[str] = "l1"
    decoder_init_norm: ClassVar[float] = 0.05

    coefficient: float = 4.1e-2
    """mu, the weight of the penalty; larger is sparser."""
    warm_up_steps: int = 0
    """Steps over which mu rises linearly from 0."""

    def __post_init__(self) -> None:
        if self.coefficient < 0:
            raise ValueError(f"the L1 coefficient is {self.coefficient}; it must be 0 or more.")

    def codes(
        self, pre: Float[Tensor, "batch d_sae"], norms: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, "batch d_sae"]:
        """Every positive pre-activation."""
        del norms
        return pre.relu()

    def coefficients(self) -> dict[str, TrainCoefficientConfig]:
        """The weight of each penalty at the end of its warm-up."""
        return {"l1": TrainCoefficientConfig(self.coefficient, self.warm_up_steps)}

    def penalties(
        self, codes: Float[Tensor, "batch d_sae"], norms: Float[Tensor, " d_sae"]
    ) -> dict[str, Float[Tensor, ""]]:
        """mean_tokens sum_j f_j n_j, before mu; its gradient reaches codes and decoder."""
        return {"l1": (codes @ norms).mean()}


@dataclass(frozen=True, kw_only=True)
class BatchTopK:
    """Over a batch of B tokens keep the k * B largest f_j n_j; the kept value is f_j unscaled.

    Source: Bussmann et al. 2024; the weighting by decoder norms is Minder et al. 2025. At
    inference a latent is kept above one threshold: a running mean of the smallest kept f_j n_j,
    replaced at the end of training by a value calibrated on held-out tokens.
    """

    kind: ClassVar[str] = "batchtopk"
    decoder_init_norm: ClassVar[float] = 1.0

    k: float = 100
    """Mean number of active latents a token."""
    threshold_momentum: float = 0.999
    """Of the running threshold, which starts at its first observation. It lags in short runs: the
    trainer here replaces it at the end; for a short run of SAELens's trainer choose 0.9 to 0.99."""

    def __post_init__(self) -> None:
        if self.k <= 0:
            raise ValueError(f"k is {self.k}; it must be above 0.")

    def codes(
        self, pre: Float[Tensor, "batch d_sae"], norms: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, "batch d_sae"]:
        """The k * batch largest weighted codes; fewer only where fewer are positive."""
        positive = pre.relu()
        n_kept = min(round(self.k * len(pre)), positive.numel())
        kept = (positive.detach() * norms.detach()).flatten().topk(n_kept, sorted=False).indices
        mask = torch.zeros(positive.numel(), dtype=torch.bool, device=pre.device)
        mask[kept] = True
        return positive * mask.view_as(positive)

    def coefficients(self) -> dict[str, TrainCoefficientConfig]:
        """None: the selection is the sparsity."""
        return {}

    def penalties(
        self, codes: Float[Tensor, "batch d_sae"], norms: Float[Tensor, " d_sae"]
    ) -> dict[str, Float[Tensor, ""]]:
        """None: the selection is the sparsity."""
        del codes, norms
        return {}


Sparsity = L1 | BatchTopK
_SPARSITIES: dict[str, type[L1] | type[BatchTopK]] = {s.kind: s for s in (L1, BatchTopK)}


def sparsity_to_dict(sparsity: Sparsity) -> dict[str, Any]:
    """JSON form, with the kind's name under `kind`."""
    return {"kind": sparsity.kind, **asdict(sparsity)}


def sparsity_from_dict(fields: Mapping[str, Any]) -> Sparsity:
    """The object that `sparsity_to_dict` wrote."""
    fields = dict(fields)
    kind = fields.pop("kind", None)
    if kind not in _SPARSITIES:
        raise ValueError(f"sparsity {kind!r} is not known; it is one of {sorted(_SPARSITIES)}.")
    return _SPARSITIES[kind](**fields)


def smallest_kept(
    codes: Float[Tensor, "batch d_sae"], norms: Float[Tensor, " d_sae"]
) -> Float[Tensor, ""]:
    """The smallest positive f_j n_j of a batch; infinity where no latent is active."""
    weighted = codes * norms
    return torch.where(weighted > 0, weighted, torch.inf).min()


def threshold_for_l0(weighted: Float[Tensor, "batch d_sae"], *, k: float) -> Float[Tensor, ""]:
    """The threshold above which these tokens keep k latents on average.

    Midway between the (k * batch)-th and the next value, so that neither sits on the edge.
    Never below 0: where fewer than k are positive, all positive ones are kept.
    """
    n_kept = min(round(k * len(weighted)), weighted.numel() - 1)
    largest = weighted.flatten().topk(n_kept + 1).values
    return ((largest[-1] + largest[-2]) / 2 if n_kept > 0 else largest[-1]).clamp(min=0)


def calibrate_threshold(
    batches: Iterable[Float[Tensor, "_ d_sae"]], *, k: float
) -> Float[Tensor, ""]:
    """`threshold_for_l0` over several batches of f_j n_j, keeping only what can matter of each.

    A batch can hold more than its share of the largest values: three times the share is kept,
    which is exact unless one batch of tokens is three times as active as the mean.

    Raises:
        ValueError: no batches.
    """
    n_tokens, largest = 0, []
    for batch in batches:
        n_tokens += len(batch)
        n_kept = min(batch.numel(), round(3 * k * len(batch)) + 1)
        largest.append(batch.flatten().topk(n_kept, sorted=False).values)
    if not largest:
        raise ValueError("there are no tokens to calibrate the threshold on.")
    pooled = torch.cat(largest)
    return threshold_for_l0(pooled[None, :], k=min(round(k * n_tokens), len(pooled) - 1))
