"""Files of another library's dictionary, in a folder or on the hub, read without running code.

Contract: `read_files` gives tensors by name and the config beside them, `{}` where there is none.
Pickles are opened with `weights_only=True`, YAML by the safe loader, which here reads
`!!python/tuple` as a list. Limit: one weights file; of several the user names one.

A crosscoder of another library, between its files and ours.

Contract: weights for raw activations, with normalisation folded in, in float64; codes at the
library's own scale. Limit: sites of one width.
"""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tl_crosscoder.models.hub_errors import explained

WEIGHTS_NAMES = ("model.safetensors", "cc_weights.pt", "model.pt", "model_final.pt", "ae.pt")
CONFIG_NAMES = ("config.json", "cfg.json", "model_cfg.yaml", "model.cfg")
ENDINGS = (".safetensors", ".pt")
SAELENS_NAME = "sae_weights.safetensors"


@dataclass(frozen=True, eq=False, kw_only=True)
class ForeignFiles:
    """What was read."""

    name: str
    """What to call it elsewhere: the name on the hub, or that of the local folder or file."""
    path: Path
    """Of the weights."""
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    """Of the file beside them."""


class _SafeLoader(yaml.SafeLoader):
    """Safe YAML and tuples, which crosscode writes for its dimensions."""


def _tuple(loader: yaml.SafeLoader, node: Any) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


_SafeLoader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)


def read_files(source: str | Path, *, revision: str | None = None) -> ForeignFiles:
    """Read a folder, a weights file, or the same on the hub: `owner/name[/folder][/file]`.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: what the hub refuses, several weights files, or one that cannot be read safely.
    """
    path = _weights_path(*_fetched(source, revision))
    config = _config_path(path)
    local = Path(source).expanduser()
    return ForeignFiles(
        name=local.resolve().name if local.exists() else str(source),
        path=path,
        tensors=_tensors(path),
        config={} if config is None else _config(config),
    )


def _fetched(source: str | Path, revision: str | None) -> tuple[Path, str | None]:
    """The folder, and the weights file where one was named."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path, None
    if path.is_file():
        return path.parent, path.name
    parts = str(source).split("/")
    is_path_like = isinstance(source, Path) or str(source).startswith((".", "/", "~"))
    if is_path_like or len(parts) < 2:
        raise FileNotFoundError(
            f"there is no folder or file {source}; on the hub a dictionary is owner/name, or "
            "owner/name/folder where it is not at the top of the repository."
        )
    repository, inner = "/".join(parts[:2]), parts[2:]
    file = inner.pop() if inner and inner[-1].endswith(ENDINGS) else None
    names = [*CONFIG_NAMES, *([file, _own_config_name(file)] if file else WEIGHTS_NAMES)]
    with explained(repository, revision):
        from huggingface_hub import snapshot_download

        patterns = ["/".join([*inner, name]) for name in names]
        folder = snapshot_download(repository, revision=revision, allow_patterns=patterns)
    return Path(folder, *inner), file


def _weights_path(folder: Path, file: str | None) -> Path:
    if file is not None:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} has no file {file}: check its name.")
        return folder / file
    known = [folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()]
    others = sorted(p for ending in ENDINGS for p in folder.glob(f"*{ending}"))
    found = known or others
    if folder / SAELENS_NAME in found:
        raise ValueError(
            f"{folder} is a dictionary in SAELens's layout: nothing is to be converted. Read it "
            "with Crosscoder.load, or with sae_lens.SAE.load_from_disk if it is not one of ours."
        )
    if len(found) == 1:
        return found[0]
    if not found:
        raise FileNotFoundError(
            f"{folder} has no weights: none of {', '.join(WEIGHTS_NAMES)}, and no other "
            f"{' or '.join(ENDINGS)} file. Name the folder that holds them."
        )
    raise ValueError(
        f"{folder} holds several weights files, {[p.name for p in found]}: name one of them, as "
        f"{folder / found[0].name}."
    )


def _own_config_name(file: str) -> str:
    return f"{Path(file).stem}_cfg.json"


def _config_path(weights: Path) -> Path | None:
    names = _own_config_name(weights.name), *CONFIG_NAMES
    return next((weights.parent / n for n in names if (weights.parent / n).is_file()), None)


def _config(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    try:
        is_json = path.suffix == ".json"
        # Ours is a safe loader: it makes plain values only.
        config = json.loads(text) if is_json else yaml.load(text, Loader=_SafeLoader)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} cannot be read as plain values ({error}). Where it names Python objects, "
            "write what they stand for (such as dtype: float32) and try again."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no mapping of fields to values, but {type(config).__name__}.")
    return config


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        found = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read safely ({error}). A pickle may hold tensors by name and "
            "nothing else: save model.state_dict() with the library that made it."
        ) from error
    is_state = isinstance(found, dict) and all(isinstance(v, Tensor) for v in found.values())
    if not is_state:
        raise ValueError(
            f"{path} holds {type(found).__name__} and not tensors by name: save "
            "model.state_dict() with the library that made it."
        )
    # torch.compile puts this before every name.
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}


@dataclass(frozen=True, eq=False, kw_only=True)
class Foreign:
    """Weights for raw activations, float64, and what the files say beside."""

    library: str
    W_enc: Float[Tensor, "n_sites d_model d_sae"]
    W_dec: Float[Tensor, "n_sites d_sae d_model"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, "n_sites d_model"]
    threshold: Float[Tensor, " d_sae"]
    scales: tuple[float, ...]
    """By which training multiplied each site; folded in already."""
    names: Mapping[str, str] = field(default_factory=dict)
    """`base` and `hook_name`, where the files have them."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Plain values to be recorded."""


def check_tensors(files: ForeignFiles, needed: set[str], *, optional: set[str]) -> None:
    """Refuse a file with a tensor too few, or with others: they are of another forward pass."""
    missing = sorted(needed - set(files.tensors))
    if missing:
        raise ValueError(
            f"{files.path} lacks the tensors {missing}: the file is not whole, or of another "
            "variant of the layout. Save model.state_dict() again."
        )
    more = sorted(set(files.tensors) - needed - optional)
    if more:
        raise unrepresentable(files, f"the tensors {more}", f"only {sorted(needed | optional)}")


def unrepresentable(files: ForeignFiles, what: str, known: str) -> ValueError:
    """What is in the files, and what is understood instead."""
    return ValueError(
        f"{files.path} has {what}, which a crosscoder here cannot represent or which is another "
        f"variant of the layout; it takes {known}. Export it again without that, or build the "
        "weights yourself with Crosscoder(CrosscoderConfig(...)).load_state_dict(...)."
    )
