"""Where models are put: one device for all, or one for each.

Contract: `"cuda:0"` is for all models, `"cuda:0,cuda:1"` for two of them in order; activations,
tokens and the dictionary live on the first. Limit: one kind of device, and no model is split.

The numbers that weights are held in: a float type, or 4 bits by bitsandbytes.

Contract: `precision("nf4")` raises before anything is loaded where bitsandbytes is missing.
Limit: 4-bit weights are rounded by about 9 % (NF4, blocks of 64), which is more than most
fine-tunes change: compare 4-bit models with 4-bit models only. On a CPU they are for trying out.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def devices_of(device: str, n_models: int) -> list[str]:
    """One device for each of `n_models`.

    Raises:
        ValueError: not one name or one for each model, or no such device.
    """
    names = [name.strip() for name in str(device).split(",")]
    if len(names) not in (1, n_models):
        raise ValueError(
            f"device {device!r} names {len(names)} devices for {n_models} models: give one for "
            "all, or one for each, with commas."
        )
    for name in names:
        _check(name)
    kinds = {torch.device(name).type for name in names}
    if len(kinds) > 1:
        raise ValueError(
            f"device {device!r} is of the kinds {sorted(kinds)}: rounding differs between them and "
            "would look like a difference of the models. Choose one kind for all."
        )
    return names * n_models if len(names) == 1 else names


def first_device(device: str) -> str:
    """Where activations and the dictionary live: the first of a comma list."""
    return str(device).split(",")[0].strip()


def memory_of(device: str) -> int | None:
    """Bytes of memory of a device, free or in use; None where that is not known."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if kind == "cpu" and hasattr(os, "sysconf"):  # not on Windows
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def moved_together(
    parts: Sequence[Float[Tensor, "batch pos _"]], device: torch.device, dtype: torch.dtype
) -> list[Float[Tensor, "batch pos _"]]:
    """Activations of one model on another device, with one transfer for all."""
    if all(part.device == device for part in parts):
        return [part.to(dtype) for part in parts]
    widths = [part.shape[-1] for part in parts]
    return [*torch.cat([*parts], dim=-1).to(device).to(dtype).split(widths, dim=-1)]


def _check(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"device {name!r} is not one: use 'cpu', 'cuda', 'cuda:1' or 'mps'."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not there: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices. Choose another, or 'cpu'."
        )


NF4 = "nf4"
BLOCK = 64
"""Weights that share a scale in bitsandbytes."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How a model's weights are stored and computed with."""

    dtype: torch.dtype
    """Number format of activations, and of all weights that are not in 4 bits."""
    is_4bit: bool = False
    """Linear layers of the blocks are in NF4; embeddings, norms and the head are not."""


def precision(dtype: str | torch.dtype) -> Precision:
    """`"bfloat16"`, `torch.bfloat16`, or `"nf4"`: 4-bit weights, computed in bfloat16.

    Raises:
        ValueError: not a float type, or nf4 without bitsandbytes.
    """
    if dtype == NF4:
        if find_spec("bitsandbytes") is None:
            raise ValueError(
                "dtype 'nf4' needs bitsandbytes, which is not installed: `pip install "
                "bitsandbytes`, or load with dtype 'bfloat16'."
            )
        return Precision(dtype=torch.bfloat16, is_4bit=True)
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype {dtype!r} is not one: use 'float32', 'bfloat16', 'float16', or 'nf4' for 4-bit "
            "weights."
        )
    return Precision(dtype=found)


def quantized_loading(device: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise a model while it loads."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=NF4, bnb_4bit_compute_dtype=torch.bfloat16
    )
    return {"quantization_config": config, "device_map": {"": device}}


def settle_on_cpu(model: Any, name: str) -> None:
    """Make 4-bit layers on a CPU right, or refuse them; elsewhere nothing is done.

    Raises:
        ValueError: layers that bitsandbytes gets wrong there.
    """
    for path, layer in model.named_modules():
        # By name: bitsandbytes is not always there to import.
        if type(layer).__name__ != "Linear4bit" or layer.weight.device.type != "cpu":
            continue
        # bitsandbytes 0.50 takes a row to begin a block: 25 % error where it does not (9 % else).
        if layer.in_features % BLOCK:
            where = path.replace("._original_component", "")
            raise ValueError(
                f"'{name}' cannot be used in 4 bits on a CPU: {where} is "
                f"{layer.in_features} wide, and bitsandbytes is right there only for multiples of "
                f"{BLOCK}. Give a GPU as the device, or load with dtype 'bfloat16'."
            )
        # On processors with AVX512-BF16 the first forward pass would repack the weights, and from
        # then on gradients are wrong without an error (norm 80 where it is 115).
        layer.support_avx512bf16_for_cpu = False
