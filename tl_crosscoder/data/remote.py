"""A cache of activations elsewhere: `s3://`, `gs://`, `hf://`, and whatever else `fsspec` opens.

    tl-crosscoder train batchtopk --cache s3://bucket/cache --output run

Contract: the rows of a context stand side by side in its shard, so that a buffer of contexts is a
few hundred ranges of bytes, which `fsspec` asks for together. Nothing is kept on the disk, memory
is that of a buffer, and batches are those of the same cache in a folder. Limits: read only; the
package of a file system (s3fs, gcsfs) is its own.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from jaxtyping import Int, Shaped
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.data import storage
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.progress import progress

HEAD = 4096
"""Bytes of a shard that are read first; its header is shorter."""


def is_remote(path: str | Path) -> bool:
    """Whether a name is an address, and not a path."""
    return "://" in str(path)


class RemoteCache:
    """The files of a cache at an address.

    Raises:
        ValueError: no such file system, or its package is not installed.
        FileNotFoundError: no cache there.
    """

    def __init__(self, address: str) -> None:
        try:
            self._fs, self._root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{address} cannot be opened: {error}") from error
        self.address = address
        self.manifest = storage.checked_manifest(self._manifest(), address)
        self._starts = torch.tensor([s.n_rows for s in storage.shards_of(self.manifest)])
        self._starts = self._starts.cumsum(0) - self._starts

    def _manifest(self) -> dict[str, Any]:
        try:
            content = self._fs.cat_file(self._path(storage.MANIFEST))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self.address} is not an activation cache: it has no {storage.MANIFEST}. Give "
                "the address of what `tl-crosscoder harvest` wrote."
            ) from None
        where = self._path(storage.MANIFEST)
        try:
            parsed = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({error}): upload it again.") from error
        return files.checked_object(parsed, where)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def check(self, *, verify: bool, show_progress: bool) -> None:
        """Refuse shards that are missing, of another cache, or, where asked for, damaged.

        Raises:
            FileNotFoundError, ValueError: with the shard and the next step.
        """
        advice = "Upload it again."
        shards = storage.shards_of(self.manifest)
        for shard in shards:
            path, size = self._path(shard.name), self._sizes.get(shard.name)
            if size is None:
                raise FileNotFoundError(f"shard {path} is missing. {advice}")
            if size != shard.n_bytes:
                raise ValueError(
                    f"shard {path} is damaged: it has {size:,} bytes in place of "
                    f"{shard.n_bytes:,}. {advice}"
                )
        for shard in progress(shards, desc="Verifying", unit="shard", show=show_progress):
            path, owner = self._path(shard.name), self._headers[shard.name].owner
            if owner != self.manifest["cache_id"]:
                raise ValueError(f"shard {path} belongs to another cache ({owner}). {advice}")
            if verify and self._sha256(path) != shard.sha256:
                raise ValueError(
                    f"shard {path} is damaged: its sha256 is not the manifest's. {advice}"
                )

    def _sha256(self, path: str) -> str:
        digest = hashlib.sha256()
        with self._fs.open(path, "rb") as file:
            while chunk := file.read(2**22):
                digest.update(chunk)
        return digest.hexdigest()

    @cached_property
    def _sizes(self) -> dict[str, int]:
        listed = self._fs.find(self._path("shards"), detail=True)
        return {f"shards/{name.rsplit('/', 1)[-1]}": info["size"] for name, info in listed.items()}

    @cached_property
    def _headers(self) -> "dict[str, _Header]":
        """What each shard says of its tensors: one question to the server for all."""
        names = [s.name for s in storage.shards_of(self.manifest)]
        heads = self._ranges(names, [0] * len(names), [HEAD] * len(names))
        return {
            name: _Header.of(head, where=self._path(name))
            for name, head in zip(names, heads, strict=True)
        }

    def _ranges(
        self, names: Sequence[str], starts: Sequence[int], ends: Sequence[int]
    ) -> list[bytes]:
        paths = [self._path(name) for name in names]
        return self._fs.cat_ranges(paths, [*starts], [*ends], on_error="raise")

    def text(self) -> TokenizedText:
        """The contexts, masked as they were before the models ran. Raises ValueError if damaged."""
        content = self._fs.cat_file(self._path(storage.TEXT))
        if hashlib.sha256(content).hexdigest() != self.manifest["text_sha256"]:
            raise ValueError(f"{self._path(storage.TEXT)} is damaged. Upload it again.")
        return storage.text_of(load(content), self.manifest)

    def dropped(self) -> Tensor:
        """Why each token was dropped, after the models ran."""
        names = [s.name for s in storage.shards_of(self.manifest)]
        placed = [self._headers[name].tensors["dropped"] for name in names]
        parts = self._ranges(names, [p.start for p in placed], [p.end for p in placed])
        return torch.cat(
            [_tensor([part], p, len_=p.shape[0]) for part, p in zip(parts, placed, strict=True)]
        )

    def rows(self, index: Int[Tensor, " n"]) -> storage.StoredTensors:
        """Rows by number, in any order: neighbours are one range."""
        if not len(index):
            first = self._headers[storage.shard_name(0)].tensors
            return {name: _tensor([], first[name], len_=0) for name in self._stored}
        wanted, inverse = index.unique(return_inverse=True)
        shards = torch.searchsorted(self._starts, wanted, right=True) - 1
        begins = torch.ones_like(wanted, dtype=torch.bool)
        begins[1:] = (wanted[1:] != wanted[:-1] + 1) | (shards[1:] != shards[:-1])
        first = begins.nonzero().squeeze(1)
        lengths = torch.cat([first[1:], torch.tensor([len(wanted)])]) - first
        local = (wanted - self._starts[shards])[first].tolist()
        names = [storage.shard_name(i) for i in shards[first].tolist()]
        out = {}
        for name in self._stored:
            placed = [self._headers[shard].tensors[name] for shard in names]
            starts = [p.start + a * p.row_bytes for p, a in zip(placed, local, strict=True)]
            each = zip(starts, lengths.tolist(), placed, strict=True)
            ends = [start + n * p.row_bytes for start, n, p in each]
            parts = self._ranges(names, starts, ends)
            out[name] = _tensor(parts, placed[0], len_=len(wanted))[inverse]
        return out

    @property
    def _stored(self) -> tuple[str, ...]:
        return storage.stored_names(self.manifest)


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """Where a tensor stands in its file."""

    start: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return (self.end - self.start) // max(1, self.shape[0])


_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8,
    "U8": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The first bytes of a safetensors file, as its format lays them down."""

    owner: str | None
    tensors: Mapping[str, _Placed]

    @classmethod
    def of(cls, head: bytes, *, where: str) -> "_Header":
        n = int.from_bytes(head[:8], "little")
        try:
            if n > len(head) - 8:
                raise SafetensorError(f"a header of {n:,} bytes")
            content = json.loads(head[8 : 8 + n])
            owner = content.pop("__metadata__", {}).get("cache")
            tensors = {
                name: _Placed(
                    start=8 + n + entry["data_offsets"][0],
                    end=8 + n + entry["data_offsets"][1],
                    shape=tuple(entry["shape"]),
                    dtype=_DTYPES[entry["dtype"]],
                )
                for name, entry in content.items()
                if entry["dtype"] in _DTYPES
            }
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ValueError(f"shard {where} is damaged ({error}). Upload it again.") from error
        return cls(owner=owner, tensors=tensors)


def _tensor(parts: Sequence[bytes], placed: _Placed, *, len_: int) -> Shaped[Tensor, "n *row"]:
    content = np.frombuffer(bytearray().join(parts), dtype=np.uint8)
    return torch.from_numpy(content).view(placed.dtype).view(len_, *placed.shape[1:])
