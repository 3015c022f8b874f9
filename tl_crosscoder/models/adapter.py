"""A PEFT adapter on a base model: merged into its weights, or attached beside them.

Contract: all of the adapter is used or none; attached and merged give the same logits up to
rounding, which is measured on a few tokens whenever an adapter is merged, and an adapter that was
trained on another base is taken with a warning. Limit: LoRA-like adapters; an attached one costs a
little time in every forward pass.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_crosscoder.models.hub_errors import explained, whole_reason
from tl_crosscoder.models.pretrained import PREFIX

_PROBE_TOKENS = 16
"""Tokens, spread over the vocabulary, on which merged and attached are compared."""


def with_adapter(
    hf_model: Any,
    folder: Path,
    *,
    base: str,
    adapter: str,
    merge: bool | None,
    revision: str | None = None,
) -> Any:
    """The Hugging Face model with an adapter, its own weights or modules changed in place.

    `merge` None merges into float weights and attaches to quantised ones, where merging would
    round a second time. `base`, its `revision` and `adapter` are names for messages. Raises
    ValueError for a second rounding, and where the adapter does not fit.
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
            f"adapter '{adapter}' does not fit base model '{base}': {whole_reason(error)} "
            f"It was trained on '{config.base_model_name_or_path}': give that as the base."
        ) from error
    _warn_of_another_base(config, base, revision, adapter)
    is_merged = not is_quantized if merge is None else merge
    return _merged(adapted, adapter) if is_merged else adapted.get_base_model()


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

    saved = load_peft_weights(source, device="cpu")
    _resize_vocabulary_(hf_model, saved)
    with warnings.catch_warnings():
        # PEFT only warns when it leaves layers without their adapter weights, and says nothing of
        # adapter weights for which the model has no place.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        # PEFT on transformers 5.23; nothing that a user of ours can change.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # Of what merging does to tied weights, which `_merged` sees to.
        warnings.filterwarnings("ignore", message=".*tied layer is part of the adapter")
        adapted: Any = PeftModel.from_pretrained(hf_model, source)
    used = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    unused = [key for key in saved if adapted.base_model.prefix in key and key not in used]
    if unused:
        raise ValueError(f"the base has no place for {unused[0]!r}")
    return adapted


def _resize_vocabulary_(hf_model: Any, saved: Mapping[str, Tensor]) -> None:
    """Give the base as many embeddings as the adapter was saved with: fine-tunes add tokens.

    The new rows are the adapter's own.
    """
    embedding, head = hf_model.get_input_embeddings(), hf_model.get_output_embeddings()
    names = {name for name, m in hf_model.named_modules() if m is embedding or m is head}
    n_tokens = {
        len(tensor)
        for key, tensor in saved.items()
        if re.sub(r"^base_model\.model\.|\.(base_layer|modules_to_save|weight)\b", "", key) in names
    }
    if len(n_tokens) == 1 and n_tokens != {len(embedding.weight)}:
        hf_model.resize_token_embeddings(n_tokens.pop(), mean_resizing=False)


# --- which base -----------------------------------------------------------------------------------


def _warn_of_another_base(config: Any, base: str, revision: str | None, adapter: str) -> None:
    """Say so where an adapter fits a base of the same shapes that it was not trained on."""
    recorded = config.base_model_name_or_path
    is_other = bool(recorded) and not _is_same_model(str(recorded), base)
    trained_at = getattr(config, "revision", None)
    is_other_revision = trained_at is not None and trained_at != (revision or "main")
    if is_other or is_other_revision:
        asked, own = (
            f"'{name}'" + ("" if at is None else f" at revision '{at}'")
            for name, at in ((base, revision), (recorded, trained_at))
        )
        warnings.warn(
            f"adapter '{adapter}' was trained on {own}, but is put on {asked}: unless they are the "
            "same weights, what is measured is the difference of neither. Give the model that it "
            "was trained on as the base.",
            stacklevel=2,
        )


def _is_same_model(recorded: str, given: str) -> bool:
    """Whether two names mean one model, as far as names say: folders are known by their last part.

    An adapter records the folder of the machine that it was trained on.
    """
    has_folder = any(
        name.startswith((".", "/", "~", PREFIX)) or name.count("/") > 1 or Path(name).exists()
        for name in (recorded, given)
    )
    return recorded == given or (has_folder and _last_part(recorded) == _last_part(given))


def _last_part(name: str) -> str:
    cached = re.search(r"models--[^/]+--([^/]+)/snapshots/", name)  # a folder of the hub's cache
    return (cached.group(1) if cached else Path(name).name).lower()


# --- merging --------------------------------------------------------------------------------------


@torch.no_grad()
def _merged(adapted: Any, adapter: str) -> Any:
    """The model with the adapter in its weights, or attached where merging changes the logits."""
    _untie_(adapted)
    vocabulary = adapted.get_input_embeddings().weight
    tokens = torch.linspace(0, len(vocabulary) - 1, _PROBE_TOKENS, device=vocabulary.device).long()
    attached = adapted(input_ids=tokens[None]).logits.float()
    adapted.merge_adapter()
    error = (adapted(input_ids=tokens[None]).logits.float() - attached).norm()
    # Merging rounds each weight once more: to 3e-4 in float32, to .09 in bfloat16.
    if not error > torch.finfo(vocabulary.dtype).eps ** 0.5 * attached.norm():
        return adapted.unload()
    adapted.unmerge_adapter()
    warnings.warn(
        f"adapter '{adapter}' is attached, not merged: merged into the weights it moves the logits "
        f"by {error / attached.norm():.0%} of their norm.",
        stacklevel=3,
    )
    return adapted.get_base_model()


def _untie_(adapted: Any) -> None:
    """Give each module its own copy of a weight that the adapter edits and that several share.

    A merge is in place: an adapter on the embedding would change the tied head as well, and tied
    adapters on both would be added twice.
    """
    owners: dict[int, dict[tuple[int, str], Any]] = {}
    edited: set[int] = set()
    for path, module in adapted.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), {})[id(module), name] = module
            if "base_layer" in path.split("."):
                edited.add(id(parameter))
    for shared in (owners[i] for i in edited if len(owners[i]) > 1):
        for (_, name), module in [*shared.items()][1:]:
            own = getattr(module, name).detach().clone()
            setattr(module, name, torch.nn.Parameter(own, requires_grad=False))
        adapted.config.tie_word_embeddings = False
