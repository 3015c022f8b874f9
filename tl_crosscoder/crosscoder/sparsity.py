"""Sparsities: which latents stay active, what activity costs, and the threshold that is saved.

A sparsity is one frozen object that config, step, loss and files ask; nothing branches on its type.
A `Penalty` keeps all positive codes f_j and adds to the loss; a `Selection` (`topk`) keeps the
largest weighted codes f_j n_j, where n_j is the sum of the latent's decoder norms over sites.
Limit: at inference every crosscoder is a JumpReLU, with one threshold of f_j n_j a latent.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.sae import TrainCoefficientConfig
from torch import Tensor

from tl_crosscoder.config.settings import (
    NaturalInt,
    NonNegativeFloat,
    PositiveFloat,
    Settings,
)
from tl_crosscoder.crosscoder.partition import Partition
from tl_crosscoder.crosscoder.sparse.codes import Codes
from tl_crosscoder.crosscoder.sparse.selection import Found, Scores

Groups = list[tuple[slice, float]]
"""Ranges of latents that compete with one another, each with its k."""
_KINDS: "dict[str, type[Sparsity]]" = {}


@dataclass(frozen=True, kw_only=True)
class Sparsity(Settings):
    """All that differs between sparsities; the answers here are those of free ReLU codes.

    A subclass is a frozen dataclass with a `kind`, by which its files find it again.
    """

    kind: ClassVar[str]
    decoder_init_norm: ClassVar[float] = 1.0
    """Norm of each decoder row at each site, at the start."""
    has_auxk: ClassVar[bool] = True
    """Whether AuxK helps dead latents."""

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            _KINDS[cls.kind] = cls

    def parameters(self) -> dict[str, float]:
        """Parameters that are learned for each latent, with their value at the start."""
        return {}

    def learned_threshold(
        self, parameters: Mapping[str, Float[Tensor, " d_sae"]]
    ) -> Float[Tensor, " d_sae"] | None:
        """The threshold on pre-activations that these parameters mean; None for none."""
        del parameters
        return None

    def margin(self) -> float:
        """How far below a learned threshold a pre-activation still has a gradient."""
        return 0.0

    def activate(
        self, pre: Float[Tensor, "*entries"], threshold: Float[Tensor, "*entries"] | None
    ) -> Float[Tensor, "*entries"]:
        """Codes of pre-activations, before any selection."""
        del threshold
        return pre.relu()

    def groups(self, partitions: Sequence[tuple[Partition, slice]], d_sae: int) -> Groups:
        """Latents that are selected together; empty where nothing is selected.

        Raises:
            ValueError: partitions with a k that this sparsity cannot keep.
        """
        del d_sae
        if any(p.k is not None for p, _ in partitions):
            raise ValueError(
                f"partitions have a k of their own, but {self.kind} selects nothing. Use BatchTopK "
                "or TopK, or leave k out of the partitions."
            )
        return []

    def k_factor(self, step: int) -> float:
        """Factor of every k at a step (from 0), above 1 while k is annealed."""
        del step
        return 1.0

    def keep(
        self, weighted: Float[Tensor, "batch n"], k: float, *, latents: slice | None = None
    ) -> Bool[Tensor, "batch n"]:
        """Which weighted codes of a group stay; `latents` says where it is in the dictionary."""
        del k, latents
        return weighted > 0

    def find(
        self, scores: Scores, latents: slice, *, k: float, guess: float | None
    ) -> tuple[Found, float | None] | None:
        """What `keep` keeps, without holding all codes, and a guess for the next batch.

        None, where a selection does not override it, leaves the step to dense codes.
        """
        del scores, latents, k, guess
        return None

    def coefficients(self) -> dict[str, TrainCoefficientConfig]:
        """Name and weight of the penalty, with its warm-up; empty without one."""
        return {}

    def coefficients_at(self, step: int) -> dict[str, float]:
        """Weights at a step (from 0); they rise linearly over their warm-up."""
        return {
            name: c.value * min(1.0, (step + 1) / max(1, c.warm_up_steps))
            for name, c in self.coefficients().items()
        }

    def penalty(
        self, codes: Codes, norms: Float[Tensor, " d_sae"], scale: Float[Tensor, " d_sae"] | None
    ) -> Float[Tensor, ""]:
        """The penalty summed over tokens, before its weight; partitions may scale it by latent."""
        raise NotImplementedError(f"{self.kind} has coefficients but no penalty.")

    def observe_(
        self,
        threshold: Float[Tensor, " d_sae"],
        codes: Codes,
        norms: Float[Tensor, " d_sae"],
        groups: Groups,
    ) -> None:
        """Move the running threshold by the codes of a training batch."""

    def calibrate_(
        self,
        threshold: Float[Tensor, " d_sae"],
        batches: Iterable[Float[Tensor, "batch d_sae"]],
        groups: Groups,
    ) -> None:
        """Set the threshold of inference on weighted codes of held-out tokens."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the kind's name under `kind`."""
        return {"kind": self.kind, **asdict(self)}

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> "Sparsity":
        """Inverse of `to_dict`, for every kind that is defined by now. Raises ValueError."""
        kind = fields.get("kind")
        if kind not in _KINDS:
            raise ValueError(
                f"sparsity {kind!r} is not known; it is one of {sorted(_KINDS)}. Import the module "
                "that defines it."
            )
        return _KINDS[kind](**{name: v for name, v in fields.items() if name != "kind"})


@dataclass(frozen=True, kw_only=True)
class Penalty(Sparsity):
    """All positive codes stay, and their activity is added to the loss."""

    penalty_name: ClassVar[str]
    """Name of the term in `metrics.jsonl`."""

    coefficient: NonNegativeFloat = 1.0
    """Weight of the penalty; larger is sparser."""
    warm_up_steps: NaturalInt = 0
    """Steps over which the weight rises linearly from 0."""

    def coefficients(self) -> dict[str, TrainCoefficientConfig]:
        """The one weight, under the penalty's name."""
        return {self.penalty_name: TrainCoefficientConfig(self.coefficient, self.warm_up_steps)}


@dataclass(frozen=True, kw_only=True)
class L1(Penalty):
    """ReLU codes with the penalty mu * mean_tokens sum_j f_j n_j.

    Source: Lindsey et al. 2024; mu = 4.1e-2 is Minder et al. 2025 at d_model 2,304. A code counts
    as active where it is above zero.
    """

    kind: ClassVar[str] = "l1"
    penalty_name: ClassVar[str] = "l1"
    decoder_init_norm: ClassVar[float] = 0.05
    has_auxk: ClassVar[bool] = False

    coefficient: NonNegativeFloat = 4.1e-2
    """mu, the weight of the penalty; larger is sparser."""

    def penalty(self, codes: Codes, norms: Tensor, scale: Tensor | None) -> Float[Tensor, ""]:
        """Sum of f_j n_j; its gradient reaches codes and decoder."""
        return codes.weighted(norms if scale is None else norms * scale).sum()


@dataclass(frozen=True, kw_only=True)
class JumpReLU(Penalty):
    """f = u 1[u > theta_j] with a learned threshold, and the penalty sum_j tanh(c f_j n_j).

    Source: Anthropic, January 2025 update, with the straight-through gradient of Rajamanoharan et
    al. 2024. Defaults are SAELens's; theta is learned through its logarithm, so it stays positive.
    """

    kind: ClassVar[str] = "jumprelu"
    penalty_name: ClassVar[str] = "tanh"
    decoder_init_norm: ClassVar[float] = 0.1

    tanh_scale: PositiveFloat = 4.0
    """c: codes above about 1 / (c n_j) cost the same."""
    init_threshold: PositiveFloat = 0.01
    """theta at the start."""
    bandwidth: PositiveFloat = 0.05
    """Pre-activations within half of it around theta move theta."""
    ste_to_input: bool = False
    """Whether the straight-through gradient also reaches the encoder (Anthropic) or not."""

    def margin(self) -> float:
        """Half the bandwidth."""
        return self.bandwidth / 2

    def parameters(self) -> dict[str, float]:
        """The logarithm of theta."""
        return {"log_threshold": math.log(self.init_threshold)}

    def learned_threshold(self, parameters: Mapping[str, Tensor]) -> Float[Tensor, " d_sae"]:
        """The exponential, theta."""
        return parameters["log_threshold"].exp()

    def activate(self, pre: Tensor, threshold: Tensor | None) -> Tensor:
        """Codes u 1[u > theta], with the straight-through gradients."""
        return _JumpReLU.apply(pre, threshold, self.bandwidth, self.ste_to_input)

    def penalty(self, codes: Codes, norms: Tensor, scale: Tensor | None) -> Float[Tensor, ""]:
        """Sum of tanh(c f_j n_j)."""
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
