"""Crosscoders of other libraries as a `Crosscoder`: from a folder, a weights file or the hub.

    convert("ckkissane/crosscoder-gemma-2-2b-model-diff/blocks.14.hook_resid_pre",
            base="google/gemma-2-2b", finetuned="google/gemma-2-2b-it", scales=(0.27590, 0.24423))

On raw activations the codes are those of the other library's `encode`, at its scale;
`fold_W_dec_norm()` makes them ours, f_j n_j. Layouts (see `hub.layouts`) are told apart by their
tensors. No code of a file is run: pickles are opened with `weights_only=True`, YAML by the safe
loader. Limit: files do not record whether the models' weights were processed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from einops import rearrange
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.config.inputs import ModelsConfig
from tl_crosscoder.config.yaml import read_yaml
from tl_crosscoder.crosscoder.config import CrosscoderConfig
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.files import WEIGHTS_NAME
from tl_crosscoder.hub.layouts import LAYOUTS, Foreign, ForeignFiles
from tl_crosscoder.models.devices import memory_of
from tl_crosscoder.models.hub_errors import explained
from tl_crosscoder.models.site import Site, sites_of

WEIGHTS_NAMES = ("model.safetensors", "cc_weights.pt", "model.pt", "model_final.pt", "ae.pt")
CONFIG_NAMES = ("config.json", "cfg.json", "model_cfg.yaml", "model.cfg")
ENDINGS = (".safetensors", ".pt")


def convert(
    source: str | Path,
    *,
    base: str | None = None,
    finetuned: str | None = None,
    adapter: str | None = None,
    hook_name: str | None = None,
    sites: Sequence[Site] | None = None,
    scales: Sequence[float] | None = None,
    revision: str | None = None,
) -> Crosscoder:
    """Read another library's crosscoder.

    Args:
        source: folder, weights file, or on the hub owner/name with a folder or file after it.
        base: base model, where the files do not name it.
        finetuned: fine-tuned model; several with commas between.
        adapter: PEFT adapter on the base, instead of `finetuned`.
        hook_name: hook point, where the files do not name it; several with commas between.
        sites: all of these at once, for revisions and other lists of sites.
        scales: by which training multiplied the activations of each site, where the files neither
            name nor have it folded in: ckkissane's are printed by their notebook alone. None is 1.
        revision: of the dictionary on the hub.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another layout, something that cannot be represented, or models that are not
            named or are too few or too many.
    """
    files = _read(source, revision)
    foreign = _understood(files)
    given = {"base": base, "finetuned": finetuned, "adapter": adapter, "hook_name": hook_name}
    names = foreign.names | {name: value for name, value in given.items() if value is not None}
    own = _named_sites(foreign, names) if sites is None else tuple(sites)
    crosscoder = _assembled(foreign, own, files.name)
    if scales is not None:
        _check_scales(foreign, scales)
        crosscoder.fold_site_scales_(scales)
    bad = [n for n, t in crosscoder.state_dict().items() if not t.isfinite().all()]
    if bad:
        raise ValueError(f"{files.path} holds NaN or infinity in {bad}: use another checkpoint.")
    return crosscoder


def _understood(files: ForeignFiles) -> Foreign:
    """Read by the layout that the names of the tensors tell."""
    for needed, read in LAYOUTS.values():
        if needed <= files.tensors.keys():
            try:
                return read(files)
            except (TypeError, LookupError, AttributeError, RuntimeError) as error:
                raise ValueError(
                    f"{files.path} or the config beside it is damaged: something in it has "
                    f"another shape than the layout of its tensors ({error}). Copy it again."
                ) from error
    known = "; ".join(f"{name} ({', '.join(sorted(n))})" for name, (n, _) in LAYOUTS.items())
    raise ValueError(
        f"{files.path} holds {sorted(files.tensors)[:12]}: the tensors of no known layout. Known "
        f"are {known}."
    )


def _named_sites(foreign: Foreign, names: dict[str, Any]) -> tuple[Site, ...]:
    try:
        return sites_of(ModelsConfig(**names))
    except ValueError as error:
        raise ValueError(
            f"the files of this {foreign.library} crosscoder of {len(foreign.W_enc)} sites name "
            f"{foreign.names or 'no models'}; with what was given: {error}"
        ) from error


def _assembled(foreign: Foreign, named: tuple[Site, ...], name: str) -> Crosscoder:
    """A crosscoder of these sites, which take width and scale of the file."""
    n_sites, d_model, d_sae = foreign.W_enc.shape
    if len(named) != n_sites or any(s.d_model not in (0, d_model) for s in named):
        raise ValueError(
            f"the file holds {n_sites} sites of width {d_model}, but these were named: "
            f"{[(s.name, s.model_name, s.hook_name, s.d_model or 'any width') for s in named]}. "
            "Name as many, model by model, in the order of the file."
        )
    pairs = zip(named, foreign.scales, strict=True)
    sites = tuple(replace(s, d_model=d_model, scale=scale) for s, scale in pairs)
    metadata = SAEMetadata(
        hook_name=sites[-1].hook_name,
        model_name=sites[-1].model_name,
        imported_from={"library": foreign.library, "name": name, **foreign.facts},
    )
    cfg = CrosscoderConfig(d_in=n_sites * d_model, d_sae=d_sae, sites=sites, metadata=metadata)
    crosscoder = Crosscoder(cfg)
    weights = {
        "W_enc": rearrange(foreign.W_enc, "n_sites d_model d_sae -> (n_sites d_model) d_sae"),
        "W_dec": rearrange(foreign.W_dec, "n_sites d_sae d_model -> d_sae (n_sites d_model)"),
        "b_enc": foreign.b_enc,
        "b_dec": foreign.b_dec.flatten(),
        "threshold": foreign.threshold,
    }
    try:
        crosscoder.load_state_dict({n: t.to(torch.float32) for n, t in weights.items()})
    except RuntimeError as error:
        raise ValueError(f"{name}: the tensors are not of one dictionary ({error}).") from error
    return crosscoder


def _check_scales(foreign: Foreign, scales: Sequence[float]) -> None:
    if len(scales) != len(foreign.W_enc) or not all(s > 0 for s in scales):
        raise ValueError(
            f"scales are {tuple(scales)}: give one above 0 for each of the {len(foreign.W_enc)} "
            "sites."
        )
    if any(s != 1 for s in foreign.scales):
        raise ValueError(
            f"the file has its scales {foreign.scales} folded in already: leave scales out."
        )


def _read(source: str | Path, revision: str | None) -> ForeignFiles:
    """Read tensors and config from a folder, a weights file, or the hub."""
    local = files.user_path(source)
    if local.is_dir():
        path = _weights_path(local)
    elif local.is_file():
        path = local
    else:
        path = _fetched(source, revision)
    names = _own_config_name(path.name), *CONFIG_NAMES
    config = next((path.parent / n for n in names if (path.parent / n).is_file()), None)
    return ForeignFiles(
        name=local.resolve().name if local.exists() else str(source),
        path=path,
        tensors=_tensors(path),
        config={} if config is None else _config(config),
    )


def _fetched(source: str | Path, revision: str | None) -> Path:
    """A weights file in the hub's cache; its config is beside it."""
    owner, *inner = str(source).split("/")
    is_path_like = isinstance(source, Path) or owner[:1] in ("", ".", "~")
    if is_path_like or not inner:
        raise FileNotFoundError(
            f"there is no folder or file {source}; on the hub a dictionary is owner/name, or "
            "owner/name/folder where it is not at the top of the repository."
        )
    repository = f"{owner}/{inner.pop(0)}"
    file = inner.pop() if inner and inner[-1].endswith(ENDINGS) else None
    names = [*CONFIG_NAMES, *([file, _own_config_name(file)] if file else WEIGHTS_NAMES)]
    with explained(repository, revision):
        from huggingface_hub import snapshot_download

        patterns = ["/".join([*inner, name]) for name in names]
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns), *inner
        )
    if file is not None and not (folder / file).is_file():
        raise FileNotFoundError(f"{folder} has no file {file}: check its name.")
    return _weights_path(folder) if file is None else folder / file


def _weights_path(folder: Path) -> Path:
    """The one weights file of a folder."""
    known = [folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()]
    found = known or sorted(p for ending in ENDINGS for p in folder.glob(f"*{ending}"))
    if folder / WEIGHTS_NAME in found:
        raise ValueError(
            f"{folder} is a dictionary in SAELens's layout: nothing is to be converted. Read it "
            "with Crosscoder.load, or with sae_lens.SAE.load_from_disk if it is not one of ours."
        )
    if not found:
        raise FileNotFoundError(
            f"{folder} has no weights: none of {', '.join(WEIGHTS_NAMES)}, and no other "
            f"{' or '.join(ENDINGS)} file. Name the folder that holds them."
        )
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds several weights files, {[p.name for p in found]}: name one of them, "
            f"as {found[0]}."
        )
    return found[0]


def _own_config_name(file: str) -> str:
    return f"{Path(file).stem}_cfg.json"


class _SafeLoader(yaml.SafeLoader):
    """Safe YAML and tuples as lists, which crosscode writes for its dimensions."""


def _sequence(loader: yaml.SafeLoader, node: Any) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


_SafeLoader.add_constructor("tag:yaml.org,2002:python/tuple", _sequence)


def _config(path: Path) -> dict[str, Any]:
    try:
        # The loader is a safe one: it makes plain values only.
        is_json = path.suffix == ".json"
        config = files.read_json(path) if is_json else read_yaml(path, loader=_SafeLoader)
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read as plain values ({error}). Where it names Python objects, "
            "write what they stand for (such as dtype: float32) and try again."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, not a mapping of fields.")
    return config


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        found = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except _TooLargeError:
        raise
    except Exception as error:  # a pickle may raise anything
        raise ValueError(
            f"{path} cannot be read safely ({error}). A pickle may hold tensors by name and "
            "nothing else: save model.state_dict() with the library that made it."
        ) from error
    _check_named(found, path)
    # torch.compile puts this before every name.
    named = {name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}
    return {n: t.double() if t.is_floating_point() else t for n, t in named.items()}


class _TooLargeError(ValueError):
    """Tensors that are larger than their file or the memory."""


def _unpickled(path: Path) -> Any:
    """The content of a pickle, read at first without its data, so that sizes come before memory."""
    found = torch.load(path, map_location="meta", weights_only=True)
    if isinstance(found, dict):
        _check_sizes({n: t for n, t in found.items() if isinstance(t, Tensor)}, path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_sizes(tensors: Mapping[Any, Tensor], path: Path) -> None:
    """Refuse a tensor that claims more than its file has, as an expanded one does."""
    n_there, memory = path.stat().st_size, memory_of("cpu")
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > n_there:
            raise _TooLargeError(
                f"{path} holds {name!r} of shape {list(tensor.shape)}, which is more than the file "
                f"has ({n_there:,} bytes): an expanded tensor, or none (meta). Save "
                "model.state_dict() with contiguous tensors."
            )
    n_bytes = 8 * sum(tensor.numel() for tensor in tensors.values())
    if memory is not None and n_bytes > memory:
        raise _TooLargeError(
            f"{path} takes {n_bytes / 1e9:,.1f} GB in float64, and this machine has "
            f"{memory / 1e9:,.1f} GB of memory: convert it on a larger one."
        )


def _check_named(found: Any, path: Path) -> None:
    """Refuse what is not plain tensors by name."""
    items = found.items() if isinstance(found, dict) else [(None, None)]
    odd = [
        (name, tensor)
        for name, tensor in items
        if not isinstance(name, str)
        or not isinstance(tensor, Tensor)
        or tensor.is_meta
        or tensor.layout != torch.strided
    ]
    if odd:
        (name, tensor), *_ = odd
        what = type(found).__name__ if name is None else f"{type(tensor).__name__} under {name!r}"
        raise ValueError(
            f"{path} holds {what} and not tensors by name: save model.state_dict() with the "
            "library that made it."
        )
    _check_sizes(found, path)
