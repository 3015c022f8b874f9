"""A PEFT adapter on a base model: merged into its weights, or attached beside them.

Contract: all of the adapter is used or none; attached and merged give the same activations up to
float error. Limit: LoRA-like adapters; an attached one costs a little time in every forward pass.

Load models by name: from the hub, from a folder, or as a base with a PEFT adapter.

Contract: the weights come back raw (nothing folded, nothing centred) and shared with no other
model; what cannot be loaded raises one paragraph with the name, the reason and the next step.
Limit: decoder-only language models, each whole on one device.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tl_crosscoder.models.devices import (
    Precision,
    devices_of,
    precision,
    quantized_loading,
    settle_on_cpu,
)
from tl_crosscoder.models.hooked import HookedModel
from tl_crosscoder.models.hub_errors import explained, first_line
from tl_crosscoder.models.pretrained import resolve_model
from tl_crosscoder.models.site import Site


def with_adapter(
    hf_model: Any, folder: Path, *, base: str, adapter: str, merge: bool | None
) -> Any:
    """The Hugging Face model with an adapter, its own weights or modules changed in place.

    `merge` None merges into float weights and attaches to quantised ones, where merging would
    round a second time. `base` and `adapter` are names for messages. Raises ValueError for a
    second rounding, and where the adapter does not fit.
    """
    from peft import PeftConfig

    is_quantized = bool(getattr(hf_model, "is_quantized", False))
    if merge and is_quantized:
        raise ValueError(no_merge_message(f"'{base}'"))
    with explained(adapter, None):
        config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise ValueError(
            f"adapter '{adapter}' is {config.peft_type}, which changes no weights: use a "
            "LoRA-like adapter or a fine-tuned model."
        )
    try:
        adapted = _adapt(hf_model, str(folder))
    except (RuntimeError, ValueError, UserWarning) as error:
        raise ValueError(
            f"adapter '{adapter}' does not fit base model '{base}': {first_line(error)} "
            f"It was trained on '{config.base_model_name_or_path}': give that as the base."
        ) from error
    is_merged = not is_quantized if merge is None else merge
    return adapted.merge_and_unload() if is_merged else adapted.get_base_model()


def no_merge_message(base: str) -> str:
    """Why an adapter is not merged into quantised weights."""
    return (
        f"merge_adapter=True on {base}: merging into quantised weights rounds them again. Set "
        "it to False to attach the adapter, or merge in float weights, save them with "
        "save_pretrained() and give that folder as the fine-tuned model."
    )


def _adapt(hf_model: Any, source: str) -> Any:
    """Put an adapter on a model, all of it or none."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict, load_peft_weights

    with warnings.catch_warnings():
        # PEFT only warns when it leaves layers without their adapter weights, and says nothing of
        # adapter weights for which the model has no place.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        # PEFT on transformers 5.23; nothing that a user of ours can change.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted: Any = PeftModel.from_pretrained(hf_model, source)
    used = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    saved = load_peft_weights(source, device="cpu")
    unused = [key for key in saved if adapted.base_model.prefix in key and key not in used]
    if unused:
        raise ValueError(f"the base has no place for {unused[0]!r}")
    return adapted


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How one model is loaded, whichever it is."""

    device: str
    precision: Precision
    merge_adapter: bool | None = None
    """Merge an adapter into the weights or attach it; None merges unless they are quantised."""
    tokenizer: Any = None
    """Instead of the model's own."""


def options_of_each(
    adapters: Sequence[str | Path | None],
    *,
    device: str,
    dtype: str | torch.dtype,
    merge_adapter: bool | None = None,
    tokenizer: Any = None,
) -> list[LoadOptions]:
    """Options of each model, from its adapter or None and from what a user gives for all.

    For `device` see `devices_of`, for `dtype` `precision`. Raises ValueError for options that
    cannot be, before anything is loaded.
    """
    found = precision(dtype)
    if found.is_4bit and merge_adapter and any(adapters):
        raise ValueError(no_merge_message(f"dtype {dtype!r}"))
    return [
        LoadOptions(device=d, precision=found, merge_adapter=merge_adapter, tokenizer=tokenizer)
        for d in devices_of(device, len(adapters))
    ]


def load_site(site: Site, how: LoadOptions) -> HookedModel:
    """The model of a site as a `TransformerBridge`, raw, its adapter merged or attached.

    Raises FileNotFoundError for a missing folder, and ValueError for what the hub refuses or where
    the adapter does not fit.
    """
    name, adapter, revision = site.model_name, site.adapter, site.model_revision
    folder = None if adapter is None else _adapter_folder(adapter, site.revision)
    source, hf_model = _source(name), None
    with explained(name, revision):
        if folder is not None or how.precision.is_4bit:
            hf_model = _hf_model(source, how, revision)
    if folder is not None:
        named = {"base": name, "adapter": str(adapter)}
        hf_model = with_adapter(hf_model, folder, **named, merge=how.merge_adapter)
    with explained(name, revision):
        model = _boot(source, hf_model, how, revision)
    settle_on_cpu(model, name)
    return model


def load_tokenizer(site: Site) -> Any:
    """The tokenizer of a site's model, without the model. Raises as `load_site` does."""
    from transformers import AutoTokenizer

    source = _source(site.model_name)
    revision = site.model_revision
    with explained(site.model_name, revision):
        return AutoTokenizer.from_pretrained(source, revision=revision)


def _boot(source: str, hf_model: Any, how: LoadOptions, revision: str | None) -> HookedModel:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        source,
        hf_model=hf_model,
        device=how.device,
        dtype=how.precision.dtype,
        revision=revision,
        tokenizer=how.tokenizer,
    )


def _hf_model(source: str, how: LoadOptions, revision: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    hf_model: Any = AutoModelForCausalLM.from_pretrained(
        source,
        revision=revision,
        dtype=how.precision.dtype,
        # What the bridge asks for when it loads by itself.
        attn_implementation="eager",
        **(quantized_loading(how.device) if how.precision.is_4bit else {}),
    )
    return hf_model.to(how.device)


def _source(name: str | Path) -> str:
    """Folder or hub name of a model. Raises FileNotFoundError for a folder without one."""
    folder = _folder(name, "config.json", "a model")
    return str(name) if folder is None else str(folder)


def _adapter_folder(adapter: str | Path, revision: str | None) -> Path:
    """Where an adapter's files are, fetched from the hub if they are not on the disk."""
    from huggingface_hub import snapshot_download

    folder = _folder(adapter, "adapter_config.json", "a PEFT adapter")
    if folder is None:
        with explained(adapter, revision):
            # What else the repository holds, such as checkpoints, stays there.
            folder = Path(
                snapshot_download(str(adapter), revision=revision, allow_patterns="adapter_*")
            )
    for part in ("adapter_config", "adapter_model"):
        if not any(folder.glob(f"{part}.*")):
            raise FileNotFoundError(
                f"'{adapter}' is not a whole PEFT adapter: it has no {part} file. Save one with "
                "save_pretrained(); what is a model by itself goes in as the fine-tuned one."
            )
    return folder


def _folder(name: str | Path, wanted: str, what: str) -> Path | None:
    """The folder that a name means, or None. Raises FileNotFoundError if `wanted` is missing."""
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
    return path if path.is_dir() else None
