"""Load models by name: from the hub, from a folder, or as a base with a PEFT adapter.

Contract: the weights come back raw (nothing folded, nothing centred), all of them read from the
files and shared with no other model; what cannot be loaded raises one paragraph with the name, the
reason and the next step. Limit: decoder-only language models, each whole on one device.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tl_crosscoder import files
from tl_crosscoder.models.adapter import no_merge_message, with_adapter
from tl_crosscoder.models.devices import (
    Precision,
    devices_of,
    precision,
    quantized_loading,
    settle_on_cpu,
)
from tl_crosscoder.models.hooked import HookedModel
from tl_crosscoder.models.hub_errors import explained
from tl_crosscoder.models.pretrained import resolve_model
from tl_crosscoder.models.site import Site
from tl_crosscoder.models.tokenizer import TokenIds

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "spiece.model", "vocab.json",
    "vocab.txt",
)  # fmt: skip


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


def tokenizer_of_all(sites: Sequence[Site], given: Any) -> tuple[Any, str | None]:
    """The tokenizer that all models are loaded with, and its name; None where each has its own.

    `given` is a tokenizer, or its name or folder. Where the folder of a model has none, that of an
    adapter or of another model is taken; where there is none at all, models read ids alone.
    """
    if given is None:
        lacking = [s.model_name for s in sites if _lacks_tokenizer(s.model_name)]
        if not lacking:
            return None, None
        adapters = [s.adapter for s in reversed(sites) if s.adapter and _is_beside(s.adapter)]
        others = [s.model_name for s in reversed(sites) if s.model_name not in lacking]
        given = next(iter([*adapters, *others]), None)
        if given is None:
            warnings.warn(
                f"'{lacking[0]}' has no tokenizer, and no other model here has one: text is to be "
                "given as input_ids. For other text save one there with "
                "tokenizer.save_pretrained(), or name one (tokenizer=, --tokenizer).",
                stacklevel=3,
            )
            return None, None
        warnings.warn(
            f"'{lacking[0]}' has no tokenizer: that of '{given}' is taken for all models.",
            stacklevel=3,
        )
    if not isinstance(given, str | Path):
        return given, getattr(given, "name_or_path", None) or None
    return _named_tokenizer(given, None), str(given)


def _named_tokenizer(name: str | Path, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    path = files.user_path(resolve_model(name))
    with explained(name, revision):
        return AutoTokenizer.from_pretrained(path if path.is_dir() else name, revision=revision)


def _is_beside(name: str | Path) -> bool:
    """Whether the folder of a model or adapter holds a tokenizer."""
    path = files.user_path(resolve_model(name))
    return any((path / file).is_file() for file in _TOKENIZER_FILES)


def _lacks_tokenizer(name: str) -> bool:
    """Whether a model's folder has none; on the hub it is taken for granted."""
    is_folder = (files.user_path(resolve_model(name)) / "config.json").is_file()
    return is_folder and not _is_beside(name)


def _adapters_tokenizer(folder: Path, site: Site) -> Any:
    """The tokenizer beside an adapter where it has a chat template and the base has none."""
    if not _is_beside(folder):
        return None
    own = _named_tokenizer(folder, None)
    if own.chat_template is None or load_tokenizer(site).chat_template is not None:
        return None
    warnings.warn(
        f"'{site.model_name}' has no chat template: tokenizer and template of the adapter "
        f"'{site.adapter}' are taken.",
        stacklevel=3,
    )
    return own


def load_site(site: Site, how: LoadOptions) -> HookedModel:
    """The model of a site as a `TransformerBridge`, raw, its adapter merged or attached.

    Raises FileNotFoundError for a missing folder, and ValueError for what the hub refuses or where
    the adapter does not fit.
    """
    name, adapter, revision = site.model_name, site.adapter, site.model_revision
    folder = None if adapter is None else adapter_folder(adapter, site.revision)
    if folder is not None and how.tokenizer is None:
        how = replace(how, tokenizer=_adapters_tokenizer(folder, site))
    source, hf_model = _source(name), None
    with explained(name, revision):
        if folder is not None or how.precision.is_4bit:
            hf_model = _hf_model(source, how, revision)
    if folder is not None:
        named = {"base": name, "adapter": str(adapter)}
        how_merged = {"merge": how.merge_adapter, "revision": revision}
        hf_model = with_adapter(hf_model, folder, **named, **how_merged)
    with explained(name, revision):
        model = _boot(source, hf_model, how, revision)
    settle_on_cpu(model, name)
    return model


def load_trainable(site: Site, *, device: str, dtype: str | torch.dtype) -> Any:
    """The base of a site as a Hugging Face model, in weights that an adapter can be trained on.

    float16, which gradients leave, becomes bfloat16.

    Raises:
        ValueError, FileNotFoundError: 4-bit weights, or a model that cannot be found.
    """
    found = precision(dtype)
    if found.is_4bit:
        raise ValueError(
            f"'{site.model_name}' is in 4 bits ({dtype}), in which no adapter is trained here."
        )
    wide = torch.bfloat16 if found.dtype == torch.float16 else found.dtype
    how = LoadOptions(device=device, precision=replace(found, dtype=wide))
    source, revision = _source(site.model_name), site.model_revision
    with explained(site.model_name, revision):
        return _hf_model(source, how, revision)


def load_tokenizer(site: Site, name: str | None = None) -> Any:
    """The tokenizer of a site's model, or a named one, without the model.

    `TokenIds` where it has none. Raises as `load_site`.
    """
    if name is not None:
        return _named_tokenizer(name, None)
    source = _source(site.model_name)  # a folder that is not there is said better
    if _lacks_tokenizer(site.model_name):
        from transformers import AutoConfig

        return TokenIds(AutoConfig.from_pretrained(source).get_text_config().vocab_size)
    return _named_tokenizer(site.model_name, site.model_revision)


def _boot(source: str, hf_model: Any, how: LoadOptions, revision: str | None) -> HookedModel:
    from transformer_lens.model_bridge import TransformerBridge

    lacks_one = how.tokenizer is None and _lacks_tokenizer(source)
    # What a bridge loads its model with: of a class only `from_pretrained` is called.
    loader: Any = SimpleNamespace(from_pretrained=_whole_model)
    model = TransformerBridge.boot_transformers(
        source,
        hf_model=hf_model,
        device=how.device,
        dtype=how.precision.dtype,
        revision=revision,
        tokenizer=_no_tokenizer() if lacks_one else how.tokenizer,
        model_class=loader,
    )
    if lacks_one:
        model._tokenizer = None
    return model


def _no_tokenizer() -> Any:
    """A tokenizer of nothing, which a bridge needs while it is made."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    nothing = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    # With `add_bos_token` TransformerLens does not load it again by its name.
    return PreTrainedTokenizerFast(tokenizer_object=nothing, add_bos_token=True)


def _whole_model(source: str, *, config: Any, **options: Any) -> Any:
    from transformer_lens.model_bridge.sources.transformers import (
        determine_architecture_from_hf_config,
        get_hf_model_class_for_architecture,
    )

    architecture = determine_architecture_from_hf_config(config)
    model_class = get_hf_model_class_for_architecture(architecture)
    return _whole(model_class, source, config=config, **options)


@contextmanager
def _without_bars() -> Iterator[None]:
    """No bar of transformers for each file of weights: red lines in a notebook."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _whole(model_class: Any, source: str, **options: Any) -> Any:
    """What `model_class.from_pretrained` loads. Raises ValueError unless it is the whole model.

    transformers fills what is missing with random numbers, and says so in a warning alone. Weights
    beside the decoder, such as the value head of a trainer, are left out with a warning.
    """
    # Of another shape is reported with the rest.
    asked = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with _without_bars():
        hf_model, found = model_class.from_pretrained(source, **options, **asked)
    decoder = f"{hf_model.base_model_prefix}."
    wrong = {
        "missing": sorted(found["missing_keys"]),
        "of another shape": [
            f"{name} {[*there]} for {[*wanted]}"
            for name, there, wanted in sorted(found["mismatched_keys"])
        ],
        "without a place in the model": sorted(
            key for key in found["unexpected_keys"] if key.startswith(decoder)
        ),
    }
    if any(wrong.values()):
        listed = "; ".join(f"{what} {_first(names)}" for what, names in wrong.items() if names)
        raise ValueError(
            f"its weights are not those of the model in its config.json, and would be filled with "
            f"random numbers or left out: {listed}. Save the whole model with save_pretrained()."
        )
    beside = sorted(found["unexpected_keys"])
    if beside:
        warnings.warn(
            f"'{source}' has weights that no part of its {type(hf_model).__name__} uses, left out: "
            f"{_first(beside)}.",
            stacklevel=2,
        )
    return hf_model


def _first(names: Sequence[str], n: int = 4) -> str:
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(names[:n]) + more


def _hf_model(source: str, how: LoadOptions, revision: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    hf_model = _whole(
        AutoModelForCausalLM,
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


def adapter_folder(adapter: str | Path, revision: str | None) -> Path:
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
    path = files.user_path(name)
    is_path_like = isinstance(name, Path) or str(name).startswith((".", "/", "~"))
    if not path.is_dir() and (is_path_like or len(path.parts) > 2):
        raise FileNotFoundError(f"folder '{name}' does not exist; check the path of {what}.")
    if path.is_dir() and not (path / wanted).is_file():
        raise FileNotFoundError(
            f"folder '{name}' is not {what}: it has no {wanted}. Save one there with "
            "save_pretrained(), or give a hub name."
        )
    return path if path.is_dir() else None
