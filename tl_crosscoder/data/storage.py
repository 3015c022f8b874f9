"""How rows stand on disk: a float format as it is, or int8 with one scale for each row and site.

Contract: `decode(encode(rows))` is `rows` up to what `store` rounds; both keep the shape of rows.
int8 rounds each value to 1/127 of the largest of its row and site, an error of at most half that.
Limit: values beyond a float16's range (65,504) are refused there, since they would be infinite.

The manifest of an activation cache, its shards, and whether they are what it says.

Limit: a manifest of another `FORMAT` is refused, not converted.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from tl_crosscoder import files
from tl_crosscoder.config.models import StoreDtype
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.site import Site, row_shape

Stored = Mapping[str, Tensor]
"""`rows`, and for int8 `scales`, `[n, n_sites]` in float32."""


def encode(rows: Float[Tensor, "n *row"], sites: Sequence[Site], store: StoreDtype) -> Stored:
    """Rows as they are stored. Raises ValueError for values that float16 cannot hold."""
    if store != "int8":
        stored = rows.to(getattr(torch, store))
        if store == "float16" and not bool(stored.isfinite().all()):
            raise ValueError(
                f"an activation of {rows.abs().max().item():,.0f} does not fit in float16. Store "
                "bfloat16 (--store bfloat16)."
            )
        return {"rows": stored}
    widths = _widths(sites)
    largest = [part.abs().amax(dim=1) for part in rows.flatten(1).split(widths, dim=1)]
    scales = torch.stack(largest, dim=1) / 127
    factors = torch.where(scales > 0, 1 / scales, 0.0)
    return {"rows": (rows * _spread(factors, sites)).round().to(torch.int8), "scales": scales}


def decode(stored: Stored, sites: Sequence[Site]) -> Float[Tensor, "n *row"]:
    """Rows in float32."""
    rows = stored["rows"]
    if rows.dtype != torch.int8:
        return rows.float()
    return rows.float().mul_(_spread(stored["scales"], sites))


def bytes_per_row(sites: Sequence[Site], store: StoreDtype) -> int:
    """Of one token in all sites, positions and masks left out."""
    d_in = sum(_widths(sites))
    if store == "int8":
        return d_in + 4 * len(sites)
    return d_in * getattr(torch, store).itemsize


def select(stored: Stored, index: Tensor) -> Stored:
    """Some of the rows; twice as fast in words of eight bytes as in two."""
    return {name: _selected(tensor, index) for name, tensor in stored.items()}


def _selected(tensor: Tensor, index: Tensor) -> Tensor:
    flat = tensor.flatten(1)
    if flat.shape[1] * flat.itemsize % 8 == 0 and flat.storage_offset() * flat.itemsize % 8 == 0:
        chosen = flat.view(torch.int64).index_select(0, index).view(flat.dtype)
    else:
        chosen = flat.index_select(0, index)
    return chosen.view(len(index), *tensor.shape[1:])


def _widths(sites: Sequence[Site]) -> list[int]:
    return [site.d_model for site in sites]


def _spread(scales: Float[Tensor, "n n_sites"], sites: Sequence[Site]) -> Float[Tensor, "n ..."]:
    """One factor for each site, shaped to multiply rows."""
    if len(row_shape(sites)) == 2:
        return scales[:, :, None]
    return scales.repeat_interleave(torch.tensor(_widths(sites), device=scales.device), dim=1)


MANIFEST = "manifest.json"
TEXT = "text.safetensors"
MEANS = "means.safetensors"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a cache."""

    name: str
    first_context: int
    n_contexts: int
    n_rows: int
    n_bytes: int
    sha256: str


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache; FileNotFoundError or ValueError where there is none of ours."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no activation cache: it has no {MANIFEST}. Give a folder that "
            "`tl-crosscoder harvest` wrote."
        )
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {manifest.get('format')!r}; this version reads {FORMAT}. Harvest "
            "again."
        )
    return manifest


def shards_of(manifest: dict[str, Any]) -> list[Shard]:
    """The complete shards, in their order."""
    return [Shard(**s) for s in manifest["shards"]]


def check_shards(
    folder: Path, manifest: dict[str, Any], *, verify: bool, show_progress: bool = False
) -> None:
    """Refuse, by name, a shard that is missing, of another cache, or damaged.

    Raises:
        FileNotFoundError, ValueError: with the shard, and what to do.
    """
    advice = f"Delete {folder} and harvest again, or restore this file."
    bar = tqdm(
        shards_of(manifest), desc="Verifying", unit="shard", disable=None if show_progress else True
    )
    for shard in bar:
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


def load_text(path: Path, manifest: dict[str, Any]) -> TokenizedText:
    """The contexts of a cache, as they were given."""
    if not path.is_file() or files.sha256(path) != manifest["text_sha256"]:
        raise ValueError(f"{path} is missing or damaged. Harvest again.")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    limits = manifest["norm_limits"]
    return TokenizedText(
        **tensors,
        sources=tuple(manifest["sources"]),
        context_ids=torch.arange(len(tensors["tokens"])),
        norm_limits=None if limits is None else tuple(limits),
    )
