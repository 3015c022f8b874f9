"""Ablation of some latents of a fine-tuned model, as one hook of plain TransformerLens.

    from hook import load
    name, fn = load("folder")
    model.run_with_hooks(tokens, fwd_hooks=[(name, fn)])      # or with model.hooks(...): generate

for `HookedTransformer` and `TransformerBridge`, with or without key-value cache. Needs torch and
safetensors alone. The folder holds `mitigation.json` (which model, hook and latents; what the
estimate loses) and `mitigation.safetensors`. Limit: codes are estimated from the one model, at all
tokens but position 0 of a pass of several positions, where activations are of another size; so a
prompt of a single token comes out otherwise with the cache than without.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def load(folder: str | Path) -> tuple[str, Callable[..., Tensor]]:
    """Name of the hook point, and the function to put there."""
    folder = Path(folder).expanduser()
    try:
        facts = json.loads((folder / "mitigation.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "mitigation.safetensors")
        hook_name, width = facts["hook_name"], facts["d_model"]
        # Of the shapes that are used below, in the smallest case.
        mitigated(torch.zeros(1, 2, width), tensors)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{folder} holds no mitigation that can be read ({type(error).__name__}: {error}): "
            "mitigation.json names hook_name and d_model, and mitigation.safetensors has tensors "
            "of that width. Export it again."
        ) from error
    if not isinstance(hook_name, str):
        raise ValueError(f"{folder}: hook_name is {hook_name!r}, which is no name.")

    def ablate(activation: Tensor, hook: Any = None) -> Tensor:  # noqa: ARG001
        flat = activation.flatten(start_dim=2)
        if flat.shape[-1] != width:
            raise ValueError(
                f"the activation at {hook_name!r} is {flat.shape[-1]} wide, but the "
                f"mitigation is for {width}: load the model that mitigation.json names."
            )
        return mitigated(flat, tensors).to(activation).reshape(activation.shape)

    return hook_name, ablate


def mitigated(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The activation x, [batch, pos, d_model], without the latents, in float32.

    With `basis` Q [d_model, rank] it is x - Q Q' x, else x - sum_j f_j v_j with the `directions`
    v [n, d_model] and f as in `codes`.
    """
    own = {name: tensor.to(x.device) for name, tensor in tensors.items()}
    x = x.float()
    if "basis" in own:
        return x - x @ own["basis"] @ own["basis"].T
    return x - codes(x, own) @ own["directions"]


def codes(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Codes relu(p) 1[p > threshold], p = x encoder + bias, [batch, pos, n]; 0 at position 0."""
    pre = x @ tensors["encoder"] + tensors["bias"]
    found = pre.relu() * (pre > tensors["threshold"])
    if x.shape[1] == 1:
        return found
    return torch.cat([torch.zeros_like(found[:, :1]), found[:, 1:]], dim=1)
