"""The models of a run and of a saved dictionary: from names to an `ActivationSource`.

Contract: what a run trained on, its dictionary's sites find again. Limit: a tokenizer that was
given by hand is not recorded.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from tl_crosscoder.config.models import ModelsConfig
from tl_crosscoder.config.text import TextConfig
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.data.cache import ActivationCache
from tl_crosscoder.models.devices import first_device
from tl_crosscoder.models.difference import SiteDifference
from tl_crosscoder.models.site import Site
from tl_crosscoder.models.sites import ModelSites, planned_sites


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
    has_both = config.finetuned is not None and config.adapter is not None
    has_none = config.finetuned is None and config.adapter is None
    if has_both or (has_none and len(hook_names) == 1):
        raise ValueError(
            f"give exactly one of finetuned ({config.finetuned!r}) and adapter "
            f"({config.adapter!r}): the fine-tuned model, or a LoRA adapter on the base. The base "
            "alone is enough only for several hook points."
        )
    finetuned = _names(config.finetuned or config.adapter, "finetuned or adapter")
    revisions = (config.finetuned_revision or "," * (len(finetuned) - 1)).split(",")
    if finetuned and len(revisions) != len(finetuned):
        raise ValueError(
            f"finetuned_revision {config.finetuned_revision!r} is for {len(revisions)} models, but "
            f"there are {len(finetuned)}: {finetuned}. Leave it out, or give one for each."
        )
    sites = planned_sites(
        [config.base, *([config.base] * len(finetuned) if config.adapter else finetuned)],
        hook_names,
        adapters=[None, *(finetuned if config.adapter else [None] * len(finetuned))],
        revisions=[config.revision, *(r.strip() or None for r in revisions[: len(finetuned)])],
    )
    if config.difference and len(sites) != 2:
        raise ValueError(
            f"a difference is between two sites, but these are {[s.name for s in sites]}. Give one "
            "fine-tuned model and one hook point, or two hook points of the base alone."
        )
    return sites


def load_source(config: ModelsConfig) -> ModelSites | SiteDifference:
    """The models that a config names, at their sites, or the difference of the two.

    Raises:
        ValueError, FileNotFoundError: fields that do not go together, or models that do not load
            or cannot be compared.
    """
    models = ModelSites.from_sites(
        sites_of(config),
        device=config.device,
        dtype=config.dtype,
        merge_adapter=config.merge_adapter,
    )
    return models.difference() if config.difference else models


def open_cache(config: RunConfig) -> ActivationCache | SiteDifference:
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
    asked, made = asdict(config), cache.manifest["made_with"]
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


def source_of_sites(
    sites: Sequence[Site],
    *,
    device: str = "cpu",
    dtype: str = "float32",
    merge_adapter: bool | None = None,
) -> ModelSites | SiteDifference:
    """What a dictionary was trained on, as its sites name it.

    Raises:
        ValueError, FileNotFoundError: models that are not to be had, or are other ones by now.
    """
    minus = sites[0].minus
    # A pair's, as where the models were loaded for the training; of other sites none is recorded.
    name = "finetuned" if minus is not None and minus.name == "base" else "minuend"
    minuend = replace(sites[0], name=name, minus=None)
    models = ModelSites.from_sites(
        _with_base_revisions(sites if minus is None else [minus, minuend]),
        device=device,
        dtype=dtype,
        merge_adapter=merge_adapter,
    )
    return models if minus is None else models.difference(minuend.name, minus=minus.name)


def _with_base_revisions(sites: Sequence[Site]) -> list[Site]:
    """Older files record the revision of an adapter's base with the base's own site only."""
    known = {s.model_name: s.revision for s in reversed(sites) if s.adapter is None}
    return [
        replace(s, base_revision=s.base_revision or known.get(s.model_name)) if s.adapter else s
        for s in sites
    ]


def _names(value: str | None, field: str) -> list[str]:
    """The parts of a comma list."""
    names = [part.strip() for part in value.split(",")] if value else []
    if not all(names):
        raise ValueError(f"{field} {value!r} has an empty name between its commas.")
    return names
