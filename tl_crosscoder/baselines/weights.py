"""Directions of the weights: where the fine-tune changed what is written to the residual stream.

    D = [W_O^1 - W_O^0; W_out^1 - W_out^0; ...]      [inputs, d_model], of all parts below the hook

`weight_directions`: singular vectors of D in the residual stream, largest first (Zhong and
Raghunathan 2025, arXiv 2508.00161, there of each matrix by itself). Contract: no text and no
forward pass; unit rows `[n, d_model]`, sign free. Limit: how far its inputs drive a matrix is
unknown to it, and embeddings and biases are left out.
"""

import re
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.baselines.difference import principal
from tl_crosscoder.interventions.weight_edit import output_parameters
from tl_crosscoder.models.pair import ModelPair

_STREAM = re.compile(
    r"blocks\.(\d+)\.(hook_resid_pre|hook_in|hook_resid_mid|hook_resid_post|hook_out)"
)


@torch.no_grad()
def weight_directions(models: ModelPair, *, n: int) -> Float[Tensor, "n d_model"]:
    """The first singular vectors of what both models' weights differ in, below the hook.

    Args:
        models: a pair, or more sites of two models.
        n: how many, at most d_model.

    Raises:
        ValueError: a hook that is not on the residual stream, weights that cannot be read or are
            of other shapes, or weights that do not differ.
    """
    base, finetuned = (models.models[i] for i in models.check_one_width())
    hook_name = models.model_sites[models.check_one_width()[1]].hook_name
    moment: Tensor | None = None
    for layer, part in _parts_below(hook_name):
        old, new = (_rows(model, layer, part) for model in (base, finetuned))
        if old.shape != new.shape:
            raise ValueError(
                f"the outputs of blocks.{layer}.{part} are of the shapes {tuple(old.shape)} and "
                f"{tuple(new.shape)}: weights of models of other shapes have no difference."
            )
        delta = new - old.to(new)
        moment = delta.T @ delta if moment is None else moment + (delta.T @ delta).to(moment)
    if moment is None or not moment.trace() > 0:
        raise ValueError(
            f"the weights below {hook_name!r} are the same in both models, so they have no "
            "direction: choose a hook above the layers that were trained."
        )
    return principal(moment)[1][:n].float().cpu()


def _parts_below(hook_name: str) -> Iterator[tuple[int, str]]:
    """Layers and parts that write to the stream before a hook."""
    found = _STREAM.fullmatch(hook_name)
    if found is None:
        raise ValueError(
            f"{hook_name!r} is not on the residual stream, and what matrices write is compared "
            "there: take a hook such as 'blocks.0.hook_resid_post'."
        )
    last, place = int(found.group(1)), found.group(2)
    for layer in range(last):
        yield from ((layer, "attn"), (layer, "mlp"))
    if place not in ("hook_resid_pre", "hook_in"):
        yield last, "attn"
    if place in ("hook_resid_post", "hook_out"):
        yield last, "mlp"


def _rows(model: object, layer: int, part: str) -> Float[Tensor, "inputs d_model"]:
    """The matrix by which a part writes, float64."""
    advice = "Load the models in 16 or 32 bits, with the adapter merged (--merge-adapter)."
    weight, is_transposed = next(
        iter(output_parameters(model, layer, part, advice=advice).values())
    )
    rows = weight.detach().double()
    return rows.T if is_transposed else rows.flatten(0, -2)
