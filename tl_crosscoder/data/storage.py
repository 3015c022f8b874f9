"""Files of an activation cache: number formats, manifest, shards and text.

`decode(encode(rows))` is `rows` up to what the format rounds, in the same shape. int8 has one scale
for each row and site, and errs by at most half of 1/127 of the largest value there. Limits: float16
refuses values beyond 65,504, which it would store as infinity; a manifest of another `FORMAT` is
refused, not converted.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.config.settings import from_mapping
from tl_crosscoder.config.training import StoreDtype
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.site import Site, row_shape, site_parts
from tl_crosscoder.progress import progress

MANIFEST = "manifest.json"
TEXT = "text.safetensors"
FORMAT = 2
_SAVED = ("shards/*.safetensors",)
TEXT_TENSORS = ("tokens", "dropped", "role_ids", "source_ids")
_FIELDS: dict[str, type] = {
    "cache_id": str, "sites": list, "shards": list, "n_shards": int, "is_complete": bool,
    "store": str, "n_contexts": int, "n_training_contexts": int, "sources": list,
}  # fmt: skip

StoredTensors = Mapping[str, Tensor]
"""`rows`, and for int8 `scales`, `[n, n_sites]` in float32."""


def encode(
    rows: Float[Tensor, "n *row"], sites: Sequence[Site], store: StoreDtype
) -> StoredTensors:
    """Rows in the number format of the disk. Raises ValueError for values beyond float16."""
    if store != "int8":
        stored = rows.to(getattr(torch, store))
        if store == "float16" and not bool(stored.isfinite().all()):
            raise ValueError(
                f"an activation of {rows.abs().max().item():,.0f} does not fit in float16. Store "
                "bfloat16 (--store bfloat16)."
            )
        return {"rows": stored}
    largest = [part.abs().amax(dim=1) for part in site_parts(rows, sites)]
    scales = torch.stack(largest, dim=1) / 127
    factors = torch.where(scales > 0, 1 / scales, 0.0)
    return {"rows": (rows * _spread(factors, sites)).round().to(torch.int8), "scales": scales}


def decode(stored: StoredTensors, sites: Sequence[Site]) -> Float[Tensor, "n *row"]:
    """Rows in float32."""
    rows = stored["rows"]
    if rows.dtype != torch.int8:
        return rows.float()
    return rows.float().mul_(_spread(stored["scales"], sites))


def has_small_values(stored: StoredTensors) -> bool:
    """Whether every value is a number far from where float32 ends: below 1e15, squares add up."""
    parts = [tensor for tensor in stored.values() if tensor.is_floating_point() and tensor.numel()]
    # NaN is the smallest and the largest of any values, and compares as False.
    return all(abs(float(v)) < 1e15 for tensor in parts for v in tensor.aminmax())


def bytes_per_row(sites: Sequence[Site], store: StoreDtype) -> int:
    """Bytes of one token at all sites, without its id, role, source and mask."""
    d_in = sum(site.d_model for site in sites)
    if store == "int8":
        return d_in + 4 * len(sites)
    return d_in * getattr(torch, store).itemsize


def select(stored: StoredTensors, index: Tensor) -> StoredTensors:
    """Some of the rows."""
    return {name: _selected(tensor, index) for name, tensor in stored.items()}


def row_bytes(stored: StoredTensors) -> dict[str, np.ndarray]:
    """Views of the rows as bytes, `[n, bytes]`: numpy gathers a few of them in microseconds."""
    return {name: t.flatten(1).view(torch.uint8).numpy() for name, t in stored.items()}


def gathered(
    shards: Sequence[Mapping[str, np.ndarray]],
    indices: Sequence[np.ndarray],
    *,
    like: StoredTensors,
) -> StoredTensors:
    """Some of the rows of several shards, one shard after the other; `like` has their types."""
    out, n_rows = {}, sum(map(len, indices))
    for name, tensor in like.items():
        whole = np.empty((n_rows, shards[0][name].shape[1]), dtype=np.uint8)
        start = 0
        for shard, index in zip(shards, indices, strict=True):
            # In the mode `raise` numpy would make a copy; numbers have been checked.
            shard[name].take(index, axis=0, out=whole[start : start + len(index)], mode="clip")
            start += len(index)
        out[name] = torch.from_numpy(whole).view(tensor.dtype).view(n_rows, *tensor.shape[1:])
    return out


def _selected(tensor: Tensor, index: Tensor) -> Tensor:
    flat = tensor.flatten(1)
    # Words of eight bytes are gathered twice as fast as words of two.
    if flat.shape[1] * flat.itemsize % 8 == 0 and flat.storage_offset() * flat.itemsize % 8 == 0:
        chosen = flat.view(torch.int64).index_select(0, index).view(flat.dtype)
    else:
        chosen = flat.index_select(0, index)
    return chosen.view(len(index), *tensor.shape[1:])


def _spread(scales: Float[Tensor, "n n_sites"], sites: Sequence[Site]) -> Float[Tensor, "n ..."]:
    """One factor for each site, shaped to multiply rows."""
    if len(row_shape(sites)) == 2:
        return scales[:, :, None]
    widths = torch.tensor([site.d_model for site in sites], device=scales.device)
    return scales.repeat_interleave(widths, dim=1)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of rows, as the manifest records it."""

    name: str
    n_contexts: int
    n_rows: int
    n_bytes: int
    sha256: str


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache. Raises FileNotFoundError or ValueError for any other folder."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not an activation cache: it has no {MANIFEST}. Give a folder that "
            "`tl-crosscoder harvest` wrote."
        )
    return checked_manifest(files.read_object(path), path)


def checked_manifest(manifest: dict[str, Any], path: Path | str) -> dict[str, Any]:
    """What was read from a manifest, if it is one of this version. Raises ValueError."""
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {manifest.get('format')!r}; this version reads {FORMAT}. Harvest "
            "again."
        )
    manifest = files.checked_object(manifest, path, **_FIELDS)
    names = [*manifest]
    identity = {n: manifest[n] for n in names[: names.index("cache_id")]}
    if cache_id(identity) != manifest["cache_id"]:
        raise ValueError(
            f"{path} has been changed since it was written: its cache_id is not that of its sites, "
            "text and number format. Restore it, or harvest again."
        )
    return manifest


def cache_id(identity: Mapping[str, Any]) -> str:
    """Hash of all that decides which rows a cache holds; in a manifest it follows these fields."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def check_output(folder: Path, *, resume: bool) -> None:
    """Refuse a folder that a cache may not be written to. Raises ValueError."""
    files.check_folder(folder, MANIFEST, what="cache", resume=resume, saved=_SAVED)


def claim(
    folder: Path, identity: dict[str, Any], *, made_with: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The manifest to continue with: a new one, or that of the folder if it has this identity.

    Raises:
        ValueError: a cache of another identity, or with a damaged shard.
    """
    if not (folder / MANIFEST).is_file() or not files.holds(folder, _SAVED):
        manifest = identity | {
            "cache_id": cache_id(identity),
            "made_with": dict(made_with or {}),
            "n_shards": math.ceil(identity["n_contexts"] / identity["shard_contexts"]),
            "is_complete": False,
            "shards": [],
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TEXT).unlink(missing_ok=True)  # of settings that stopped before the first shard
        files.write_json(folder / MANIFEST, manifest)
        return manifest
    manifest = read_manifest(folder)
    there = {name: manifest.get(name) for name in identity}
    files.check_same(there, identity, what=f"{folder} holds another cache")
    check_shards(folder, manifest, verify=True)
    for part in (folder, folder / "shards"):
        files.sweep(part)
    return manifest


def stored_names(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Tensors of a shard that are the rows."""
    return ("rows", "scales") if manifest["store"] == "int8" else ("rows",)


def shard_name(i: int) -> str:
    """Path of a shard in the folder of its cache."""
    return f"shards/{i:05d}.safetensors"


def shards_of(manifest: dict[str, Any]) -> list[Shard]:
    """The complete shards, in their order. Raises ValueError for one that is not described."""
    return [from_mapping(Shard, s, name="a shard of the manifest") for s in manifest["shards"]]


def check_shards(
    folder: Path, manifest: dict[str, Any], *, verify: bool, show_progress: bool = False
) -> None:
    """Refuse, by name, a shard that is missing, of another cache, or damaged.

    Raises:
        FileNotFoundError, ValueError: with the shard and the next step.
    """
    advice = f"Delete {folder} and harvest again, or restore this file."
    shards = shards_of(manifest)
    if [shard.name for shard in shards] != [shard_name(i) for i in range(len(shards))]:
        raise ValueError(f"{folder / MANIFEST} names its shards in another order. {advice}")
    for shard in progress(shards, desc="Verifying", unit="shard", show=show_progress):
        path = folder / shard.name
        if not path.is_file():
            raise FileNotFoundError(f"shard {path} is missing. {advice}")
        if path.stat().st_size != shard.n_bytes:
            raise ValueError(
                f"shard {path} is damaged: it has {path.stat().st_size:,} bytes in place of "
                f"{shard.n_bytes:,}. {advice}"
            )
        try:
            with safe_open(path, "pt") as file:
                owner = (file.metadata() or {}).get("cache")
        except SafetensorError as error:
            raise ValueError(f"shard {path} is damaged ({error}). {advice}") from error
        if owner != manifest["cache_id"]:
            raise ValueError(f"shard {path} belongs to another cache ({owner}). {advice}")
        if verify and files.sha256(path) != shard.sha256:
            raise ValueError(f"shard {path} is damaged: its sha256 is not the manifest's. {advice}")


def load_text(folder: Path, manifest: dict[str, Any]) -> TokenizedText:
    """The contexts of a cache, masked as they were before the models ran."""
    path = folder / TEXT
    if not path.is_file() or files.sha256(path) != manifest["text_sha256"]:
        raise ValueError(f"{path} is missing or damaged. Harvest again.")
    with safe_open(path, "pt") as file:
        return text_of({name: file.get_tensor(name) for name in TEXT_TENSORS}, manifest)


def text_of(tensors: Mapping[str, Tensor], manifest: dict[str, Any]) -> TokenizedText:
    """The contexts from the tensors of their file."""
    limits = manifest["norm_limits"]
    return TokenizedText(
        tokens=tensors["tokens"],
        dropped=tensors["dropped"],
        role_ids=tensors["role_ids"],
        source_ids=tensors["source_ids"],
        sources=tuple(manifest["sources"]),
        context_ids=torch.arange(len(tensors["tokens"])),
        norm_limits=None if limits is None else tuple(limits),
    )
