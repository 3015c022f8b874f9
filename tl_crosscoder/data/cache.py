"""`ActivationCache`: activations on disk, read like the models that gave them.

    manifest.json             sites, models, tokenizer, mask counts and statistics; for each shard
                              its contexts, rows, size and sha256. Written after every shard:
                              what it names is complete
    text.safetensors          tokens, roles, sources and masks of all contexts, in their order
    shards/00000.safetensors  `rows [n, *row]` of the kept tokens, context after context, the final
                              mask of these contexts, and sums for the statistics

`cache.rows(contexts)` gives what `models.rows(contexts)` gave when it was written, up to the
rounding of its number format. Shards are memory-mapped: opening costs no memory; of a copy at an
address rows are read over the network, see `remote`. Limit: read only; `cache_writer.write_cache`
makes one.
"""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.config.inputs import TextConfig
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.data import storage
from tl_crosscoder.data.harvest import check_finite
from tl_crosscoder.data.remote import RemoteCache, is_remote
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.devices import first_device
from tl_crosscoder.models.loading import load_tokenizer
from tl_crosscoder.models.site import Site, site_parts, sites_of
from tl_crosscoder.models.source import ActivationSource, Contexts
from tl_crosscoder.models.tokenizer import tokenizer_sha256


class ActivationCache(ActivationSource):
    """Activation source that reads from a folder; see the module for its files.

    Args:
        folder: a complete one that `tl-crosscoder harvest` or `write_cache` wrote, or the address
            of a copy, such as `s3://bucket/cache`, of which rows are read as they are needed.
        device: device that rows are read to.
        verify: compare every shard with its sha256, and look for values that are no numbers, before
            anything is read; False compares only sizes and owners. None does so of a folder.
        show_progress: with a progress bar.

    Raises:
        FileNotFoundError: no cache there, or a shard is missing.
        ValueError: the cache is not complete, or a shard is damaged or belongs to another cache, or
            holds NaN, infinity or what has no square in float32; or an address that cannot be
            opened.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        verify: bool | None = None,
        show_progress: bool = False,
    ) -> None:
        self._remote = RemoteCache(str(folder)) if is_remote(folder) else None
        self.folder = str(folder) if self._remote else files.user_path(folder)
        self._device = torch.device(device)
        self.manifest = (
            self._remote.manifest if self._remote else storage.read_manifest(Path(self.folder))
        )
        if not self.manifest["is_complete"]:
            raise ValueError(
                f"{self.folder} is not complete: it has {len(self.manifest['shards'])} of "
                f"{self.manifest['n_shards']} shards. Finish it with `tl-crosscoder harvest ... "
                "--resume`."
            )
        self.shards = storage.shards_of(self.manifest)
        how = {
            "verify": self._remote is None if verify is None else verify,
            "show_progress": show_progress,
        }
        if self._remote:
            self._remote.check(**how)
        else:
            storage.check_shards(Path(self.folder), self.manifest, **how)
        self.model_sites = tuple(Site.from_dict(s) for s in self.manifest["sites"])
        self.weight_processing = self.manifest["weight_processing"]
        self.tokenizer_name = self.manifest["made_with"].get("tokenizer")
        self._compare(None)
        self._stored = [] if self._remote else [self._open(shard) for shard in self.shards]
        self._bytes = [storage.row_bytes(stored) for stored in self._stored]
        self._first_rows = torch.tensor([0, *accumulate(s.n_rows for s in self.shards)])
        if how["verify"]:
            self._check_values()

    # --- what it is ------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device that rows are read to."""
        return self._device

    @property
    def n_ctx(self) -> int:
        """Context size of the text."""
        return self.text.context_size

    @property
    def n_rows(self) -> int:
        """Number of rows: kept tokens."""
        return int(self._first_rows[-1])

    @property
    def n_bytes(self) -> int:
        """Size of the shards."""
        return sum(shard.n_bytes for shard in self.shards)

    @property
    def cache_id(self) -> str:
        """Hash of the content: sites, text, masks and number format."""
        return self.manifest["cache_id"]

    @property
    def reads_by_row(self) -> bool:
        """Whether single rows are read as fast as whole contexts: those of a folder."""
        return self._remote is None

    @property
    def tokenizer(self) -> Any:
        """The models' tokenizer, loaded at first use. Raises ValueError if it has changed."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.model_sites[-1], self.tokenizer_name)
        if tokenizer_sha256(tokenizer) != self.manifest["tokenizer_sha256"]:
            raise ValueError(
                f"the tokenizer of {self.model_sites[-1].model_name!r} is another one than when "
                f"{self.folder} was written. Load that revision of the model."
            )
        return tokenizer

    @cached_property
    def text(self) -> TokenizedText:
        """All contexts; `mask` is True for the tokens that the cache holds."""
        return replace(self._text_as_given, dropped=self._dropped, norm_limits=None)

    @property
    def training(self) -> TokenizedText:
        """The contexts to train on."""
        return self.text[: self.manifest["n_training_contexts"]]

    @property
    def held_out(self) -> TokenizedText:
        """The contexts to measure on."""
        return self.text[self.manifest["n_training_contexts"] :]

    def __repr__(self) -> str:
        sites = ", ".join(f"{s.name}={s.label!r}" for s in self.model_sites)
        return (
            f"ActivationCache({str(self.folder)!r}, {sites}, n_rows={self.n_rows:,}, "
            f"store={self.manifest['store']!r}, {self.n_bytes / 1e6:,.1f} MB)"
        )

    # --- reading ---------------------------------------------------------------------------------

    def rows(
        self, contexts: Contexts, *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "tokens *row"]:
        """Rows of the kept tokens, in the order of the mask. Raises as `places` does."""
        return self.read(self.places(contexts), dtype=dtype)

    def places(self, contexts: Contexts) -> Int[Tensor, " tokens"]:
        """Numbers of the rows of the kept tokens.

        Raises ValueError for a token that was dropped when the cache was written.
        """
        own = self._dropped[contexts.context_ids] == 0
        own = own[:, : contexts.tokens.shape[1]]
        wanted = contexts.mask
        if bool((wanted & ~own).any()):
            raise ValueError(
                f"{int((wanted & ~own).sum())} of these tokens were dropped when {self.folder} "
                "was written. Harvest again with masks that keep them."
            )
        first = self._first_row_of_context[contexts.context_ids]
        return (first[:, None] + own.cumsum(1) - 1)[wanted]

    def read(
        self, index: Int[Tensor, " n"], *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "n *row"]:
        """Rows by number, in any order. Raises IndexError beyond `n_rows`."""
        rows = self._stored_rows(index, dtype)
        if not self.is_difference:
            return rows
        parts = site_parts(rows, self.model_sites)
        return self.joined([parts[i] for i in self.read_sites])

    def _stored_rows(self, index: Int[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, "n *row"]:
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.n_rows:
            raise IndexError(f"rows are numbered 0 to {self.n_rows - 1} in {self.folder}.")
        if self._remote:
            return self._decoded(self._remote.rows(index), dtype)
        shard = torch.searchsorted(self._first_rows, index, right=True) - 1
        local = index - self._first_rows[shard]
        ordered, order = shard.sort(stable=True)
        own, counts = ordered.unique_consecutive(return_counts=True)
        if len(own) < 2:
            stored = self._stored[int(own[0]) if len(own) else 0]
            return self._decoded(storage.select(stored, local), dtype)
        # One gather for each shard, into one tensor that is decoded at once.
        indices = np.split(local[order].numpy(), counts.cumsum(0)[:-1].numpy())
        shards = [self._bytes[i] for i in own.tolist()]
        stored = storage.gathered(shards, indices, like=self._stored[0])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return self._decoded(stored, dtype).index_select(0, back.to(self.device))

    def site_rows(
        self, contexts: Contexts, sites: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> list[Float[Tensor, "tokens d_model"]]:
        """Activations of some model sites, by position, at the kept tokens."""
        parts = site_parts(self._stored_rows(self.places(contexts), dtype), self.model_sites)
        return [parts[i] for i in sites]

    def _decoded(self, stored: storage.StoredTensors, dtype: torch.dtype) -> Tensor:
        on_device = {name: tensor.to(self.device) for name, tensor in stored.items()}
        return storage.decode(on_device, self.model_sites).to(dtype)

    def _check_values(self) -> None:
        """Raise ValueError for a shard with values that are no numbers, which counts the tokens.

        Once, when the shards are read for their sha256 anyway: a check of every batch would take a
        fifth of the time that reading it does.
        """
        starts = self._first_rows.tolist()
        for i, (start, end) in enumerate(pairwise(starts)):
            stored = (
                self._remote.rows(torch.arange(start, end)) if self._remote else self._stored[i]
            )
            if not storage.has_small_values(stored):
                check_finite(self, self._decoded(stored, torch.float32))

    def _open(self, shard: storage.Shard) -> storage.StoredTensors:
        with safe_open(Path(self.folder) / shard.name, "pt") as file:
            return {name: file.get_tensor(name) for name in storage.stored_names(self.manifest)}

    @cached_property
    def _text_as_given(self) -> TokenizedText:
        if self._remote:
            return self._remote.text()
        return storage.load_text(Path(self.folder), self.manifest)

    @cached_property
    def _dropped(self) -> Tensor:
        n_nonfinite = self.manifest["mask_counts"].get("nonfinite", 0)
        if self.manifest["norm_limits"] is None and not n_nonfinite:
            return self._text_as_given.dropped
        if self._remote:
            return self._remote.dropped()
        parts = []
        for shard in self.shards:
            with safe_open(Path(self.folder) / shard.name, "pt") as file:
                parts.append(file.get_tensor("dropped"))
        return torch.cat(parts)

    @cached_property
    def _first_row_of_context(self) -> Int[Tensor, " contexts"]:
        n = (self._dropped == 0).sum(dim=1)
        return n.cumsum(0) - n


def open_cache(config: RunConfig) -> ActivationCache:
    """The cache that a config names, or the difference of its two sites.

    Models and text that the config names as well must be those of the cache.

    Raises:
        ValueError: the cache has other models or hook points, holds a difference already, or is
            damaged.
        FileNotFoundError: no cache there.
    """
    assert config.cache is not None
    device = first_device(config.device)
    cache = ActivationCache(config.cache, device=device, show_progress=True)
    if config.base is not None or config.hook_name is not None:
        _check_same_sites(cache, sites_of(config))
    _check_same_text(cache, config)
    is_difference = cache.sites[0].minus is not None
    return cache.difference() if config.difference and not is_difference else cache


def _check_same_text(cache: ActivationCache, config: RunConfig) -> None:
    """Refuse a run whose text or number format is not that of the harvest; unset ones are taken."""
    names = [f.name for f in fields(TextConfig)] + ["dtype", "merge_adapter", "tokenizer"]
    default = {f.name: f.default for f in fields(RunConfig)}
    asked, made = config.to_dict(), cache.manifest["made_with"]
    differing = [
        f"{n} ({made.get(n)!r} there, {asked[n]!r} asked for)"
        for n in names
        if getattr(config, n) != default[n] and json.dumps(asked[n]) != json.dumps(made.get(n))
    ]
    if differing:
        raise ValueError(
            f"{cache.folder} was harvested with another {', '.join(differing)}. Leave these out to "
            "take the cache as it is, or harvest again."
        )


def _check_same_sites(cache: ActivationCache, asked: Sequence[Site]) -> None:
    has, wants = ([_named(site) for site in sites] for sites in (cache.sites, asked))
    if has != wants:
        raise ValueError(
            f"{cache.folder} holds activations of {'; '.join(has)}. The run asks for "
            f"{'; '.join(wants)}. Leave base, finetuned, adapter and hook_name out to take the "
            "cache as it is, or harvest again."
        )


def _named(site: Site) -> str:
    at = "" if site.revision is None else f" (revision {site.revision})"
    adapter = "" if site.adapter is None else f" with {site.adapter}"
    minus = "" if site.minus is None else f" minus {_named(site.minus)}"
    return f"{site.model_name}{adapter}{at} at {site.hook_name}{minus}"
