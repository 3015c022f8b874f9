"""Several runs from one config: a list of what each changes.

No torch here: the command line reads it before anything else. Limit: what is shared (models, text,
batches) cannot change from run to run.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tl_crosscoder.config.presets import preset_from
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.config.yaml import read_yaml

VARIED = (
    "preset", "d_sae", "expansion", "lr", "lr_warmup_steps", "lr_decay_share", "max_grad_norm",
    "dead_after_tokens", "auxk_weight", "normalize", "reconstruction", "kernels", "compute_dtype",
    "compile", "n_accumulated", "log_every", "weight_seed",
)  # fmt: skip
"""What the runs of a sweep may change."""
_NAME = re.compile(r"[\w=+,][\w=+,. -]{0,199}")


def read_sweep(path: str | Path, config: RunConfig) -> list[RunConfig]:
    """The runs of a sweep file: a YAML list of mappings of fields to values.

    Each may have a `name`, by default what it changes; it is its folder within `config.output`.
    `preset: {k: 32}`, without a name, changes options of the config's preset.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a list, a field that is shared, two runs of one name, or a name that is
            not that of a folder.
    """
    content = read_yaml(path)
    if (
        not isinstance(content, list)
        or not content
        or not all(isinstance(c, dict) for c in content)
    ):
        raise ValueError(
            f"{path} must be a list of mappings of fields to values, one for each run, such as "
            "'- {preset: {name: delta, k: 32}}'."
        )
    return sweep(config, content, name=str(path))


def sweep(
    config: RunConfig, changes: Sequence[Mapping[str, Any]], *, name: str = "the sweep"
) -> list[RunConfig]:
    """The runs that a config and these changes make. Raises ValueError, see `read_sweep`."""
    shared = sorted({key for change in changes for key in change} - {*VARIED, "name"})
    if shared:
        raise ValueError(
            f"{name} changes {shared}, which the runs of a sweep share or do not have. They may "
            f"change {', '.join(VARIED)}."
        )
    names = [str(change.get("name") or run_name(change)) for change in changes]
    if bad := [own for own in names if not _NAME.fullmatch(own)]:
        raise ValueError(
            f"{name} has runs called {bad}: each is a folder in {config.output}, so that its name "
            "is of at most 200 letters, digits, spaces and `_ = + , . -`, and begins with none of "
            "the last two."
        )
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"{name} has several runs called {twice}. Give each a name of its own.")
    return [_changed(config, change, own) for change, own in zip(changes, names, strict=True)]


def run_name(change: Mapping[str, Any]) -> str:
    """What a run is called by what it changes: `preset=delta,k=32,lr=0.001`."""
    flat: dict[str, Any] = {}
    for key, value in change.items():
        if isinstance(value, Mapping):
            flat |= {(key if own == "name" else own): v for own, v in value.items()}
        elif key != "name":
            flat[key] = value
    parts = [f"{key}={value}" for key, value in flat.items()]
    return re.sub(r"[^\w=.,+-]+", "_", ",".join(parts)) or "unchanged"


def _changed(config: RunConfig, change: Mapping[str, Any], name: str) -> RunConfig:
    values = {key: value for key, value in change.items() if key != "name"}
    if "preset" in values:
        values["preset"] = preset_from(values["preset"], base=config.preset)
    known = {f.name: getattr(config, f.name) for f in fields(config)}
    made = RunConfig.from_mapping(known | values, name=name)
    if made.difference != config.difference:
        raise ValueError(
            f"run {name!r} is trained on the difference of the sites and the others are not: a "
            "sweep shares its activations. Train it apart, or all with --difference."
        )
    return replace(made, output=str(Path(config.output) / name))
