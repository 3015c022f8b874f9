"""What a harvest is about to write, and whether it may: its identity, its size, its folder.

Contract: two harvests of one `cache_id` write the same rows; a folder of another is never touched.

`write_cache`: run models over a text once and keep the activations on disk.

Contract: what the manifest names is complete; a harvest that stops, however it stops, goes on at
the shard where it was. Statistics and the error of the number format are measured on the way.
Limit: one process; rows of one shard are in memory.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from tl_crosscoder import files
from tl_crosscoder.config.models import StoreDtype
from tl_crosscoder.data import storage
from tl_crosscoder.data import storage as manifests
from tl_crosscoder.data.cache import ActivationCache
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.data.harvest import N_LIMIT_CONTEXTS, batches_of, harvest_rows, within_limits
from tl_crosscoder.data.statistics import SINK_MULTIPLE, StatisticsSums
from tl_crosscoder.data.storage import Shard
from tl_crosscoder.data.tokens import REASONS, TokenizedText
from tl_crosscoder.models.site import site_parts, subtracted_sites
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.models.tokenizer import tokenizer_sha256


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """What a cache takes on disk."""

    n_rows: int
    bytes_per_row: int
    n_bytes: int

    @classmethod
    def of(cls, source: ActivationSource, text: TokenizedText, store: StoreDtype) -> "CacheSize":
        """Before it is written: rows, and what is kept of every position."""
        n_rows, per_row = text.n_tokens, storage.bytes_per_row(source.sites, store)
        return cls(
            n_rows=n_rows,
            bytes_per_row=per_row,
            n_bytes=n_rows * per_row + 8 * text.tokens.numel(),
        )

    def __str__(self) -> str:
        return (
            f"{self.n_rows:,} tokens x {self.bytes_per_row:,} bytes = {self.n_bytes / 1e9:,.3f} GB"
        )


def check_cache_folder(output: Path, *, resume: bool) -> None:
    """Refuse a folder that a harvest may not write to. Raises ValueError."""
    files.check_folder(output, manifests.MANIFEST, what="cache", resume=resume)


def sink_limits_of(source: ActivationSource, text: TokenizedText, batch_size: int) -> list[float]:
    """Norm from which a token is a sink, for each site; the median is that of first contexts."""
    parts = harvest_rows(source, text[:N_LIMIT_CONTEXTS], batch_size=batch_size)
    sample = site_parts(torch.cat([*parts]), source.sites)
    return [SINK_MULTIPLE * part.norm(dim=1).median().item() for part in sample]


def planned_manifest(
    source: ActivationSource,
    text: TokenizedText,
    *,
    n_training: int,
    store: StoreDtype,
    shard_tokens: int,
    sink_limits: list[float],
    made_with: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The manifest of a harvest that has not begun; `cache_id` is of all that decides its rows."""
    per_context = max(1.0, text.n_tokens / len(text))
    shard_contexts = max(1, round(shard_tokens / per_context))
    planned = {
        "format": manifests.FORMAT,
        "sites": [site.to_dict() for site in source.sites],
        "weight_processing": source.weight_processing,
        "tokenizer_sha256": tokenizer_sha256(source.tokenizer),
        "store": store,
        "n_contexts": len(text),
        "n_training_contexts": n_training,
        "context_size": text.context_size,
        "tokens_sha256": hashlib.sha256(
            text.tokens.numpy().tobytes() + text.dropped.numpy().tobytes()
        ).hexdigest(),
        "sources": list(text.sources),
        "roles": list(ROLES),
        "norm_limits": None if text.norm_limits is None else list(text.norm_limits),
        "sink_limits": sink_limits,
        "shard_contexts": shard_contexts,
    }
    planned["cache_id"] = hashlib.sha256(json.dumps(planned).encode()).hexdigest()[:16]
    return planned | {
        "made_with": dict(made_with or {}),
        "n_shards": math.ceil(len(text) / shard_contexts),
        "is_complete": False,
        "shards": [],
    }


def claimed(output: Path, planned: dict[str, Any]) -> dict[str, Any]:
    """The manifest to go on with: the one in the folder, if it is of the same harvest."""
    if not (output / manifests.MANIFEST).is_file():
        output.mkdir(parents=True, exist_ok=True)
        files.write_json(output / manifests.MANIFEST, planned)
        return planned
    there = manifests.read_manifest(output)
    if there["cache_id"] != planned["cache_id"]:
        identity = [
            k for k in planned if k not in ("made_with", "shards", "is_complete", "cache_id")
        ]
        of_both = ({k: m[k] for k in identity} for m in (there, planned))
        differing = sorted(files.differences(*of_both))
        raise ValueError(
            f"{output} holds another cache: {', '.join(differing)}. Resume with the same settings, "
            "or choose another output folder."
        )
    manifests.check_shards(output, there, verify=True)
    for leftover in (output / "shards").glob(".*"):  # of a killed process
        leftover.unlink()
    return there


def check_room(output: Path, size: CacheSize, *, share: float) -> None:
    """Refuse a disk without room for the share that is left to write. Raises ValueError."""
    needed, free = round(share * size.n_bytes), files.free_bytes(output)
    if needed > free:
        raise ValueError(
            f"the cache needs {needed / 1e9:,.3f} GB ({size}), but the disk of {output} has only "
            f"{free / 1e9:,.3f} GB free. Make room, harvest fewer tokens (n_tokens), or store int8."
        )


_SUMS = "sums."


def write_cache(
    source: ActivationSource,
    training: TokenizedText,
    held_out: TokenizedText,
    output: str | Path,
    *,
    store: StoreDtype = "bfloat16",
    shard_tokens: int = 65_536,
    batch_size: int = 32,
    made_with: Mapping[str, Any] | None = None,
    resume: bool = False,
    show_progress: bool = True,
) -> ActivationCache:
    """Harvest both texts into `output`.

    Args:
        source: the models.
        training: contexts to train on.
        held_out: contexts to measure on.
        output: folder, new or empty, or with `resume` what is there of the same harvest.
        store: number format on disk.
        shard_tokens: tokens a shard, about.
        batch_size: contexts a forward pass.
        made_with: settings to record, as plain JSON.
        resume: go on where a harvest stopped.
        show_progress: print the size and show a progress bar.

    Raises:
        ValueError: a folder that holds something else, another harvest, or a damaged shard; too
            little room on the disk, before anything is written or when it runs out: what is there
            stays, and `resume` goes on.
    """
    output = Path(output)
    check_cache_folder(output, resume=resume)
    text = _joined(training, held_out)
    limits = sink_limits_of(source, text, batch_size)
    manifest = planned_manifest(
        source,
        text,
        n_training=len(training),
        store=store,
        shard_tokens=shard_tokens,
        sink_limits=limits,
        made_with=made_with,
    )
    manifest = claimed(output, manifest)
    size = CacheSize.of(source, text, store)
    n_left = manifest["n_shards"] - len(manifest["shards"])
    check_room(output, size, share=n_left / manifest["n_shards"])
    if show_progress and n_left:
        tqdm.write(f"Activations: {size} in {output}")
    try:
        if not (output / manifests.TEXT).is_file():
            files.write_tensors(output / manifests.TEXT, _tensors_of(text))
        manifest["text_sha256"] = files.sha256(output / manifests.TEXT)
        _write_shards(source, text, output, manifest, batch_size, show_progress=show_progress)
        _finish(source, output, manifest)
    except OSError as error:
        if not files.is_disk_full(error):
            raise
        raise ValueError(
            f"the disk of {output} is full after {len(manifest['shards'])} of "
            f"{manifest['n_shards']} shards ({error}). What is there is kept: make room, and "
            "continue with resume (--resume)."
        ) from error
    return ActivationCache(output, verify=False)


def _joined(training: TokenizedText, held_out: TokenizedText) -> TokenizedText:
    """Both texts as one; the sources of both."""
    if training.context_size != held_out.context_size:
        raise ValueError(
            f"training text has contexts of {training.context_size} tokens, held-out text of "
            f"{held_out.context_size}; both need the same."
        )
    sources = tuple(dict.fromkeys((*training.sources, *held_out.sources)))
    place = torch.tensor([sources.index(s) for s in held_out.sources], dtype=torch.uint8)
    parts = (training, replace(held_out, source_ids=place[held_out.source_ids.long()]))
    names = ("tokens", "dropped", "role_ids", "source_ids")
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    n = len(training) + len(held_out)
    return replace(training, **joined, sources=sources, context_ids=torch.arange(n))


def _write_shards(
    source: ActivationSource,
    text: TokenizedText,
    output: Path,
    manifest: dict[str, Any],
    batch_size: int,
    *,
    show_progress: bool,
) -> None:
    size, n_done = manifest["shard_contexts"], len(manifest["shards"])
    bar = tqdm(
        total=len(text) * text.context_size,
        initial=n_done * size * text.context_size,
        desc="Harvesting",
        unit="tok",
        unit_scale=True,
        disable=None if show_progress else True,
    )
    with bar:
        for i in range(n_done, manifest["n_shards"]):
            part = text[i * size : (i + 1) * size]
            stored = _shard(source, part, manifest, batch_size, bar)
            path = output / f"shards/{i:05d}.safetensors"
            # One key: safetensors writes several in any order, and files would differ.
            files.write_tensors(path, stored, metadata={"cache": manifest["cache_id"]})
            shard = Shard(
                name=str(path.relative_to(output).as_posix()),
                first_context=i * size,
                n_contexts=len(part),
                n_rows=len(stored["rows"]),
                n_bytes=path.stat().st_size,
                sha256=files.sha256(path),
            )
            manifest["shards"].append(asdict(shard))
            files.write_json(output / manifests.MANIFEST, manifest)


def _shard(
    source: ActivationSource,
    text: TokenizedText,
    manifest: dict[str, Any],
    batch_size: int,
    bar: Any,
) -> dict[str, Tensor]:
    """Rows, final masks and sums of some contexts."""
    stored, positions, sums = [], [], None
    dropped = text.dropped.clone()
    for index, rows, part in _every_token(source, text, batch_size):
        encoded, own = _encoded(rows, part, source, manifest)
        stored.append({k: v.cpu() for k, v in encoded.items()})
        sums = own if sums is None else sums + own
        dropped[index, : part.context_size] = part.dropped
        starts = index[:, None] * text.context_size + torch.arange(part.context_size)
        positions.append(starts[part.mask])
        bar.update(rows.shape[0])
    assert sums is not None
    # Contexts of unequal length ran by length; they are stored in the order of the text.
    order = torch.cat(positions).argsort(stable=True)
    is_sorted = bool((order.diff() == 1).all())
    tensors = {name: torch.cat([part[name] for part in stored]) for name in stored[0]}
    if not is_sorted:
        tensors = {name: tensor[order] for name, tensor in tensors.items()}
    return tensors | {"dropped": dropped} | {_SUMS + k: v for k, v in sums.sums.items()}


def _every_token(
    source: ActivationSource, text: TokenizedText, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, TokenizedText]]:
    """Activations of all tokens but padding, and the contexts with their final mask."""
    padding = REASONS.index("padding")
    for index, part in batches_of(text, batch_size):
        every = replace(part, dropped=torch.where(part.dropped == padding, padding, 0).byte())
        rows = source.rows(every)
        if part.norm_limits is not None:
            keep = torch.zeros(part.mask.shape, dtype=torch.bool)
            keep[every.mask] = within_limits(rows, source.sites, part.norm_limits).cpu()
            is_sink = part.mask & ~keep
            part = replace(part, dropped=part.dropped.masked_fill(is_sink, REASONS.index("norm")))
        yield index, rows, part


def _encoded(
    rows: Float[Tensor, "tokens *row"],
    text: TokenizedText,
    source: ActivationSource,
    manifest: dict[str, Any],
) -> tuple[storage.Stored, StatisticsSums]:
    sums = StatisticsSums.of(
        rows,
        text,
        source.sites,
        sink_limits=manifest["sink_limits"],
        n_positions=manifest["context_size"],
    )
    is_token = text.dropped != REASONS.index("padding")
    own = rows[text.mask[is_token].to(rows.device)]
    encoded = storage.encode(own, source.sites, manifest["store"])
    error = _storage_error(own, storage.decode(encoded, source.sites), source)
    return encoded, StatisticsSums({**sums.sums, **error})


def _storage_error(
    rows: Tensor, decoded: Tensor, source: ActivationSource
) -> dict[str, Float[Tensor, " n"]]:
    """Summed squared error of the number format, and of what it stores: each site, difference."""
    parts = [site_parts(x, source.sites) for x in (rows, decoded)]
    pair = subtracted_sites(source.sites)
    values = [[*p, *([p[pair[1]] - p[pair[0]]] if pair else [])] for p in parts]
    error = [(x - y).square().sum().double().cpu() for x, y in zip(*values, strict=True)]
    total = [x.square().sum().double().cpu() for x in values[0]]
    return {"storage_error": torch.stack(error), "storage_total": torch.stack(total)}


def _finish(source: ActivationSource, output: Path, manifest: dict[str, Any]) -> None:
    """Add up the shards' statistics and declare the cache complete."""
    if manifest["is_complete"]:
        return
    sums: StatisticsSums | None = None
    masks = torch.zeros(len(REASONS), dtype=torch.int64)
    for shard in manifests.shards_of(manifest):
        with safe_open(output / shard.name, "pt") as file:
            names = [n for n in file.keys() if n.startswith(_SUMS)]  # noqa: SIM118
            own = StatisticsSums({n.removeprefix(_SUMS): file.get_tensor(n) for n in names})
            masks += file.get_tensor("dropped").flatten().bincount(minlength=len(REASONS))
        sums = own if sums is None else sums + own
    assert sums is not None
    files.write_tensors(output / manifests.MEANS, sums.means(source.sites))
    manifest["mask_counts"] = dict(zip(REASONS, masks.tolist(), strict=True))
    manifest["statistics"] = sums.result(source.sites)
    error = sums.sums["storage_error"] / sums.sums["storage_total"].clamp_min(1e-30)
    names = [site.name for site in source.sites]
    names += ["difference"] if len(error) > len(names) else []
    manifest["storage_error"] = dict(zip(names, error.tolist(), strict=True))
    manifest["is_complete"] = True
    files.write_json(output / manifests.MANIFEST, manifest)


def _tensors_of(text: TokenizedText) -> dict[str, Tensor]:
    names = ("tokens", "dropped", "role_ids", "source_ids")
    return {name: getattr(text, name) for name in names}
