"""What stays active: from pre-activations to the sparse code, and what sparsity costs.

Each sparsity is a small frozen object. TopK and BatchTopK select: `keep` says which latents of a
batch stay. L1 and JumpReLU have a `penalty`, added to the loss with the weight `coefficients`.
At inference every crosscoder is a JumpReLU: a latent is kept where f_j n_j is above its threshold,
with n_j the sum of its decoder's site norms.

`keep` here is the slow twin, over the codes of all latents; `selection` finds the same entries
without them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.sae import TrainCoefficientConfig
from torch import Tensor

from tl_crosscoder.crosscoder.sparse.codes import Codes


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
        _check_coefficient("L1", self.coefficient)

    def coefficients(self) -> dict[str, TrainCoefficientConfig]:
        """The weight of each penalty at the end of its warm-up."""
        return {"l1": TrainCoefficientConfig(self.coefficient, self.warm_up_steps)}

    def penalty(
        self, codes: Codes, norms: Float[Tensor, " d_sae"], scale: Float[Tensor, " d_sae"] | None
    ) -> Float[Tensor, ""]:
        """sum_tokens sum_j f_j n_j, before mu; its gradient reaches codes and decoder."""
        return codes.total(norms if scale is None else norms * scale)


@dataclass(frozen=True, kw_only=True)
class JumpReLU:
    """f = u 1[u > theta_j] with a learned threshold, and the penalty sum_j tanh(c f_j n_j).

    Source: Anthropic, January 2025 update, with the straight-through gradient of Rajamanoharan et
    al. 2024. Defaults are SAELens's; theta is learned through its logarithm, so it stays positive.
    """

    kind: ClassVar[str] = "jumprelu"
    decoder_init_norm: ClassVar[float] = 0.1

    coefficient: float = 1.0
    """Weight of the penalty; larger is sparser."""
    warm_up_steps: int = 0
    """Steps over which the weight rises linearly from 0."""
    tanh_scale: float = 4.0
    """c: codes above about 1 / (c n_j) cost the same."""
    init_threshold: float = 0.01
    """theta at the start."""
    bandwidth: float = 0.05
    """Pre-activations within half of it around theta move theta."""
    ste_to_input: bool = False
    """Whether the straight-through gradient also reaches the encoder (Anthropic) or not."""

    def __post_init__(self) -> None:
        _check_coefficient("JumpReLU", self.coefficient)
        for name in ("tanh_scale", "init_threshold", "bandwidth"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")

    def codes(
        self, pre: Float[Tensor, "*entries"], threshold: Float[Tensor, "*entries"]
    ) -> Float[Tensor, "*entries"]:
        """Codes of pre-activations, with the straight-through gradients."""
        return _JumpReLU.apply(pre, threshold, self.bandwidth, self.ste_to_input)

    def coefficients(self) -> dict[str, TrainCoefficientConfig]:
        """The weight of each penalty at the end of its warm-up."""
        return {"tanh": TrainCoefficientConfig(self.coefficient, self.warm_up_steps)}

    def penalty(
        self, codes: Codes, norms: Float[Tensor, " d_sae"], scale: Float[Tensor, " d_sae"] | None
    ) -> Float[Tensor, ""]:
        """sum_tokens sum_j tanh(c f_j n_j), before its weight."""
        each = torch.tanh(self.tanh_scale * codes.weighted(norms))
        return (each if scale is None else each * codes.each(scale)).sum()


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, ste_to_input: bool
    ) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.ste_to_input = bandwidth, ste_to_input
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        is_near = (pre - threshold).abs() < ctx.bandwidth / 2
        straight = threshold / ctx.bandwidth * is_near * grads[0]
        grad_pre = (pre > threshold) * grads[0]
        return grad_pre + straight if ctx.ste_to_input else grad_pre, -straight, None, None


@dataclass(frozen=True, kw_only=True)
class TopK:
    """For each token keep the k largest f_j n_j; the kept value is f_j unscaled.

    Source: Gao et al. 2024. Like BatchTopK it is saved with one threshold, calibrated on held-out
    tokens to keep k on average.
    """

    kind: ClassVar[str] = "topk"
    decoder_init_norm: ClassVar[float] = 1.0

    k: float = 100
    """Active latents a token, a whole number."""
    threshold_momentum: float = 0.999
    """Of the running threshold; see `BatchTopK`."""

    def __post_init__(self) -> None:
        if self.k < 1 or self.k != round(self.k):
            raise ValueError(f"k is {self.k}; TopK takes a whole number above 0.")

    def keep(self, weighted: Float[Tensor, "batch n"], k: float) -> Bool[Tensor, "batch n"]:
        """Which of these weighted codes stay; of equal ones the first."""
        n = min(round(k), weighted.shape[1])
        kth = weighted.topk(n, dim=-1).values[:, -1:]
        above, tied = weighted > kth, weighted == kth
        kept = above | (tied & (tied.cumsum(dim=-1) <= n - above.sum(dim=-1, keepdim=True)))
        return kept & (weighted > 0)

    def at(self, step: int) -> float:
        """Share of k that is asked for, above 1 while it is annealed."""
        del step
        return 1.0


@dataclass(frozen=True, kw_only=True)
class BatchTopK:
    """Over a batch keep the k * B largest f_j n_j; the kept value is f_j unscaled.

    Source: Bussmann et al. 2024; the weighting by decoder norms is Minder et al. 2025. At
    inference a latent is kept above one threshold: a running mean of the smallest kept f_j n_j,
    replaced at the end of training by a value calibrated on held-out tokens.
    """

    kind: ClassVar[str] = "batchtopk"
    decoder_init_norm: ClassVar[float] = 1.0

    k: float = 100
    """Mean number of active latents a token."""
    k_initial: float | None = None
    """k of the first step, from which k falls linearly over `k_anneal_steps`."""
    k_anneal_steps: int = 0
    """0: k from the first step on."""
    threshold_momentum: float = 0.999
    """Of the running threshold, which starts at its first observation. It lags in short runs: the
    trainer here replaces it at the end; for a short run of SAELens's trainer choose 0.9 to 0.99."""

    def __post_init__(self) -> None:
        if self.k <= 0:
            raise ValueError(f"k is {self.k}; it must be above 0.")
        if self.k_initial is not None and self.k_initial < self.k:
            raise ValueError(f"k_initial is {self.k_initial}, below k = {self.k}: k only falls.")
        if self.k_anneal_steps < 0 or (self.k_anneal_steps > 0) != (self.k_initial is not None):
            raise ValueError(
                "annealing k needs both k_initial and k_anneal_steps above 0, got "
                f"{self.k_initial} and {self.k_anneal_steps}."
            )

    def keep(self, weighted: Float[Tensor, "batch n"], k: float) -> Bool[Tensor, "batch n"]:
        """Which of these weighted codes stay; of equal ones the first."""
        flat = weighted.flatten()
        return largest(flat, min(round(k * len(weighted)), flat.numel())).view_as(weighted)

    def at(self, step: int) -> float:
        """Share of k that is asked for, above 1 while it is annealed."""
        if self.k_initial is None or step >= self.k_anneal_steps:
            return 1.0
        return 1.0 + (self.k_initial / self.k - 1.0) * (1.0 - step / self.k_anneal_steps)


def largest(values: Float[Tensor, " n"], n_kept: int) -> Bool[Tensor, " n"]:
    """Which are the `n_kept` largest positive values; of equal ones the first."""
    n_kept = min(n_kept, len(values))
    if n_kept <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    kth = values.topk(n_kept, sorted=False).values.min()
    kept = values > kth
    ties = (values == kth).nonzero().squeeze(-1)
    kept[ties[: n_kept - int(kept.sum())]] = True
    return kept & (values > 0)


def _check_coefficient(name: str, coefficient: float) -> None:
    if coefficient < 0:
        raise ValueError(f"the {name} coefficient is {coefficient}; it must be 0 or more.")


Sparsity = L1 | JumpReLU | TopK | BatchTopK
_SPARSITIES = {s.kind: s for s in (L1, JumpReLU, TopK, BatchTopK)}


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


def threshold_for_l0(weighted: Float[Tensor, "batch d_sae"], *, k: float) -> Float[Tensor, ""]:
    """The threshold above which these tokens keep k latents on average.

    Midway between the (k * batch)-th and the next value, so that neither sits on the edge.
    Never below 0: where fewer than k are positive, all positive ones are kept.
    """
    n_kept = min(round(k * len(weighted)), weighted.numel() - 1)
    largest = weighted.flatten().topk(n_kept + 1).values
    return ((largest[-1] + largest[-2]) / 2 if n_kept > 0 else largest[-1]).clamp(min=0)


def largest_weighted(weighted: Float[Tensor, "batch n"], *, k: float) -> Float[Tensor, " n_kept"]:
    """The values of a batch that can matter for a threshold over many batches.

    A batch can hold more than its share of the largest values: three times the share is kept,
    which is exact unless one batch of tokens is three times as active as the mean.
    """
    n_kept = min(weighted.numel(), round(3 * k * len(weighted)) + 1)
    return weighted.flatten().topk(n_kept, sorted=False).values


def calibrate_threshold(
    largest_values: Sequence[Float[Tensor, " _"]], *, n_tokens: int, k: float
) -> Float[Tensor, ""]:
    """`threshold_for_l0` over batches of which `largest_weighted` kept what can matter.

    Raises:
        ValueError: no batches.
    """
    if not largest_values:
        raise ValueError("there are no tokens to calibrate the threshold on.")
    pooled = torch.cat([*largest_values])
    return threshold_for_l0(pooled[None, :], k=min(round(k * n_tokens), len(pooled) - 1))
