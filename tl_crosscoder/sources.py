"""The models of a run and of a saved dictionary: from names to an `ActivationSource`.

Contract: what a run trained on, its dictionary's sites find again. Limit: a tokenizer that was
given by hand is not recorded.
"""

from collections.abc import Sequence
from dataclasses import replace

from tl_crosscoder.model_sites import ModelSites, planned_sites
from tl_crosscoder.site import Site
from tl_crosscoder.site_difference import SiteDifference
from tl_crosscoder.train.config import RunConfig


def sites_of(config: RunConfig) -> tuple[Site, ...]:
    """The sites that a config names, before any model is loaded: every hook point in every model.

    Raises:
        ValueError: fields that do not go together.
    """
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


def load_source(config: RunConfig) -> ModelSites | SiteDifference:
    """The models that a config names, at their sites, or the difference of the two.

    Raises:
        ValueError, FileNotFoundError: fields that do not go together, or models that do not load
            or cannot be compared.
    """
    models = ModelSites.from_sites(sites_of(config), device=config.device, dtype=config.dtype)
    return models.difference() if config.difference else models


def source_of_sites(
    sites: Sequence[Site], *, device: str = "cpu", dtype: str = "float32"
) -> ModelSites | SiteDifference:
    """What a dictionary was trained on, as its sites name it.

    Raises:
        ValueError, FileNotFoundError: models that are not to be had, or are other ones by now.
    """
    how = {"device": device, "dtype": dtype}
    minus = sites[0].minus
    if minus is None:
        return ModelSites.from_sites(_with_base_revisions(sites), **how)
    minuend = replace(sites[0], name="minuend", minus=None)
    models = ModelSites.from_sites(_with_base_revisions([minus, minuend]), **how)
    return models.difference(minuend.name, minus=minus.name)


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
