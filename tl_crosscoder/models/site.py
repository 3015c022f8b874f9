"""A site: one hook point of one model, as recorded with a dictionary.

Contract: plain values only, so that a saved dictionary names its sites without the models at hand.
Activations of several sites are rows: `[n_sites, d_model]` where `row_shape` says so, else the
sites side by side, `[d_in]`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.config.inputs import ModelsConfig, hook_point
from tl_crosscoder.config.settings import from_mapping

Names = str | Path | Sequence[str | Path]
"""One name of a model or adapter, or several."""
ANY_HOOK = "blocks.0.hook_resid_post"
"""Hook point of every model, for what reads no activation or reads others later."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One hook point of one model, or the difference between two of them."""

    name: str
    """What it is called here: `base`, `finetuned`."""
    d_model: int = 0
    """Width of the activation, heads flattened; 0 until it has been measured on the model."""
    hook_name: str
    model_name: str
    """Hub name or folder, as the user gave it."""
    revision: str | None = None
    """Revision of the model on the hub, or of the adapter where there is one."""
    adapter: str | None = None
    """PEFT adapter on `model_name`, as the user gave it; merged or attached alike."""
    base_revision: str | None = None
    """Revision of `model_name` where there is an adapter."""
    scale: float = 1.0
    """Activations are multiplied by this in training; saved dictionaries have it folded in."""
    minus: "Site | None" = None
    """The site whose activation is subtracted from this one; None where nothing is."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hook_name", hook_point(self.hook_name))

    @property
    def model_revision(self) -> str | None:
        """Revision of `model_name`, with an adapter or without."""
        return self.revision if self.adapter is None else self.base_revision

    @property
    def owner(self) -> str:
        """What its model is called here: `finetuned` of `finetuned@blocks.3.hook_resid_post`."""
        return self.name.partition("@")[0]

    @property
    def label(self) -> str:
        """What a reader calls its model: the adapter's name, or else the model's."""
        return self.adapter or self.model_name

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the fields that only some sites have are left out of the rest."""
        values = asdict(replace(self, minus=None))
        minus = {"minus": self.minus.to_dict()} if self.minus else {}
        rare = [name for name in ("base_revision", "minus") if values[name] is None]
        return {k: v for k, v in values.items() if k not in rare} | minus

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Site":
        """Inverse of `to_dict`. Raises ValueError for unknown fields and values of another type."""
        return from_mapping(cls, values, name="a site")


def site_columns(sites: Sequence[Site], *, with_scales: bool = False) -> dict[str, list[Any]]:
    """Columns to show, a row a site; before a difference stands what is subtracted."""
    every = [site for own in sites for site in ([own.minus] if own.minus else []) + [own]]
    columns: dict[str, list[Any]] = {
        "site": [s.name if s.minus is None else f"{s.name}, minus the above" for s in every],
        "model": [s.model_name for s in every],
        "adapter": [s.adapter for s in every],
        "revision": [s.revision for s in every],
        "hook_name": [s.hook_name for s in every],
        "d_model": [s.d_model for s in every],
    }
    columns = {name: values for name, values in columns.items() if any(values)}
    # What is subtracted is scaled with the difference.
    scales = {"scale": [s.scale if s in sites else None for s in every]}
    return columns | (scales if with_scales else {})


def row_shape(sites: Sequence[Site]) -> tuple[int, ...]:
    """Shape of one token's activations: `(n_sites, d_model)` for several sites of one width.

    `(d_in,)`, the sites side by side, where widths differ and for a single site.
    """
    widths = [site.d_model for site in sites]
    is_stacked = len(widths) > 1 and len(set(widths)) == 1
    return (len(widths), widths[0]) if is_stacked else (sum(widths),)


def site_index(sites: Sequence[Site], name: str) -> int:
    """Position of a site by name. Raises ValueError for an unknown one."""
    names = [known.name for known in sites]
    if name not in names:
        raise ValueError(f"site {name!r} is not in this pair; it has {names}.")
    return names.index(name)


def site_parts(
    rows: Float[Tensor, "batch *row"], sites: Sequence[Site]
) -> tuple[Float[Tensor, "batch d_model"], ...]:
    """Views of the activations of each site, from rows of either shape (see `row_shape`)."""
    return rows.flatten(start_dim=1).split([site.d_model for site in sites], dim=-1)


def compared_sites(sites: Sequence[Site]) -> tuple[int, int] | None:
    """Positions of the two sites that stand for base and fine-tuned; None for a single site.

    The base is the first. The fine-tuned is the last other site with the first one's hook name,
    so that one layer is compared with itself in another model; or else simply the last.
    """
    if len(sites) < 2:
        return None
    same_hook = [i for i, s in enumerate(sites) if i and s.hook_name == sites[0].hook_name]
    return 0, (same_hook or [len(sites) - 1])[-1]


def subtracted_sites(sites: Sequence[Site]) -> tuple[int, int] | None:
    """Positions of the compared sites if they have one width, so that they can be subtracted."""
    pair = compared_sites(sites)
    if pair is None or sites[pair[0]].d_model != sites[pair[1]].d_model:
        return None
    return pair


# --- from the names of models to sites ------------------------------------------------------------


def sites_of(config: ModelsConfig) -> tuple[Site, ...]:
    """The sites that a config names, before any model is loaded: every hook point in every model.

    Raises:
        ValueError: fields that do not go together.
    """
    if config.base is None or config.hook_name is None:
        raise ValueError(
            f"base is {config.base!r} and hook_name {config.hook_name!r}: name the base model "
            "(--base), the fine-tuned one (--finetuned or --adapter) and the hook point "
            "(--hook-name; `tl-crosscoder scan` recommends one), or a cache of their activations "
            "(--cache)."
        )
    finetuned, adapter, revisions = config.finetuned, config.adapter, config.finetuned_revision
    sites = pair_sites(
        config.base,
        None if finetuned is None else _listed(finetuned, "finetuned"),
        hook_name=_listed(config.hook_name, "hook_name"),
        adapter=None if adapter is None else _listed(adapter, "adapter"),
        revision=config.revision,
        finetuned_revision=revisions and [r.strip() or None for r in revisions.split(",")],
    )
    if config.difference and len(sites) != 2:
        raise ValueError(
            f"a difference is between two sites, but these are {[s.name for s in sites]}. Give one "
            "fine-tuned model and one hook point, or two hook points of the base alone."
        )
    return sites


def _listed(value: str, field: str) -> list[str]:
    """The parts of a comma list."""
    names = [part.strip() for part in value.split(",")]
    if not all(names):
        raise ValueError(f"{field} {value!r} has an empty name between its commas.")
    return names


def pair_sites(
    base: str | Path,
    finetuned: Names | None = None,
    *,
    hook_name: str | Sequence[str],
    adapter: Names | None = None,
    revision: str | None = None,
    finetuned_revision: str | Sequence[str | None] | None = None,
) -> tuple[Site, ...]:
    """Sites of a base and its fine-tunes, before any model is loaded; see `from_pretrained`.

    Raises:
        ValueError: names that do not go together.
    """
    n_hooks = 1 if isinstance(hook_name, str) else len(hook_name)
    given = [n for n in (finetuned, adapter) if n is not None]
    if len(given) != 1 and (given or n_hooks == 1):
        raise ValueError(
            f"give exactly one of finetuned ({finetuned!r}) and adapter ({adapter!r}): the "
            "fine-tuned model, or a PEFT adapter on the base. The base alone is enough only for "
            "several hook points."
        )
    tuned = [n for names in given for n in ([names] if isinstance(names, str | Path) else names)]
    if finetuned_revision is None or isinstance(finetuned_revision, str):
        revisions: list[str | None] = [finetuned_revision] * len(tuned)
    else:
        revisions = [*finetuned_revision]
    if len(revisions) != len(tuned) or (isinstance(finetuned_revision, str) and len(tuned) > 1):
        raise ValueError(
            f"finetuned_revision {finetuned_revision!r} is not one for each of {tuned}: leave it "
            "out, or give as many."
        )
    return planned_sites(
        [base, *([base] * len(tuned) if adapter is not None else tuned)],
        hook_name,
        adapters=[None, *(tuned if adapter is not None else [None] * len(tuned))],
        revisions=[revision, *revisions],
    )


def planned_sites(
    names: Sequence[str | Path],
    hook_name: str | Sequence[str],
    *,
    adapters: Sequence[str | Path | None] | None = None,
    revisions: Sequence[str | None] | None = None,
) -> tuple[Site, ...]:
    """Sites of these models at these hooks, model by model, with widths yet to be measured.

    They are called base, finetuned, finetuned_2 and so on, and with several hooks
    `base@blocks.3.hook_resid_post`. `revisions` are of the adapter where there is one.

    Raises:
        ValueError: lists that do not go together, or a hook point named twice.
    """
    n, hooks = len(names), [hook_name] if isinstance(hook_name, str) else [*hook_name]
    adapters, revisions = adapters or [None] * n, revisions or [None] * n
    lengths = {"names": n, "adapters": len(adapters), "revisions": len(revisions)}
    if set(lengths.values()) != {n} or not n or not hooks or len(set(hooks)) < len(hooks):
        raise ValueError(
            f"every model needs one name, adapter and revision, and hook points that differ, but "
            f"there are {lengths} with the hook points {hooks}."
        )
    roles = ["base", "finetuned", *(f"finetuned_{i}" for i in range(2, n))][:n]
    base_revisions = {
        str(name): revision
        for name, adapter, revision in zip(names, adapters, revisions, strict=True)
        if adapter is None
    }
    return tuple(
        Site(
            name=role if len(hooks) == 1 else f"{role}@{hook}",
            hook_name=hook,
            model_name=str(name),
            revision=revision,
            adapter=None if adapter is None else str(adapter),
            base_revision=base_revisions.get(str(name)) if adapter is not None else None,
        )
        for role, name, adapter, revision in zip(roles, names, adapters, revisions, strict=True)
        for hook in hooks
    )
