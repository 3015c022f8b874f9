"""From whatever is at hand in a notebook to what `train` takes: names or loaded models, any text.

Limit: two loaded models and one hook point; names take as many as `RunConfig` does.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from tl_crosscoder.config.presets import preset, preset_from, preset_name
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.models.hooked import HookedModel
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.run.text import Text, check_text, checked_text
from tl_crosscoder.run.training import check_models

Model = str | Path | HookedModel
"""A name, a folder, or a model of either TransformerLens kind."""
Models = ModelPair

_OF_NAMES = ("adapter", "device", "dtype", "merge_adapter", "revision", "finetuned_revision")
_SCALARS = {bool, int, float, str, NoneType}
_NOT_HERE = ("cache", "mixture", "text", "base", "finetuned")


def live_run(
    base: Model,
    finetuned: Model | None,
    *,
    text: Text,
    settings: Mapping[str, Any],
    model_names: tuple[str, str] | None = None,
) -> tuple[RunConfig, Models | None, Any]:
    """What `train` takes: a config, loaded models and text, None where the config names them.

    Args:
        base: the base model.
        finetuned: the fine-tuned one; None with an adapter, or with several hook points.
        text: what to train and measure on.
        settings: fields of `RunConfig` and options of its preset; None is the default.
        model_names: what a dictionary records of loaded models.

    Raises:
        ValueError, FileNotFoundError: bad settings, models or text.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    given = _with_preset(given)
    _check_settings(given)
    named = _named(base, finetuned, given, model_names)
    content = checked_text(text)
    is_name = isinstance(content, str | Path)
    config = RunConfig(**{**given, **named, "text": str(content) if is_name else None})
    if is_name:
        check_text(config)
    if named:
        check_models(config)
    models = None if named else _pair(base, finetuned, config, model_names)
    return config, models, None if is_name else content


def _with_preset(given: dict[str, Any]) -> dict[str, Any]:
    """Settings with options such as `k` moved into the preset that has them."""
    chosen = preset_from(given.get("preset", "batchtopk"))
    options = {f.name for f in fields(chosen)} & given.keys()
    own = {name: given[name] for name in options}
    rest = {name: value for name, value in given.items() if name not in options}
    return rest | {"preset": preset(preset_name(chosen), **(asdict(chosen) | own))}


def _check_settings(given: Mapping[str, Any]) -> None:
    known = {f.name for f in fields(RunConfig)} - {*_NOT_HERE}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise ValueError(
                f"diff has no setting {name!r}"
                + (f"; nearest: {', '.join(map(repr, near))}" if near else "")
                + ". Settings are the fields of tl_crosscoder.RunConfig and the options of preset "
                f"{preset_name(given['preset'])!r}; a cache or a mixture of texts is trained on "
                "with train, and opened with load_diff."
            )
    hints = get_type_hints(RunConfig)
    for name, value in given.items():
        kinds = get_args(hints[name]) or (hints[name],)
        kinds = (*kinds, int) if float in kinds else kinds
        if set(kinds) <= _SCALARS and type(value) not in kinds:
            names = " or ".join(k.__name__ for k in kinds if k is not NoneType)
            raise ValueError(f"{name} is {value!r}, a {type(value).__name__}; it is {names}.")


def _named(
    base: Model,
    finetuned: Model | None,
    given: Mapping[str, Any],
    model_names: tuple[str, str] | None,
) -> dict[str, str | None]:
    """Fields of a config that name the models; empty where they are loaded."""
    each = [base, *([] if finetuned is None else [finetuned])]
    are_names = [isinstance(m, str | Path) for m in each]
    if all(are_names) and model_names is None:
        return {"base": str(base), "finetuned": None if finetuned is None else str(finetuned)}
    if any(are_names) or len(each) < 2:
        raise ValueError(
            f"base is {_kind(base)} and finetuned {_kind(finetuned)}: give names of both (or an "
            "adapter), or both loaded, with model_names or without."
        )
    refused = sorted({*_OF_NAMES} & given.keys())
    if refused:
        raise ValueError(
            f"the models are loaded already, so {', '.join(refused)} cannot be chosen: leave it "
            "out, or give the names of the models."
        )
    return {}


def _kind(model: Any) -> str:
    return repr(model) if isinstance(model, str | Path | None) else f"a {type(model).__name__}"


def _pair(
    base: Any, finetuned: Any, config: RunConfig, model_names: tuple[str, str] | None
) -> Models:
    """Loaded models. Raises ValueError where a dictionary could not tell them apart by name."""
    if config.hook_name is None or "," in config.hook_name:
        raise ValueError(
            f"hook_name is {config.hook_name!r}: loaded models are read at one hook point. Several "
            "are read in models that are given by name."
        )
    pair = ModelPair(base, finetuned, hook_name=config.hook_name, model_names=model_names)
    names = [site.model_name for site in pair.model_sites]
    if names[0] == names[1] and model_names is None:
        raise ValueError(
            f"both models call themselves {names[0]!r}, and a dictionary records its models by "
            "name. Say what they are with model_names=(base, finetuned): hub names or folders."
        )
    return pair.difference() if config.difference else pair
