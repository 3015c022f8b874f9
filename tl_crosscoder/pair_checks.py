"""Can these two models be compared? Asked before any long work.

Contract: every check returns what it measured, or raises a one-paragraph ValueError with both
values and the next step. `labels` name the two models in messages.
"""

from collections.abc import Sequence
from typing import Any

from tl_crosscoder import hooked_model, tokenization
from tl_crosscoder.hooked_model import HookedModel


def check_equal(values: Sequence[Any], what: str, labels: Sequence[str], advice: str) -> None:
    """Raise ValueError if the two values differ."""
    if values[0] != values[1]:
        raise ValueError(
            f"the two models differ in {what}: the {labels[0]} has {values[0]}, the {labels[1]} "
            f"has {values[1]}. {advice}"
        )


def common_tokenizer(models: Sequence[HookedModel], given: Any, labels: Sequence[str]) -> Any:
    """The tokenizer for both: the one given, else the fine-tune's, which has the chat template."""
    check_equal(
        [model.cfg.d_vocab for model in models],
        "d_vocab",
        labels,
        "Give both one vocabulary (resize_token_embeddings in transformers).",
    )
    if given is not None:
        return given
    for model, label in zip(models, labels, strict=True):
        if model.tokenizer is None:
            raise ValueError(f"the {label} carries no tokenizer; pass tokenizer= for both.")
    tokenization.check_same_tokenizer(models[0].tokenizer, models[1].tokenizer, labels=labels)
    return models[1].tokenizer


def check_same_kind(models: Sequence[HookedModel], labels: Sequence[str]) -> str:
    """`raw` or `processed`. Raises ValueError unless the models' numbers can be subtracted."""
    inner = [getattr(model, "original_model", None) for model in models]
    if inner[0] is inner[1] is not None and models[0] is not models[1]:
        raise ValueError(
            f"the {labels[0]} and the {labels[1]} are two bridges over one Hugging Face module, "
            "and each rewires it: load the module once for each bridge."
        )
    weights = [next(iter(model.parameters())) for model in models]
    check_equal([w.device.type for w in weights], "device", labels, "Move one with .to(device).")
    check_equal(
        [w.dtype for w in weights],
        "dtype",
        labels,
        "Load both in one: rounding alone would look like a difference.",
    )
    how = [hooked_model.weight_processing(model) for model in models]
    check_equal(
        how, "weight processing", labels, "Load both raw (from_pretrained does), or process both."
    )
    return how[0].name


def check_widths(
    models: Sequence[HookedModel], hook_names: Sequence[str], labels: Sequence[str]
) -> list[int]:
    """Widths at the hooks. Raises ValueError if they differ or a hook gives no vector a token."""
    sides = zip(models, hook_names, labels, strict=True)
    widths = [hooked_model.hook_width(*side) for side in sides]
    check_equal(widths, "width at the hook", labels, "Choose hooks of one width.")
    return widths
