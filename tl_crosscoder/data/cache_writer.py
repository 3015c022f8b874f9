"""`write_cache`: run models over a text once and keep the activations on disk.

What the manifest names is complete: a harvest that stops, however it stops, resumes at its shard,
and two harvests of one `cache_id` write the same bytes, by however many processes. Statistics of
the sites and the error of the number format are measured on the way. Several processes, started by
`torchrun` or by `--workers`, write a shard each and then record all. Limit: the rows of one shard
are in memory.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.config.training import HarvestConfig, StoreDtype
from tl_crosscoder.data import storage
from tl_crosscoder.data.cache import ActivationCache
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.data.harvest import (
    SINK_MULTIPLE,
    Harvested,
    batches_of,
    finite_rows,
    has_row,
    is_finite,
    median_norms,
    site_statistics,
    site_sums,
    sites_and_difference,
    within_limits,
    without,
)
from tl_crosscoder.data.text import check_text, text_of_harvest
from tl_crosscoder.data.tokens import DROP_REASONS, TokenizedText
from tl_crosscoder.locks import locked
from tl_crosscoder.mesh import Mesh, mesh_of
from tl_crosscoder.models.checks import folder_hashes
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.site import sites_of
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.models.tokenizer import tokenizer_sha256
from tl_crosscoder.progress import note, progress, silenced

_PADDING = DROP_REASONS.index("padding")
_SUMS = "sums."


def run_harvest(config: HarvestConfig, *, resume: bool = False) -> ActivationCache:
    """Load the models of `config`, read its text and harvest into `config.output`.

    Raises:
        ValueError, FileNotFoundError: bad input or too small a disk, before any long work; nothing
            is overwritten.
    """
    with mesh_of(None, 1, device=config.device) as found:
        mesh = found or Mesh()
        with silenced(not mesh.is_first):
            return _harvested(config, mesh, resume=resume)


def _harvested(config: HarvestConfig, mesh: Mesh, *, resume: bool) -> ActivationCache:
    output = files.user_path(config.output)
    mesh.by_first(lambda: storage.check_output(output, resume=resume))
    with locked(output) if mesh.is_first else nullcontext():  # loading the models takes long, too
        sites_of(config)
        check_text(config)
        source = ModelPair.from_config(config)
        text = text_of_harvest(config, source)
        note(f"Text: {text.describe()}")
        return write_cache(
            source,
            text.training,
            text.held_out,
            output,
            store=config.store,
            shard_tokens=config.shard_tokens,
            batch_size=config.harvest_batch_size,
            made_with=asdict(config),
            resume=resume,
            mesh=mesh,
        )


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
    mesh: Mesh | None = None,
) -> ActivationCache:
    """Harvest both texts into `output`.

    Args:
        source: the models.
        training: contexts to train on.
        held_out: contexts to measure on.
        output: folder, new or empty, or with `resume` one that holds a part of the same harvest.
        store: number format on disk.
        shard_tokens: tokens a shard, about.
        batch_size: contexts a forward pass.
        made_with: settings to record, as plain JSON.
        resume: continue where a harvest stopped.
        show_progress: print the size and show a progress bar.
        mesh: processes that write the shards in turns; the first one records them.

    Raises:
        ValueError: a folder that holds something else, another harvest, or a damaged shard, or that
            another process writes to; too little space on the disk, before anything is written or
            when it runs out. Complete shards stay, and `resume` continues after them.
    """
    output, text, mesh = files.user_path(output), _joined(training, held_out), mesh or Mesh()
    identity = _identity(source, text, len(training), store=store, shard_tokens=shard_tokens)
    with locked(output) if mesh.is_first else nullcontext():
        mesh.by_first(lambda: storage.check_output(output, resume=resume))
        # The statistics of a shard depend on them, so they are measured before the first one.
        medians = median_norms(source, text, batch_size=batch_size)
        identity["sink_limits"] = [SINK_MULTIPLE * median for median in medians]
        made_with = {**(made_with or {}), "tokenizer": source.tokenizer_name}
        manifest = mesh.by_first(lambda: storage.claim(output, identity, made_with=made_with))
        n_left = manifest["n_shards"] - len(manifest["shards"])
        size = _check_space(source, text, output, store, share=n_left / manifest["n_shards"])
        if show_progress and n_left:
            note(f"Activations: {size} in {output}")
        try:
            how = {"manifest": manifest, "batch_size": batch_size, "mesh": mesh}
            writer = _Writer(source, text, output, **how)
            writer.write(show_progress=show_progress)
        except OSError as error:
            if not files.is_disk_full(error):
                raise
            raise ValueError(
                f"the disk of {output} is full after {len(manifest['shards'])} of "
                f"{manifest['n_shards']} shards ({error}). Complete shards are kept: free some "
                "space, and continue with resume (--resume)."
            ) from error
    return ActivationCache(output, verify=False)


# --- before it starts -----------------------------------------------------------------------------


def _joined(training: TokenizedText, held_out: TokenizedText) -> TokenizedText:
    """Both texts as one, with the sources of both."""
    if training.context_size != held_out.context_size:
        raise ValueError(
            f"training text has contexts of {training.context_size} tokens, held-out text of "
            f"{held_out.context_size}; both need the same."
        )
    sources = tuple(dict.fromkeys((*training.sources, *held_out.sources)))
    place = torch.tensor([sources.index(s) for s in held_out.sources], dtype=torch.uint8)
    parts = (training, replace(held_out, source_ids=place[held_out.source_ids.long()]))
    joined = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in storage.TEXT_TENSORS
    }
    n = len(training) + len(held_out)
    return replace(training, **joined, sources=sources, context_ids=torch.arange(n))


def _identity(
    source: ActivationSource,
    text: TokenizedText,
    n_training: int,
    *,
    store: StoreDtype,
    shard_tokens: int,
) -> dict[str, Any]:
    """All that decides which rows a cache holds, and in which shards; `cache_id` is its hash."""
    per_context = max(1.0, text.n_tokens / len(text))
    tokens = text.tokens.numpy().tobytes() + text.dropped.numpy().tobytes()
    hashes = folder_hashes(source.sites)
    return {
        "format": storage.FORMAT,
        "sites": [site.to_dict() for site in source.sites],
        "weight_processing": source.weight_processing,
        "tokenizer_sha256": tokenizer_sha256(source.tokenizer),
        "store": store,
        "n_contexts": len(text),
        "n_training_contexts": n_training,
        "context_size": text.context_size,
        "tokens_sha256": hashlib.sha256(tokens).hexdigest(),
        "sources": list(text.sources),
        "roles": list(ROLES),
        "norm_limits": None if text.norm_limits is None else list(text.norm_limits),
        "shard_contexts": max(1, round(shard_tokens / per_context)),
        **({"model_sha256": hashes} if hashes else {}),
    }


def _check_space(
    source: ActivationSource,
    text: TokenizedText,
    output: Path,
    store: StoreDtype,
    *,
    share: float,
) -> str:
    """Refuse a disk without space for the share that is left to write; the size in words."""
    per_row = storage.bytes_per_row(source.sites, store)
    # Token id, role, source and two masks of every position, dropped ones included.
    n_bytes = text.n_tokens * per_row + 8 * text.tokens.numel()
    size = f"{text.n_tokens:,} tokens x {per_row:,} bytes = {n_bytes / 1e9:,.3f} GB"
    needed, free = share * n_bytes, files.free_bytes(output)
    if needed > free:
        raise ValueError(
            f"the cache needs {needed / 1e9:,.3f} GB ({size}), but the disk of {output} has only "
            f"{free / 1e9:,.3f} GB free. Free some space, harvest fewer tokens (n_tokens), or "
            "store int8."
        )
    return size


class _Writer:
    """Writes the shards that a manifest does not name yet, and completes the manifest."""

    def __init__(
        self,
        source: ActivationSource,
        text: TokenizedText,
        output: Path,
        *,
        manifest: dict[str, Any],
        batch_size: int,
        mesh: Mesh,
    ) -> None:
        self.source, self.text, self.output = source, text, output
        self.manifest, self.batch_size, self.mesh = manifest, batch_size, mesh

    def write(self, *, show_progress: bool) -> None:
        text, manifest = self.text, self.manifest
        manifest["text_sha256"] = self.mesh.by_first(self._write_text)
        size, n_done = manifest["shard_contexts"], len(manifest["shards"])
        bar = progress(
            total=len(text) * text.context_size,
            initial=n_done * size * text.context_size,
            desc="Harvesting",
            unit="tok",
            unit_scale=True,
            show=show_progress,
        )
        with bar:
            for first in range(n_done, manifest["n_shards"], self.mesh.world.size):
                i = first + self.mesh.world.index
                own = text[i * size : (i + 1) * size]
                shard = self._write_shard(i, own, bar) if len(own) else None
                self._record([one for one in self.mesh.gathered_values(shard) if one])
        if not manifest["is_complete"]:
            manifest |= self.mesh.by_first(self._measured) | {"is_complete": True}
            self.mesh.by_first(self._write_manifest)

    def _write_text(self) -> str:
        path = self.output / storage.TEXT
        if not path.is_file():
            files.write_tensors(path, {n: getattr(self.text, n) for n in storage.TEXT_TENSORS})
        return files.sha256(path)

    def _record(self, shards: list[storage.Shard]) -> None:
        """Name shards that are complete, one by each process, in the manifest."""
        self.manifest["shards"] += map(asdict, shards)
        self.mesh.by_first(self._write_manifest)

    def _write_manifest(self) -> None:
        files.write_json(self.output / storage.MANIFEST, self.manifest)

    def _write_shard(self, i: int, text: TokenizedText, bar: Any) -> storage.Shard:
        path = self.output / storage.shard_name(i)
        tensors = self._tensors(text, bar)
        # One key: safetensors writes several in any order, and files would differ.
        files.write_tensors(path, tensors, metadata={"cache": self.manifest["cache_id"]})
        return storage.Shard(
            name=path.relative_to(self.output).as_posix(),
            n_contexts=len(text),
            n_rows=len(tensors["rows"]),
            n_bytes=path.stat().st_size,
            sha256=files.sha256(path),
        )

    def _tensors(self, text: TokenizedText, bar: Any) -> dict[str, Tensor]:
        """Rows, final masks and sums of some contexts."""
        sites, limits = self.source.sites, self.manifest["sink_limits"]
        stored, positions, sums = [], [], {}
        dropped = text.dropped.clone()
        for index, part, every in self._batches(text):
            rows = every[part.mask[has_row(part)].to(every.device)]
            encoded = storage.encode(rows, sites, self.manifest["store"])
            stored.append({name: tensor.cpu() for name, tensor in encoded.items()})
            batch = Harvested(index=index, text=part, rows=rows)
            positions.append(batch.positions(text.context_size))
            dropped[index, : part.context_size] = part.dropped
            n_positions = text.context_size
            own = site_sums(every, part, sites, sink_limits=limits, n_positions=n_positions)
            # The difference is small beside the activations: there rounding matters most.
            error = sites_and_difference(rows - storage.decode(encoded, sites), sites)
            own["storage_error"] = torch.stack([x.square().sum().double().cpu() for x in error])
            sums = {name: value + sums.get(name, 0) for name, value in own.items()}
            bar.update(len(every) * self.mesh.world.size)
        # Contexts of unequal length ran by length; they are stored in the order of the text.
        order = torch.cat(positions).argsort(stable=True)
        is_sorted = bool((order.diff() == 1).all())
        tensors = {name: torch.cat([part[name] for part in stored]) for name in stored[0]}
        if not is_sorted:
            tensors = {name: tensor[order] for name, tensor in tensors.items()}
        return tensors | {"dropped": dropped} | {_SUMS + k: v for k, v in sums.items()}

    def _batches(self, text: TokenizedText) -> Iterator[tuple[Tensor, TokenizedText, Tensor]]:
        """Index and final mask of contexts, and the activations of all tokens that `has_row`.

        Dropped tokens are in the statistics by position, which are there to show BOS and sinks.
        """
        for index, part in batches_of(text, self.batch_size):
            every = replace(part, dropped=torch.where(part.dropped == _PADDING, _PADDING, 0).byte())
            rows = self.source.rows(every)
            if (keep := is_finite(rows)) is not None:
                # Refused among the kept tokens alone; a dropped BOS is only left out of statistics.
                finite_rows(self.source, part, rows[part.mask[every.mask].to(rows.device)])
                every, rows = without(every, keep, reason="nonfinite"), rows[keep]
                dropped = torch.where(has_row(every), part.dropped, every.dropped)
                part = replace(part, dropped=dropped)
            if part.norm_limits is not None:
                keep = within_limits(rows, self.source.sites, part.norm_limits).cpu()
                part = without(part, keep[part.mask[every.mask]], reason="norm")
            yield index, part, rows

    def _measured(self) -> dict[str, Any]:
        """Counts, statistics and storage errors from the sums of all shards."""
        sums: dict[str, Tensor] = {}
        n_dropped = torch.zeros(len(DROP_REASONS), dtype=torch.int64)
        for shard in storage.shards_of(self.manifest):
            with safe_open(self.output / shard.name, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    if name.startswith(_SUMS):
                        key = name.removeprefix(_SUMS)
                        sums[key] = file.get_tensor(name) + sums.get(key, 0)
                dropped = file.get_tensor("dropped").flatten()
                n_dropped += dropped.bincount(minlength=len(DROP_REASONS))
        names = [*(site.name for site in self.source.sites), "difference"]
        squared_norms = sums["kept"][0, 1:].split(len(sums["storage_error"]))[1]
        error = sums["storage_error"] / squared_norms.clamp_min(1e-30)
        return {
            "mask_counts": dict(zip(DROP_REASONS, n_dropped.tolist(), strict=True)),
            "statistics": site_statistics(sums, self.source.sites),
            "storage_error": dict(zip(names, error.tolist(), strict=False)),
        }
