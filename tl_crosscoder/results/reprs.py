"""HTML of what is no table by itself: models at their sites, a dictionary, a measurement.

Contract: the `_repr_html_` of these classes calls one function here; fragments as `html_tables`
makes them. Limit: of a measurement, the latents it ranked and one example of each.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tl_crosscoder.analysis.latents import MIN_ACTIVE_TOKENS
from tl_crosscoder.models.site import Site
from tl_crosscoder.results.measures import DIRECTIONS, visible
from tl_crosscoder.results.render import box, heading, note, table

if TYPE_CHECKING:
    from tl_crosscoder.analysis.examples.database import Example
    from tl_crosscoder.analysis.measurement import Measurement
    from tl_crosscoder.crosscoder.crosscoder import Crosscoder
    from tl_crosscoder.models.difference import SiteDifference
    from tl_crosscoder.models.sites import ComparedModels

UNRANKED = f"No latent is active on {MIN_ACTIVE_TOKENS} held-out tokens or more: none is ranked."


def models_html(models: "ComparedModels") -> str:
    """Which models, and where they are read."""
    devices = {"device": [str(device) for device in models.devices]}
    size = f"{models.d_vocab:,} tokens · context {models.n_ctx:,}"
    said = f"{models.weight_processing} weights · {size}"
    columns = site_columns(models.sites) | devices
    return box(note(f"{type(models).__name__} · {said}"), table(columns))


def difference_html(difference: "SiteDifference") -> str:
    """What is taken away, and from what."""
    said = f"{type(difference).__name__} · {difference.weight_processing} weights"
    return box(note(said), table(site_columns(difference.sites)))


def crosscoder_html(crosscoder: "Crosscoder") -> str:
    """Its size and its sites."""
    cfg = crosscoder.cfg
    size = f"{type(crosscoder).__name__} · {cfg.d_sae:,} latents · d_in {cfg.d_in:,}"
    where = f"{str(crosscoder.W_dec.dtype).removeprefix('torch.')} on {crosscoder.W_dec.device}"
    return box(note(f"{size} · {where}"), table(site_columns(crosscoder.sites, scales=True)))


def sites_html(sites: Sequence[Site]) -> str:
    """What is compared."""
    return box(table(site_columns(sites)))


def measurement_html(measurement: "Measurement") -> str:
    """Reconstruction, classes, Latent Scaling, and the ranked latents."""
    r, latents = measurement.reconstruction, measurement.latents
    size = f"{len(latents.n_active):,} latents on {r.n_tokens:,} held-out tokens"
    parts = [note(f"Measurement · {size}"), table(_reconstruction(measurement))]
    if measurement.compared is not None:
        by_class, counts = r.difference_fve_by_class or {}, measurement.class_counts
        said = [by_class.get(name) if n else None for name, n in counts.items()]
        classes = {"class": [*counts], "living latents": [*counts.values()]}
        parts.append(table(classes | {"difference explained by it alone": said}))
    alive = latents.n_active > 0
    if latents.scaling and bool(alive.any()):
        parts.append(table(_scaling(measurement)))
    ranked = [vars(summary.ranked) for summary in measurement.top]
    names = ("place", "latent", "explained_difference", "relative_decoder_norm", "nu_error",
             "nu_reconstruction", "decoder_cosine", "latent_class", "active_share")  # fmt: skip
    columns: dict[str, list[Any]] = {name: [row[name] for row in ranked] for name in names}
    columns["example"] = [
        _in_context(s.examples[0]) if s.examples else None for s in measurement.top
    ]
    parts.append(heading(f"Latents by {measurement.order}"))
    parts.append(table(columns) if ranked else note(UNRANKED))
    return box(*parts)


def in_context(before: str, token: str, after: str) -> Markup:
    """One token among those around it."""
    return Markup("{}<b><u>{}</u></b>{}").format(*map(visible, (before, token, after)))


def _in_context(example: "Example") -> Markup:
    return in_context(example.before, example.token, example.after)


def site_columns(sites: Sequence[Site], *, scales: bool = False) -> dict[str, list[Any]]:
    """A row a site; of a difference, first what is taken away."""
    every = [site for own in sites for site in ([own.minus] if own.minus else []) + [own]]
    columns: dict[str, list[Any]] = {
        "site": [s.name if s.minus is None else f"{s.name}, less the above" for s in every],
        "model": [s.model_name for s in every],
        "adapter": [s.adapter for s in every],
        "revision": [s.revision for s in every],
        "hook_name": [s.hook_name for s in every],
        "d_model": [s.d_model for s in every],
    }
    columns = {name: values for name, values in columns.items() if any(values)}
    # What is taken away is scaled with the difference.
    return columns | ({"scale": [s.scale if s in sites else None for s in every]} if scales else {})


def _reconstruction(measurement: "Measurement") -> dict[str, list[Any]]:
    r = measurement.reconstruction
    rows = {f"FVE {site}": f"{value:.3f}" for site, value in r.fve.items()}
    if r.difference_fve is not None:
        rows["FVE of the difference"] = f"{r.difference_fve:.3f}"
    if r.difference_share is not None:
        rows["difference, of the variance"] = f"{r.difference_share:.1%}"
    rows |= {"L0": f"{r.l0:.1f}", "dead": f"{r.dead_share:.1%}"}
    return {name: [value] for name, value in rows.items()}


def _scaling(measurement: "Measurement") -> dict[str, list[Any]]:
    latents = measurement.latents
    alive = latents.n_active > 0
    medians = {
        f"median |nu| {kind}": [
            getattr(table, f"nu_{kind}")[alive].abs().nanmedian().item()
            for table in latents.scaling.values()
        ]
        for kind in ("error", "reconstruction")
    }
    n_specific = [int(table.is_specific.sum()) for table in latents.scaling.values()]
    names = [DIRECTIONS.get(name, name) for name in latents.scaling]
    return {"Latent Scaling": names, "specific latents": n_specific, **medians}
