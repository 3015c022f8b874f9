"""What one model costs to fetch, to hold and to run up to its hooks, from its config.json alone.

Contract: parameters are counted on the meta device, exactly; no weights are fetched. Limits:
decoder-only language models; all experts of a mixture count as run; the weights of a quantised
checkpoint count in full.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tl_crosscoder.models.devices import BLOCK, NF4, precision
from tl_crosscoder.models.hooked import last_stop_layer
from tl_crosscoder.models.hub_errors import explained
from tl_crosscoder.models.pretrained import resolve_model
from tl_crosscoder.models.site import Site


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """One model of a run."""

    name: str
    """Hub name or folder; of the base where there is an adapter."""
    adapter: str | None
    n_parameters: int
    """Parameters, tied ones once and an adapter's not at all."""
    n_parameters_run: int
    """Parameters of the layers up to the last hook."""
    n_layers: int
    n_layers_run: int
    """All of them where a hook is outside the blocks; then the head runs too."""
    d_model: int
    download_bytes: int | None
    """0 where the weights are here; None for an adapter, which is small beside its base."""
    memory_bytes: int
    """Size of the weights; a base with an adapter is a second copy."""
    score_bytes: int
    """Attention scores of one layer on one context: most of what a forward pass holds."""
    flops_per_token: int


def model_cost(sites: Sequence[Site], *, dtype: str, context_size: int) -> ModelCost:
    """The cost of the model that these sites share.

    Raises:
        ValueError: a config.json that cannot be read, or a layer that the model does not have.
        FileNotFoundError: an embedded model that there is not.
    """
    site = sites[0]
    hf_config, is_local = _read_config(
        site.model_name, site.base_revision if site.adapter else site.revision
    )
    text = hf_config.get_text_config()
    n_layers, width = text.num_hidden_layers, text.hidden_size
    stop = last_stop_layer([s.hook_name for s in sites])
    if stop is not None and stop > n_layers:
        raise ValueError(
            f"hook_name {site.hook_name!r} is at a layer that {site.model_name!r} does not have: "
            f"its {n_layers} layers are blocks.0 to blocks.{n_layers - 1}. Choose one of them."
        )
    n_parameters, layers = _count(hf_config, site.model_name)
    n_run_layers = n_layers if stop is None else stop
    n_run = sum(layers[:n_run_layers])
    head = text.vocab_size * width if stop is None else 0
    size = _compute_dtype(dtype).itemsize
    return ModelCost(
        name=site.model_name,
        adapter=site.adapter,
        n_parameters=n_parameters,
        n_parameters_run=n_run,
        n_layers=n_layers,
        n_layers_run=n_run_layers,
        d_model=width,
        download_bytes=_download(hf_config, n_parameters, is_local) if not site.adapter else None,
        memory_bytes=_weight_bytes(n_parameters, sum(layers), dtype),
        # The scores, their softmax in float32, and that rounded.
        score_bytes=text.num_attention_heads * context_size**2 * (2 * size + 4),
        # Scores and their product with the values, as wide as the model together.
        flops_per_token=2 * (n_run + head) + 4 * context_size * width * n_run_layers,
    )


def _read_config(name: str, revision: str | None) -> tuple[Any, bool]:
    """A model's config, of the hub no other file; and whether its weights are here."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from transformers import AutoConfig

    found = resolve_model(name)
    path = Path(found).expanduser()
    with explained(name, revision):
        if path.is_dir():
            return AutoConfig.from_pretrained(path), True
        file = hf_hub_download(str(found), "config.json", revision=revision)
        weights = ("model.safetensors", "model.safetensors.index.json")
        cached = (try_to_load_from_cache(str(found), w, revision=revision) for w in weights)
        is_cached = any(isinstance(c, str) for c in cached)
        return AutoConfig.from_pretrained(Path(file).parent), is_cached


def _count(hf_config: Any, name: str) -> tuple[int, list[int]]:
    """Parameters of a model, and of each of its layers."""
    from transformers import AutoModelForCausalLM

    with explained(name, None), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    n_layers = hf_config.get_text_config().num_hidden_layers
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    blocks = next((m for m in lists if len(m) == n_layers), None)
    if blocks is None:
        raise ValueError(
            f"{name!r} ({type(model).__name__}) has no list of {n_layers} layers, so that what "
            "runs up to the hook cannot be counted. Give a decoder-only language model."
        )
    layers = [sum(p.numel() for p in block.parameters()) for block in blocks]
    return sum(p.numel() for p in model.parameters()), layers


def _download(hf_config: Any, n_parameters: int, is_local: bool) -> int:
    """Bytes of the weights in the format that they are stored in; 0 where they are here."""
    stored = getattr(hf_config, "dtype", None) or torch.float32
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    return 0 if is_local else n_parameters * stored.itemsize


def _compute_dtype(dtype: str) -> torch.dtype:
    return torch.bfloat16 if dtype == NF4 else precision(dtype).dtype


def _weight_bytes(n_parameters: int, n_in_blocks: int, dtype: str) -> int:
    """In memory; NF4 holds half a byte a weight of the blocks, and a float32 scale for some."""
    size = _compute_dtype(dtype).itemsize
    in_blocks = 0.5 + 4 / BLOCK if dtype == NF4 else size
    return round(n_in_blocks * in_blocks) + (n_parameters - n_in_blocks) * size
