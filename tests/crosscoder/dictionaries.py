"""Small dictionaries of every kind, and activations with known features, for these tests."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tl_crosscoder import L1, BatchTopK, CrosscoderTraining, JumpReLU, Partition, Site, TopK
from tl_crosscoder.crosscoder.config import CrosscoderTrainingConfig, DeltaLoss
from tl_crosscoder.crosscoder.sparsity import Sparsity

D_MODEL, D_SAE = 12, 32
BOTH = ("base", "finetuned")


def sites(*widths: int) -> tuple[Site, ...]:
    names = (*BOTH, "third")
    return tuple(
        Site(name=n, d_model=w, hook_name="blocks.1.hook_resid_post", model_name=f"tiny-{n}")
        for n, w in zip(names, widths, strict=False)
    )


def new_training(
    *widths: int, sparsity: Sparsity | None = None, d_sae: int = D_SAE, seed: int = 0, **fields
) -> CrosscoderTraining:
    """The sparse step runs however dense the codes of so small a dictionary are."""
    widths = widths or (D_MODEL, D_MODEL)
    cfg = CrosscoderTrainingConfig(
        d_in=sum(widths),
        d_sae=d_sae,
        sites=sites(*widths),
        sparsity=sparsity or BatchTopK(k=4),
        **fields,
    )
    torch.manual_seed(seed)
    training = CrosscoderTraining(cfg)
    training._sparse_step.max_density = float("inf")
    return training


def randomised(training: CrosscoderTraining, seed: int = 1) -> CrosscoderTraining:
    """Weights as after training: sites, rows and biases all different."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in training.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return training


def planted(n: int, *, seed: int = 0, d_model: int = D_MODEL) -> Tensor:
    """Activations `[n, 2, d_model]`: shared features plus one that only site 1 has."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(16, d_model, generator=torch.Generator().manual_seed(99))
    codes = torch.rand(n, 16, generator=generator) * (torch.rand(n, 16, generator=generator) < 0.2)
    base = codes.clone()
    base[:, 0] = 0
    return torch.stack([base @ directions, codes @ directions], dim=1) + 0.5


def two(first: str, second: str, share: float, **fields: tuple) -> tuple[Partition, Partition]:
    """Two partitions, and a pair of values for each field."""
    names, shares = (first, second), (share, round(1 - share, 10))
    return tuple(
        Partition(name=names[i], share=shares[i], **{f: v[i] for f, v in fields.items()})
        for i in range(2)
    )


def dual(k: float) -> tuple[Partition, Partition]:
    """Shared and delta latents, each with a k of its own."""
    return two("shared", "delta", 0.4, k=(k, k / 2))


def members(k: float, names: Sequence[str] = BOTH) -> dict[str, dict[str, object]]:
    """Fields of the config of every kind of dictionary, by its name here."""
    select, delta = {"sparsity": BatchTopK(k=k)}, {"delta_loss": DeltaLoss(weight=0.5)}
    dual_k = select | {"partitions": dual(k)}
    first, last, tied = {"reads": names[:1]}, {"reads": names[-1:]}, (True, False)
    exclusive = (
        Partition(name="base-only", share=0.25, writes=names[:1], **first),
        Partition(name="finetuned-only", share=0.25, writes=names[-1:], **last),
        Partition(name="shared", share=0.5),
    )
    # Prefixes end before, inside and behind the partition that explains the difference.
    three = (
        Partition(name="shared", share=0.4),
        Partition(name="delta", share=0.4, k=k / 2),
        Partition(name="rest", share=0.2, k=1),
    )
    jump = {"bandwidth": 0.5, "init_threshold": 0.3}
    to_input = JumpReLU(**jump, tanh_scale=0.7, ste_to_input=True)
    return {
        "l1": {"sparsity": L1(coefficient=0.05)},
        "topk": {"sparsity": TopK(k=max(1, round(k)))},
        "topk-dual-k": {"sparsity": TopK(k=3), "partitions": two("a", "b", 0.4, k=(1, 2))},
        "batchtopk": select,
        "batchtopk-annealed": {"sparsity": BatchTopK(k=k, k_initial=2 * k, k_anneal_steps=4)},
        "batchtopk-minus-bias": select | {"apply_b_dec_to_input": True},
        "batchtopk-bfloat16": select | {"compute_dtype": "bfloat16"},
        "jumprelu": {"sparsity": JumpReLU(coefficient=0.3, **jump)},
        "jumprelu-ste-to-input": {
            "sparsity": to_input,
            "partitions": two("cheap", "dear", 0.3, penalty_scale=(0.2, 2.0)),
        },
        "matryoshka": select | {"matryoshka": (0.1, 0.3, 0.5)},
        "dual-k": dual_k,
        "dsf": {
            "sparsity": L1(coefficient=0.2),
            "partitions": two("shared", "rest", 0.4, tied=tied, penalty_scale=(0.15, 1.0)),
        },
        "dfc": select | {"partitions": exclusive},
        "delta-masked": dual_k | delta,
        "delta-unmasked": select | {"delta_loss": DeltaLoss(weight=0.5, partition=None)},
        "delta-relative": dual_k | {"delta_loss": DeltaLoss(weight=0.5, scale="relative")},
        "delta-with-bias": {
            "sparsity": TopK(k=3),
            "partitions": dual(2),
            "delta_loss": DeltaLoss(weight=0.5, with_bias=True),
        },
        "delta-matryoshka": select | delta | {"partitions": three, "matryoshka": (0.2, 0.5, 0.9)},
        "structured": select
        | {
            "partitions": two("shared", "delta", 0.7, tied=tied, writes=(None, names[-1:])),
            "delta_loss": DeltaLoss(weight=2.0, partition=None, with_bias=True),
        },
    }


MEMBERS = tuple(members(2))
EQUAL_WIDTHS = ("dsf", "structured")
WITH_DELTA = tuple(n for n in MEMBERS if n.startswith("delta") or n == "structured")
