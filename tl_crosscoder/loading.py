"""Load one model by name: from the hub, from a folder, or as a base with a PEFT adapter.

Contract: the weights come back raw (nothing folded, nothing centred) and shared with no other
model; what cannot be loaded raises one paragraph with the name, the reason and the next step.
Limit: decoder-only language models.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tl_crosscoder.embedded import resolve_model
from tl_crosscoder.hooked_model import HookedModel
from tl_crosscoder.site import Site


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`. Raises ValueError for anything that is not a float type."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is not one: use 'float32', 'bfloat16' or 'float16'.")
    return found


def load_site(site: Site, *, device: str, dtype: torch.dtype, tokenizer: Any = None) -> HookedModel:
    """The model of a site, with its adapter merged where it has one. Raises like `load`."""
    how = {"device": device, "dtype": dtype, "tokenizer": tokenizer}
    if site.adapter is None:
        return load(site.model_name, revision=site.revision, **how)
    return load_adapted(
        site.model_name,
        site.adapter,
        revision=site.base_revision,
        adapter_revision=site.revision,
        **how,
    )


def load(
    name: str | Path,
    *,
    device: str,
    dtype: torch.dtype,
    revision: str | None,
    tokenizer: Any = None,
) -> HookedModel:
    """Boot a hub name or a local folder as a `TransformerBridge` with raw weights.

    Raises FileNotFoundError for a missing folder and ValueError for what the hub refuses.
    """
    from transformer_lens.model_bridge import TransformerBridge

    source = _source(name, "config.json", "a model")
    with _explain_hub_errors(name, revision):
        return TransformerBridge.boot_transformers(
            source, device=device, dtype=dtype, revision=revision, tokenizer=tokenizer
        )


def load_adapted(
    base: str | Path,
    adapter: str | Path,
    *,
    device: str,
    dtype: torch.dtype,
    revision: str | None,
    adapter_revision: str | None,
    tokenizer: Any = None,
) -> HookedModel:
    """Load `base` once more, merge the PEFT `adapter` into it, and boot the result.

    Raises FileNotFoundError for a missing folder, ValueError where the adapter does not fit.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    source = _source(base, "config.json", "a model")
    with _explain_hub_errors(base, revision):
        # Eager attention is what the bridge asks for when it loads by itself.
        hf_model = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, dtype=dtype, attn_implementation="eager"
        )
    merged = _merge(hf_model, base=base, adapter=adapter, revision=adapter_revision)
    with _explain_hub_errors(base, revision):
        return TransformerBridge.boot_transformers(
            source,
            hf_model=merged.to(device),
            device=device,
            dtype=dtype,
            revision=revision,
            tokenizer=tokenizer,
        )


def _merge(hf_model: Any, *, base: str | Path, adapter: str | Path, revision: str | None) -> Any:
    from peft import PeftConfig

    source = _source(adapter, "adapter_config.json", "a PEFT adapter")
    with _explain_hub_errors(adapter, revision):
        config = PeftConfig.from_pretrained(source, revision=revision)
    if config.is_prompt_learning:
        raise ValueError(
            f"adapter '{adapter}' is {config.peft_type}, which cannot be merged into weights: use "
            "a LoRA-like adapter or a fine-tuned model."
        )
    try:
        adapted = _adapt(hf_model, source, revision)
    except (RuntimeError, ValueError, UserWarning) as error:
        raise ValueError(
            f"adapter '{adapter}' does not fit base model '{base}': {_first_line(error)} "
            f"It was trained on '{config.base_model_name_or_path}': give that as the base."
        ) from error
    return adapted.merge_and_unload()


def _adapt(hf_model: Any, source: str, revision: str | None) -> Any:
    """Put an adapter on a model, all of it or none."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict, load_peft_weights

    with warnings.catch_warnings():
        # PEFT only warns when it leaves layers without their adapter weights, and says nothing of
        # adapter weights for which the model has no place.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        # PEFT on transformers 5.23; nothing that a user of ours can change.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted: Any = PeftModel.from_pretrained(hf_model, source, revision=revision)
    used = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    saved = load_peft_weights(source, device="cpu", revision=revision)
    unused = [key for key in saved if adapted.base_model.prefix in key and key not in used]
    if unused:
        raise ValueError(f"the base has no place for {unused[0]!r}")
    return adapted


def _source(name: str | Path, wanted: str, what: str) -> str:
    """Folder or hub name for the loaders. Raises FileNotFoundError if `wanted` is missing."""
    name = resolve_model(name)
    path = Path(name).expanduser()
    is_path_like = isinstance(name, Path) or str(name).startswith((".", "/", "~"))
    if not path.is_dir() and (is_path_like or len(path.parts) > 2):
        raise FileNotFoundError(f"folder '{name}' does not exist; check the path of {what}.")
    if path.is_dir() and not (path / wanted).is_file():
        raise FileNotFoundError(
            f"folder '{name}' is not {what}: it has no {wanted}. Save one there with "
            "save_pretrained(), or give a hub name."
        )
    return str(path) if path.is_dir() else str(name)


@contextmanager
def _explain_hub_errors(name: str | Path, revision: str | None) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        # transformers and peft raise the first two for a name the hub does not know; the third is
        # a truncated weights file.
        at = "" if revision is None else f" at revision '{revision}'"
        raise ValueError(
            f"'{name}'{at} could not be loaded: {_first_line(error)} "
            "Check the spelling and the revision. Offline, only local folders and what is already "
            "in the hub's cache load; a gated or private model needs its licence accepted on its "
            "page and a login (`hf auth login`)."
        ) from error


def _first_line(error: BaseException) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.strip().rstrip(".:") + "."
