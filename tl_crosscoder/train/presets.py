"""Named recipes: the dictionaries of the papers, and ours, as combinations of the same pieces.

Each function is one row of the table that `tl-crosscoder train --preset NAME` chooses from; its
arguments are the flags that the command line takes for it. A `Recipe` may as well be put together
by hand.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tl_crosscoder.config.models import DeltaScale
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.crosscoder.config import DeltaLoss
from tl_crosscoder.crosscoder.partition import Partition
from tl_crosscoder.crosscoder.sparsity import L1, BatchTopK, JumpReLU, Sparsity, TopK

DEFAULT_K = 16


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a dictionary is made of, apart from its sites and its size."""

    sparsity: Sparsity
    partitions: tuple[Partition, ...] = ()
    delta_loss: DeltaLoss | None = None
    matryoshka: tuple[float, ...] = ()


def batchtopk(
    *, k: float = DEFAULT_K, k_initial: float | None = None, k_anneal_steps: int = 0
) -> Recipe:
    """K latents a token on average, chosen over the batch (Minder et al. 2025; k = 100 there)."""
    sparsity = BatchTopK(k=k, k_initial=k_initial, k_anneal_steps=k_anneal_steps)
    return Recipe(sparsity=sparsity)


def topk(*, k: float = DEFAULT_K) -> Recipe:
    """K latents on every token (Gao et al. 2024)."""
    return Recipe(sparsity=TopK(k=k))


def l1(*, l1_coefficient: float = 1.0, warm_up_steps: int = 0) -> Recipe:
    """ReLU codes and an L1 penalty (Lindsey et al. 2024); its L0 follows from the coefficient."""
    return Recipe(sparsity=L1(coefficient=l1_coefficient, warm_up_steps=warm_up_steps))


def jumprelu(
    *,
    jumprelu_coefficient: float = 1.0,
    jumprelu_bandwidth: float = 0.05,
    jumprelu_threshold: float = 0.01,
    warm_up_steps: int = 0,
) -> Recipe:
    """Learned thresholds and a tanh penalty (Anthropic, January 2025 update)."""
    sparsity = JumpReLU(
        coefficient=jumprelu_coefficient,
        bandwidth=jumprelu_bandwidth,
        init_threshold=jumprelu_threshold,
        warm_up_steps=warm_up_steps,
    )
    return Recipe(sparsity=sparsity)


def matryoshka(
    *, k: float = DEFAULT_K, prefix_shares: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
) -> Recipe:
    """BatchTopK whose first latents also reconstruct alone (Bussmann et al. 2025)."""
    return Recipe(sparsity=BatchTopK(k=k), matryoshka=prefix_shares)


def dual_k(
    *, k: float = DEFAULT_K, shared_share: float = 0.2, k_shared_multiple: float = 2.0
) -> Recipe:
    """Shared and delta latents, each with a BatchTopK of its own, and no other difference.

    Source: Kassem et al. 2026. Of k, the delta latents get 1 / (1 + k_shared_multiple).
    """
    return Recipe(
        sparsity=BatchTopK(k=k), partitions=_shared_and_delta(shared_share, k, k_shared_multiple)
    )


def delta(
    *,
    k: float = DEFAULT_K,
    shared_share: float = 0.2,
    k_shared_multiple: float = 2.0,
    dual_k: bool = True,
    delta_loss_weight: float = 0.005,
    delta_loss_masked: bool = True,
    delta_loss_scale: DeltaScale = "absolute",
    delta_loss_bias: bool = False,
) -> Recipe:
    """Delta-Crosscoder: Dual-K and a loss that the delta latents explain x^1 - x^0.

    Source: Kassem et al. 2026: 20 % shared latents, k_delta = 200 and k_shared = 400, so k = 600;
    each part can be switched off. Without `dual_k`, delta latents compete with the shared ones, so
    that nothing forces them to fire where the fine-tune did nothing (ours).
    """
    return Recipe(
        sparsity=BatchTopK(k=k),
        partitions=_shared_and_delta(shared_share, k if dual_k else None, k_shared_multiple),
        delta_loss=DeltaLoss(
            weight=delta_loss_weight,
            partition="delta" if delta_loss_masked else None,
            scale=delta_loss_scale,
            with_bias=delta_loss_bias,
        ),
    )


def delta_competing(
    *,
    k: float = DEFAULT_K,
    shared_share: float = 0.2,
    delta_loss_weight: float = 0.005,
    delta_loss_scale: DeltaScale = "absolute",
    delta_loss_bias: bool = False,
) -> Recipe:
    """Delta-Crosscoder whose delta latents must win their place against the shared ones (ours)."""
    return delta(
        k=k,
        shared_share=shared_share,
        dual_k=False,
        delta_loss_weight=delta_loss_weight,
        delta_loss_scale=delta_loss_scale,
        delta_loss_bias=delta_loss_bias,
    )


def dsf(
    *,
    l1_coefficient: float = 1.0,
    warm_up_steps: int = 0,
    shared_share: float = 0.2,
    shared_penalty_scale: float = 0.15,
) -> Recipe:
    """Designated shared features: tied decoders and a smaller penalty (Anthropic, February 2025).

    The penalty of the shared latents is 0.1 to 0.2 of the others' there; their share is [open].
    """
    shared = Partition(
        name="shared", share=shared_share, tied=True, penalty_scale=shared_penalty_scale
    )
    return Recipe(
        sparsity=L1(coefficient=l1_coefficient, warm_up_steps=warm_up_steps),
        partitions=(shared, Partition(name="free", share=1 - shared_share)),
    )


def dfc(
    *,
    k: float = DEFAULT_K,
    exclusive_share: float = 0.05,
    sites: tuple[str, ...] = ("base", "finetuned"),
) -> Recipe:
    """Dedicated feature crosscoder: some latents belong to one site only (arXiv 2602.11729).

    `exclusive_share` of the latents read and write only the base, as many only the fine-tuned
    model, and so on for each of `sites`; one BatchTopK over all.
    """
    own = (
        Partition(name=f"{s}_only", share=exclusive_share, reads=(s,), writes=(s,)) for s in sites
    )
    shared = Partition(name="shared", share=1 - len(sites) * exclusive_share)
    return Recipe(sparsity=BatchTopK(k=k), partitions=(shared, *own))


def diff_sae(*, k: float = DEFAULT_K) -> Recipe:
    """BatchTopK SAE on x^1 - x^0; the usual size is twice d_model (`--expansion 2`).

    The recipe is that of `batchtopk`: the difference is in what it is trained on, which the
    command line arranges, and `ModelPair.difference()` in Python.
    """
    return batchtopk(k=k)


def structured(
    *,
    k: float = DEFAULT_K,
    shared_share: float = 0.8,
    k_shared_multiple: float = 2.0,
    dual_k: bool = True,
    delta_loss_weight: float = 1.0,
    finetuned: str = "finetuned",
) -> Recipe:
    """Shared latents write the same to both sites; delta latents only to the fine-tuned (ours).

    x̂^1 = x̂^0 + sum_{delta} f_j d_j^1 + b^1 - b^0, and the error of the difference is weighted up:
    whatever differs must be said by delta latents. `finetuned` is the site that they write to.
    """
    shared, own = _shared_and_delta(shared_share, k if dual_k else None, k_shared_multiple)
    return Recipe(
        sparsity=BatchTopK(k=k),
        partitions=(
            Partition(name="shared", share=shared.share, k=shared.k, tied=True),
            Partition(name="delta", share=own.share, k=own.k, writes=(finetuned,)),
        ),
        delta_loss=DeltaLoss(weight=delta_loss_weight, partition=None, with_bias=True),
    )


def _shared_and_delta(
    shared_share: float, k: float | None, k_shared_multiple: float
) -> tuple[Partition, Partition]:
    if not 0 < shared_share < 1:
        raise ValueError(f"shared_share is {shared_share}; it lies between 0 and 1.")
    k_delta = None if k is None else k / (1 + k_shared_multiple)
    k_shared = None if k is None or k_delta is None else k - k_delta
    return (
        Partition(name="shared", share=shared_share, k=k_shared),
        Partition(name="delta", share=1 - shared_share, k=k_delta),
    )


PRESETS: dict[str, Callable[..., Recipe]] = {
    "batchtopk": batchtopk,
    "topk": topk,
    "l1": l1,
    "jumprelu": jumprelu,
    "matryoshka": matryoshka,
    "dual-k": dual_k,
    "delta": delta,
    "delta-competing": delta_competing,
    "dsf": dsf,
    "dfc": dfc,
    "diff-sae": diff_sae,
    "structured": structured,
}


def preset(name: str, **options: Any) -> Recipe:
    """The named recipe with these options.

    Raises:
        ValueError: another name, or an option that this preset does not have.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not known; it is one of {', '.join(PRESETS)}.")
    known = inspect.signature(PRESETS[name]).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"preset {name!r} has no {', '.join(unknown)}; its options are {', '.join(known)}."
        )
    return PRESETS[name](**options)


def recipe_of(config: RunConfig) -> Recipe:
    """The recipe that the flat fields of a config name.

    Penalties rise over the first twentieth of the steps (L1) or over all of them (JumpReLU).
    """
    known = inspect.signature(PRESETS[config.preset]).parameters
    options = config.preset_options()
    if "warm_up_steps" in known:
        learned = config.preset == "jumprelu"
        options["warm_up_steps"] = config.n_steps if learned else config.n_steps // 20
    if "k_initial" in options:
        share = 0.1 if config.k_anneal_share is None else config.k_anneal_share
        options["k_anneal_steps"] = max(1, round(share * config.n_steps))
    return preset(config.preset, **options)
