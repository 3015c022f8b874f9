"""The models of a run and of a saved dictionary: from names to an `ActivationSource`.

Contract: what a run trained on, its dictionary's sites find again. Limit: a tokenizer that was
given by hand is not recorded.
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from tl_crosscoder.config.inputs import ModelsConfig, TextConfig
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.data.cache import ActivationCache
from tl_crosscoder.models.devices import first_device
from tl_crosscoder.models.pair import ModelPair, pair_sites
from tl_crosscoder.models.site import Site


def sites_of(config: ModelsConfig) -> tuple[Site, ...]:
    """The sites that a config names, before any model is loaded: every hook point in every model.

    Raises:
        ValueError: fields that do not go together.
    """
    if config.base is None or config.hook_name is None:
        raise ValueError(
            f"base is {config.base!r} and hook_name {config.hook_name!r}: name the base model "
            "(--base), the fine-tuned one (--finetuned or --adapter) and the hook point "
            "(--hook-name), or a cache of their activations (--cache)."
        )
    hook_names = _names(config.hook_name, "hook_name")
    if len(set(hook_names)) < len(hook_names):
        raise ValueError(f"hook_name {config.hook_name!r} names a hook point twice.")
    finetuned = _names(config.finetuned or config.adapter, "finetuned or adapter")
    given = (config.finetuned_revision or "," * (len(finetuned) - 1)).split(",")
    revisions = [r.strip() or None for r in given] if finetuned else None
    if revisions is not None and len(revisions) != len(finetuned):
        raise ValueError(
            f"finetuned_revision {config.finetuned_revision!r} is for {len(revisions)} models, but "
            f"there are {len(finetuned)}: {finetuned}. Leave it out, or give one for each."
        )
    sites = pair_sites(
        config.base,
        None if config.finetuned is None else _names(config.finetuned, "finetuned"),
        hook_name=hook_names,
        adapter=None if config.adapter is None else _names(config.adapter, "adapter"),
        revision=config.revision,
        finetuned_revision=revisions,
    )
    if config.difference and len(sites) != 2:
        raise ValueError(
            f"a difference is between two sites, but these are {[s.name for s in sites]}. Give one "
            "fine-tuned model and one hook point, or two hook points of the base alone."
        )
    return sites


def load_source(config: ModelsConfig) -> ModelPair:
    """The models that a config names, at their sites, or the difference of the two.

    Raises:
        ValueError, FileNotFoundError: fields that do not go together, or models that do not load
            or cannot be compared.
    """
    models = ModelPair.from_sites(
        sites_of(config),
        device=config.device,
        dtype=config.dtype,
        merge_adapter=config.merge_adapter,
    )
    return models.difference() if config.difference else models


def open_cache(config: RunConfig) -> ActivationCache | ModelPair:
    """The cache that a config names, or the difference of its two sites.

    Models and text that the config names as well must be those of the cache.

    Raises:
        ValueError: the cache has other models or hook points, holds a difference already, or is
            damaged.
        FileNotFoundError: no cache there.
    """
    assert config.cache is not None
    cache = ActivationCache(
        Path(config.cache), device=first_device(config.device), show_progress=True
    )
    if config.base is not None or config.hook_name is not None:
        _check_same_sites(cache, sites_of(config))
    _check_same_data(cache, config)
    is_difference = cache.sites[0].minus is not None
    return cache.difference() if config.difference and not is_difference else cache


def _check_same_data(cache: ActivationCache, config: RunConfig) -> None:
    """What the run says of text and number format must be what the harvest said, or nothing."""
    names = [f.name for f in fields(TextConfig)] + ["dtype", "merge_adapter"]
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


def _names(value: str | None, field: str) -> list[str]:
    """The parts of a comma list."""
    names = [part.strip() for part in value.split(",")] if value else []
    if not all(names):
        raise ValueError(f"{field} {value!r} has an empty name between its commas.")
    return names
