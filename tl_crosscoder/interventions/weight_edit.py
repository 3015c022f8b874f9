"""Ablation as a small change of weights, where that is exactly what the hook does.

    project at the output of an MLP or attention:   W <- W (I - Q Q'),  b <- b (I - Q Q')

for W [inputs, d_model], the matrix that writes to the residual stream. Contract: a `WeightEdit`
holds the new values of the parameters that change, by their names in the model's `state_dict`, and
was compared on tokens with the hook that it replaces. Limit: the residual stream itself cannot be
projected so, as it is a sum that earlier layers write and later ones read: export the hook.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import orthonormal
from tl_crosscoder.models.hooked import HookedModel, check_hook, device_of, replacing_hook

_PARTS = {"mlp": ("W_out", "b_out", "out"), "attn": ("W_O", "b_O", "o")}
_OUTPUT = re.compile(r"blocks\.(\d+)\.(?:hook_(mlp|attn)_out|(mlp|attn)\.hook_out)")
_EXPORT = "Export the ablation as a hook instead (export_mitigation)."


@dataclass(frozen=True, eq=False, kw_only=True)
class WeightEdit:
    """New values of the few parameters of a model that an edit changes."""

    hook_name: str
    """The hook point whose edit these replace."""
    parameters: Mapping[str, Tensor]
    """Name in `model.state_dict()` to new value; `load_state_dict(..., strict=False)` takes it."""

    @contextmanager
    def applied(self, model: HookedModel) -> Iterator[HookedModel]:
        """The model with these weights while the context is open; the old ones after it.

        Raises ValueError for a model that has no such parameters.
        """
        own = {n: p for n, p in _state(model).items() if n in self.parameters}
        shapes, wanted = ({n: tuple(t.shape) for n, t in of.items()}
                          for of in (own, self.parameters))  # fmt: skip
        if shapes != wanted:
            raise ValueError(
                f"the edit is of the parameters {wanted}, but this model has {shapes} of them. "
                "Load the model that it was made for, as the same kind of model."
            )
        before = {name: parameter.detach().clone() for name, parameter in own.items()}
        try:
            _write(own, self.parameters)
            yield model
        finally:
            _write(own, before)

    def save(self, path: str | Path) -> Path:
        """Write a `.safetensors` file of the changed parameters."""
        path = files.user_path(path)
        files.write_tensors(path, self.parameters, metadata={"hook_name": self.hook_name})
        return path

    @classmethod
    def load(cls, path: str | Path) -> "WeightEdit":
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError for another file."""
        path = files.user_path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: save a WeightEdit first.")
        try:
            with safe_open(path, framework="pt") as file:
                hook_name = (file.metadata() or {})["hook_name"]
            return cls(hook_name=hook_name, parameters=load_file(path))
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is not a saved WeightEdit ({error}).") from error


def projection_weights(
    model: HookedModel,
    hook_name: str,
    directions: Float[Tensor, "n d_model"],
    *,
    tokens: Int[Tensor, "batch pos"],
) -> WeightEdit:
    """Project directions out of what an MLP or attention writes, by its weights.

    Args:
        model: of either kind.
        hook_name: `blocks.L.hook_mlp_out`, `hook_attn_out`, or the part's own `hook_out`.
        directions: rows whose span is projected out.
        tokens: on which weights and hook are compared.

    Raises:
        ValueError: a hook elsewhere, a part without such weights, or weights that do not do what
            the hook does, as where a norm stands between.
    """
    check_hook(model, hook_name, "model")
    found = _OUTPUT.fullmatch(hook_name)
    if found is None:
        raise ValueError(
            f"{hook_name!r} is not the output of one MLP or attention, so no small edit of weights "
            "projects there: the residual stream is a sum of what all earlier layers write. "
            f"Exact are blocks.L.hook_mlp_out and blocks.L.hook_attn_out. {_EXPORT}"
        )
    own = output_parameters(model, int(found.group(1)), found.group(2) or found.group(3))
    Q = orthonormal(directions.double())
    changed = {}
    for name, (parameter, is_transposed) in own.items():
        Q = Q.to(parameter.device)
        old = parameter.detach().double()
        rows = old.T if is_transposed else old
        new = rows - rows @ Q @ Q.T
        changed[name] = (new.T if is_transposed else new).to(parameter.dtype).contiguous()
    edit = WeightEdit(hook_name=hook_name, parameters=changed)

    def project(x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        basis = Q.to(x)
        return x - x @ basis @ basis.T

    _check_exact(model, edit, project, tokens)
    return edit


def ablation_weights(
    ctx: InterventionContext,
    latents: Sequence[int] | Int[Tensor, " n"],
    *,
    tokens: Int[Tensor, "batch pos"],
) -> WeightEdit:
    """`project` latents out of the fine-tuned model by its weights: see `projection_weights`."""
    site = ctx.finetuned
    return projection_weights(
        ctx.models.models[site],
        ctx.models.model_sites[site].hook_name,
        ctx.decoder(site)[ctx.latents(latents)],
        tokens=tokens,
    )


def output_parameters(
    model: Any, layer: int, part: str, *, advice: str = _EXPORT
) -> dict[str, tuple[Tensor, bool]]:
    """Matrix and bias of a part's output by name, and whether d_model is the matrix's first axis.

    `HookedTransformer` has `W_out`, a bridge the layer `out` of the model within. Raises a
    ValueError that ends with the advice for weights that are not there, or are quantised.
    """
    matrix, bias, inner = _PARTS[part]
    at, known = f"blocks.{layer}.{part}", _state(model)
    pairs = (f"{at}.{matrix}", f"{at}.{bias}"), (f"{at}.{inner}.weight", f"{at}.{inner}.bias")
    names = next((pair for pair in pairs if pair[0] in known), None)
    if names is None or not known[names[0]].is_floating_point():
        raise ValueError(
            f"the weights of the output of {at} cannot be read: "
            + (
                f"neither {pairs[0][0]} nor {pairs[1][0]} is among the model's parameters. "
                if names is None
                else f"{names[0]} is stored as {known[names[0]].dtype}. "
            )
            + advice
        )
    weight = known[names[0]]
    linear = (m for m in model.modules() if isinstance(m, torch.nn.Linear))
    found = {names[0]: (weight, any(m.weight is weight for m in linear))}
    return found | {n: (known[n], False) for n in names[1:] if n in known}


def _state(model: Any) -> dict[str, Tensor]:
    return model.state_dict(keep_vars=True)


@torch.no_grad()
def _write(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in own.items():
        parameter.copy_(values[name])


@torch.no_grad()
def _check_exact(
    model: HookedModel, edit: WeightEdit, replace: Any, tokens: Int[Tensor, "batch pos"]
) -> None:
    """Raise ValueError unless the weights do what the hook does, within rounding.

    The logits may differ by a twentieth of what the hook changes, which a wrong edit never meets,
    or by what rounding the weights to their dtype costs.
    """
    tokens = tokens.to(device_of(model))
    options = {"return_type": "logits", "padding_side": "right"}
    plain = model(tokens, **options).float()
    hook = replacing_hook(edit.hook_name, replace)
    hooked = model.run_with_hooks(tokens, fwd_hooks=[hook], **options).float()
    with edit.applied(model):
        weighted = model(tokens, **options).float()
    dtype = next(iter(edit.parameters.values())).dtype
    error, effect = (hooked - weighted).abs().max().item(), (hooked - plain).abs().max().item()
    rounding = 8 * torch.finfo(dtype).eps * plain.abs().max().item()
    if not error <= max(0.05 * effect, rounding):
        raise ValueError(
            f"the edited weights {list(edit.parameters)} do not do what the hook at "
            f"{edit.hook_name!r} does: logits differ by {error:.3g}, where the hook changes them "
            f"by {effect:.3g}. Something stands between the weights and the hook, such as a norm "
            f"after the layer (Gemma 2) or an attached adapter. {_EXPORT}"
        )
