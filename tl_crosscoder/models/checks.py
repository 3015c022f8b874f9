"""Can these models be compared? Asked before any long work.

Contract: every check returns what it measured, or raises a one-paragraph ValueError with both
values and the next step. `labels` name the models in messages, one for each.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.models import hooked as hooked_model
from tl_crosscoder.models import tokenizer as tokenization
from tl_crosscoder.models.hooked import HookedModel
from tl_crosscoder.models.site import Site

_DECIDING = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
"""Files of a model's folder that decide what it computes."""


def check_equal(values: Sequence[Any], what: str, labels: Sequence[str], advice: str) -> None:
    """Raise ValueError if one of the values differs from the first."""
    for value, label in zip(values[1:], labels[1:], strict=True):
        if value != values[0]:
            raise ValueError(
                f"the models differ in {what}: the {labels[0]} has {values[0]}, the {label} "
                f"has {value}. {advice}"
            )


def common_tokenizer(
    models: Sequence[HookedModel], given: Any, labels: Sequence[str]
) -> tuple[Any, dict[str, int]]:
    """The tokenizer for all, and the ids of tokens that only some of the models' own have.

    It is the one given, else the last model's, which has the chat template; where none has one,
    `TokenIds`.
    """
    if given is not None:
        return given, {}
    if all(model.tokenizer is None for model in models):
        return tokenization.TokenIds(min(model.cfg.d_vocab for model in models)), {}
    added: dict[str, int] = {}
    for model, label in zip(models, labels, strict=True):
        if model.tokenizer is None:
            raise ValueError(
                f"the {label} carries no tokenizer; name one for all (tokenizer=, --tokenizer)."
            )
        added |= tokenization.check_same_tokenizer(
            models[0].tokenizer, model.tokenizer, labels=(labels[0], label)
        )
    if added:
        n_shared = len(models[-1].tokenizer.get_vocab().keys() - added.keys())
        warnings.warn(
            f"the tokenizers share {n_shared:,} tokens, and {len(added)} are in some of them alone "
            f"({', '.join(map(repr, [*added][:4]))}): the models are compared on the shared ones, "
            "and text that has others is refused.",
            stacklevel=2,
        )
    return models[-1].tokenizer, added


def check_shared(tokens: Int[Tensor, "batch pos"], added: Mapping[str, int]) -> None:
    """Raise ValueError for ids that only some of the tokenizers have."""
    if not added:
        return
    is_added = torch.isin(tokens, torch.tensor([*added.values()], device=tokens.device))
    if bool(is_added.any()):
        found = set(tokens[is_added].tolist())
        names = [token for token, i in added.items() if i in found]
        raise ValueError(
            f"{int(is_added.sum())} of these tokens are {', '.join(map(repr, names[:4]))}, which "
            "only some of the models' tokenizers have: the others never learned them. Use text "
            "and a chat template without them, or say which tokenizer feeds all models "
            "(tokenizer=, --tokenizer)."
        )


def check_same_kind(models: Sequence[HookedModel], labels: Sequence[str]) -> str:
    """`raw` or `processed`. Raises ValueError unless the models' numbers can be subtracted."""
    for (one, its_label), (other, label) in combinations(zip(models, labels, strict=True), 2):
        inner = [getattr(model, "original_model", None) for model in (one, other)]
        if inner[0] is inner[1] is not None and one is not other:
            raise ValueError(
                f"the {its_label} and the {label} are two bridges over one Hugging Face module, "
                "and each rewires it: load the module once for each bridge."
            )
    weights = [next(iter(model.parameters())) for model in models]
    check_equal([w.device.type for w in weights], "device", labels, "Move one with .to(device).")
    check_equal(
        [dtype_name(model) for model in models],
        "dtype",
        labels,
        "Load both in one: rounding alone would look like a difference.",
    )
    how = [hooked_model.weight_processing(model) for model in models]
    check_equal(
        how, "weight processing", labels, "Load both raw (from_pretrained does), or process both."
    )
    return how[0].name


def dtype_name(model: HookedModel) -> str:
    """What a model computes in, and whether some of its weights are rounded further."""
    weights = list(model.parameters())
    # Quantised weights are packed into integers; LoRA's are float32 beside bfloat16 ones.
    first = next(weight.dtype for weight in weights if weight.is_floating_point())
    is_packed = not all(weight.is_floating_point() for weight in weights)
    return f"{first} with quantised weights" if is_packed else str(first)


def folder_hashes(sites: Sequence[Site]) -> dict[str, str]:
    """Hash of the files of each model and adapter that is a folder here, by site.

    A folder keeps its name when it is trained further; on the hub a revision tells.
    """
    own = [site for each in sites for site in (each.minus, each) if site is not None]
    found = {site.name: "".join(_hashes(site)) for site in own}
    return {name: sha256 for name, sha256 in found.items() if sha256}


def _hashes(site: Site) -> Iterator[str]:
    for folder in (site.model_name, site.adapter):
        if folder is not None and files.user_path(folder).is_dir():
            for path in sorted(
                p for pattern in _DECIDING for p in files.user_path(folder).glob(pattern)
            ):
                stat = path.stat()
                yield _sha256(path.resolve(), stat.st_size, stat.st_mtime_ns)[:16]


@cache
def _sha256(path: Path, n_bytes: int, changed_ns: int) -> str:
    """The hash of a file as it is now, which the runs of a sweep ask for again and again."""
    del n_bytes, changed_ns
    return files.sha256(path)
