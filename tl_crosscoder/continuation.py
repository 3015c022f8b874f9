"""Run a model on from other activations at its hook, several variants at a time.

Contract: `continued` gives the logits `[variants, batch, pos, d_vocab]` of a model in which the
activation at one hook is replaced by each of `[variants, batch, pos, d_model]`. At the end of a
block the variants become the batch of the layers above, so that those below run once. Limit:
elsewhere the whole model runs once a variant.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.hooked_model import HookedModel, device_of, replacing_hook, stop_layer


@torch.no_grad()
def continued(
    model: HookedModel,
    hook_name: str,
    tokens: Int[Tensor, "batch pos"],
    *,
    variants: Float[Tensor, "variants batch pos d_model"],
) -> Float[Tensor, "variants batch pos d_vocab"]:
    """Logits of a model that goes on from each variant, on its device."""
    tokens = tokens.to(device_of(model))
    if len(variants) == 1 or not ends_a_block(hook_name):
        return continued_apart(model, hook_name, tokens, variants=variants)
    n, (batch, n_pos) = len(variants), tokens.shape
    rows = variants.flatten(0, 1)

    def widen(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return rows.to(activation)

    with _wider_blocks(model, from_layer=stop_layer(hook_name) or 0, batch=batch, n=n):
        logits = model.run_with_hooks(
            tokens, fwd_hooks=[(hook_name, widen)], return_type="logits", padding_side="right"
        )
    return logits.view(n, batch, n_pos, -1)


@torch.no_grad()
def continued_apart(
    model: HookedModel,
    hook_name: str,
    tokens: Int[Tensor, "batch pos"],
    *,
    variants: Float[Tensor, "variants batch pos d_model"],
) -> Float[Tensor, "variants batch pos d_vocab"]:
    """The same with a whole forward pass for each variant: the slow twin."""
    tokens = tokens.to(device_of(model))
    logits = []
    for variant in variants:
        hook = replacing_hook(hook_name, lambda _, variant=variant: variant)
        logits.append(
            model.run_with_hooks(
                tokens, fwd_hooks=[hook], return_type="logits", padding_side="right"
            )
        )
    return torch.stack(logits)


def ends_a_block(hook_name: str) -> bool:
    """Whether nothing but this activation goes on to the layers above."""
    return hook_name.startswith("blocks.") and hook_name.split(".", 2)[2] in (
        "hook_resid_post",
        "hook_out",
    )


@contextmanager
def _wider_blocks(model: HookedModel, *, from_layer: int, batch: int, n: int) -> Iterator[None]:
    """While open, what the blocks above get beside the activation is repeated n times.

    A bridge hands its blocks the attention mask of the whole batch, `[batch, 1, pos, pos]`.
    """

    def widen(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(widen(v) for v in value)
        if isinstance(value, Tensor) and value.ndim > 1 and len(value) == batch:
            return value.repeat(n, *[1] * (value.ndim - 1))
        return value

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG001
        return args, {k: v if k == "hidden_states" else widen(v) for k, v in kwargs.items()}

    blocks: Any = model.blocks  # type: ignore[attr-defined]
    handles = [
        block.register_forward_pre_hook(before, with_kwargs=True)
        for block in list(blocks)[from_layer:]
        if batch > 1
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
