"""Every member of the family, small: fields of its config from k and the names of its sites."""

from collections.abc import Callable, Sequence

from tl_crosscoder import L1, BatchTopK, JumpReLU, TopK
from tl_crosscoder.crosscoder.config import DeltaLoss
from tl_crosscoder.crosscoder.partition import Partition

Fields = dict[str, object]
MEMBERS: dict[str, Callable[[float, Sequence[str]], Fields]] = {}


def member(function: Callable[[float, Sequence[str]], Fields]) -> Callable:
    MEMBERS[function.__name__.replace("_", "-")] = function
    return function


def own_ks(k: float) -> tuple[Partition, ...]:
    """Shared and delta latents, each with a k of its own."""
    return (Partition(name="shared", share=0.4, k=k), Partition(name="delta", share=0.6, k=k / 2))


@member
def l1(k: float, names: Sequence[str]) -> Fields:
    return {"sparsity": L1(coefficient=0.05)}


@member
def topk(k: float, names: Sequence[str]) -> Fields:
    return {"sparsity": TopK(k=max(1, round(k)))}


@member
def topk_dual_k(k: float, names: Sequence[str]) -> Fields:
    parts = (Partition(name="few", share=0.4, k=1), Partition(name="more", share=0.6, k=2))
    return {"sparsity": TopK(k=3), "partitions": parts}


@member
def batchtopk(k: float, names: Sequence[str]) -> Fields:
    return {"sparsity": BatchTopK(k=k)}


@member
def batchtopk_annealed(k: float, names: Sequence[str]) -> Fields:
    return {"sparsity": BatchTopK(k=k, k_initial=2 * k, k_anneal_steps=4)}


@member
def batchtopk_minus_bias(k: float, names: Sequence[str]) -> Fields:
    return {"sparsity": BatchTopK(k=k), "apply_b_dec_to_input": True}


@member
def batchtopk_bfloat16(k: float, names: Sequence[str]) -> Fields:
    return {"sparsity": BatchTopK(k=k), "compute_dtype": "bfloat16"}


@member
def jumprelu(k: float, names: Sequence[str]) -> Fields:
    return {"sparsity": JumpReLU(coefficient=0.3, bandwidth=0.5, init_threshold=0.3)}


@member
def jumprelu_ste_to_input(k: float, names: Sequence[str]) -> Fields:
    parts = (
        Partition(name="cheap", share=0.3, penalty_scale=0.2),
        Partition(name="dear", share=0.7, penalty_scale=2.0),
    )
    sparsity = JumpReLU(bandwidth=0.5, init_threshold=0.3, tanh_scale=0.7, ste_to_input=True)
    return {"sparsity": sparsity, "partitions": parts}


@member
def matryoshka(k: float, names: Sequence[str]) -> Fields:
    return {"sparsity": BatchTopK(k=k), "matryoshka": (0.1, 0.3, 0.5)}


@member
def dual_k(k: float, names: Sequence[str]) -> Fields:
    return {"sparsity": BatchTopK(k=k), "partitions": own_ks(k)}


@member
def dsf(k: float, names: Sequence[str]) -> Fields:
    parts = (
        Partition(name="shared", share=0.4, tied=True, penalty_scale=0.15),
        Partition(name="rest", share=0.6),
    )
    return {"sparsity": L1(coefficient=0.2), "partitions": parts}


@member
def dfc(k: float, names: Sequence[str]) -> Fields:
    first, last = names[0], names[-1]
    parts = (
        Partition(name="base-only", share=0.25, reads=(first,), writes=(first,)),
        Partition(name="finetuned-only", share=0.25, reads=(last,), writes=(last,)),
        Partition(name="shared", share=0.5),
    )
    return {"sparsity": BatchTopK(k=k), "partitions": parts}


@member
def delta_masked(k: float, names: Sequence[str]) -> Fields:
    loss = DeltaLoss(weight=0.5)
    return {"sparsity": BatchTopK(k=k), "partitions": own_ks(k), "delta_loss": loss}


@member
def delta_unmasked(k: float, names: Sequence[str]) -> Fields:
    return {"sparsity": BatchTopK(k=k), "delta_loss": DeltaLoss(weight=0.5, partition=None)}


@member
def delta_relative(k: float, names: Sequence[str]) -> Fields:
    loss = DeltaLoss(weight=0.5, scale="relative")
    return {"sparsity": BatchTopK(k=k), "partitions": own_ks(k), "delta_loss": loss}


@member
def delta_with_bias(k: float, names: Sequence[str]) -> Fields:
    loss = DeltaLoss(weight=0.5, with_bias=True)
    return {"sparsity": TopK(k=3), "partitions": own_ks(2), "delta_loss": loss}


@member
def delta_matryoshka(k: float, names: Sequence[str]) -> Fields:
    """Prefixes that end before, inside and behind the part that explains the difference."""
    parts = (
        Partition(name="shared", share=0.4),
        Partition(name="delta", share=0.4, k=k / 2),
        Partition(name="rest", share=0.2, k=1),
    )
    fields = {"sparsity": BatchTopK(k=k), "partitions": parts, "delta_loss": DeltaLoss(weight=0.5)}
    return fields | {"matryoshka": (0.2, 0.5, 0.9)}


@member
def structured(k: float, names: Sequence[str]) -> Fields:
    parts = (
        Partition(name="shared", share=0.7, tied=True),
        Partition(name="delta", share=0.3, writes=(names[-1],)),
    )
    loss = DeltaLoss(weight=2.0, partition=None, with_bias=True)
    return {"sparsity": BatchTopK(k=k), "partitions": parts, "delta_loss": loss}


EQUAL_WIDTHS = ("dsf", "structured")
WITH_DELTA = tuple(n for n in MEMBERS if n.startswith("delta") or n == "structured")
