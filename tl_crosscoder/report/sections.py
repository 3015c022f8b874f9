"""Results as text for a terminal, and as sections that the report shows too.

Contract: measurements, caches and samples in, `Section`s or text of at most `render.WIDTH` columns
out; those of interventions are in `causes`. Limit: nothing is measured here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.data.cache import ActivationCache
from tl_crosscoder.models.site import Site, site_columns
from tl_crosscoder.results.render import Section, as_text, plain, visible, wrapped


def render(measurement: Measurement, sites: Sequence[Site], *, n_examples: int = 2) -> str:
    """Tables of reconstruction and classes, then the first latents with tokens in context."""
    tables = as_text(measurement.sections(n_examples=n_examples))
    return f"{wrapped(question(sites))}\n\n{tables}"


def question(sites: Sequence[Site]) -> str:
    """Title of a comparison: models at hook points, hook points of a model, or a difference."""
    sites = [*(s.minus for s in sites if s.minus), *sites]
    hooks = list(dict.fromkeys(s.hook_name for s in sites))
    # A model against itself, at one hook, is named twice.
    models = [visible(name) for name in _without_folders([s.label for s in sites])]
    models = models if len(hooks) == 1 else list(dict.fromkeys(models))
    if len(sites) == 1:
        return f"What there is in {models[0]} at {hooks[0]}"
    if len(models) == 1:
        return f"What changed from {' to '.join(hooks)} in {models[0]}"
    return f"What changed from {' to '.join(models)} at {', '.join(hooks)}"


def _without_folders(labels: list[str]) -> list[str]:
    """Labels that are paths of this machine by their last names, where these tell them apart."""
    short = [
        label.rstrip("/").rpartition("/")[2] if label.startswith(("/", "./", "../", "~")) else label
        for label in labels
    ]
    return short if len({*short}) == len({*labels}) else labels


def samples_text(samples: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """Texts of models after each prompt, by the name of the model."""
    blocks = []
    for prompt, texts in samples:
        width = max(map(len, texts))
        lines = [wrapped(f"> {_one_line(prompt)}")]
        lines += [wrapped(f"  {name:<{width}}  {_one_line(text)}") for name, text in texts.items()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _one_line(text: str) -> str:
    return visible(" ".join(text.split()))


# --- caches ---------------------------------------------------------------------------------------

_FIRST_POSITIONS = 4


def cache_sections(cache: ActivationCache) -> list[Section]:
    """Sites, size, masks, sources and roles of a cache, and the statistics of each site."""
    manifest, text = cache.manifest, cache.text
    statistics, rounding = manifest["statistics"], manifest["storage_error"]
    masked = {name: n for name, n in manifest["mask_counts"].items() if name != "kept"}
    n_held_out = len(text) - manifest["n_training_contexts"]
    facts = {
        "tokens": f"{cache.n_rows:,} in {len(text):,} contexts of {text.context_size}, "
        f"{n_held_out:,} of them held out",
        "on disk": f"{cache.n_bytes / 1e9:,.3f} GB in {len(cache.shards):,} shards, "
        f"{manifest['store']}, {cache.n_bytes / max(1, cache.n_rows):,.0f} bytes a token",
        "masked": _counts(masked),
        "sources": _counts(text.source_counts),
        "roles": _counts(text.role_counts),
        "rounding": f"{plain(rounding)} (squared error of the number format over squared norm)",
    }
    found = [
        Section(title=f"Activations in {cache.folder}", columns=site_columns(cache.sites)),
        Section(notes=[f"  {name:<10}{fact}" for name, fact in facts.items()]),
        _norms(statistics["sites"]),
    ]
    if statistics.get("difference"):
        found.append(_difference(statistics["difference"], statistics["n_by_position"]))
    return found


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items() if n) or "none"


def _norms(sites: Mapping[str, Mapping[str, Any]]) -> Section:
    """Norms and attention sinks, over the kept tokens and at the first positions."""
    each = [*sites.values()]
    columns: dict[str, list[Any]] = {
        "site": [*sites],
        "RMS norm": [site["mean_squared_norm"] ** 0.5 for site in each],
        "norm of the mean": [site["norm_of_mean"] for site in each],
        "sinks": [f"{site['sink_share']:.2%}" for site in each],
    }
    for i in range(_FIRST_POSITIONS):
        places = [
            (norm[i], sinks[i]) if i < len(norm) and norm[i] is not None else None
            for site in each
            for norm, sinks in [(site["mean_norm_by_position"], site["sink_share_by_position"])]
        ]
        columns[f"position {i}"] = [p and f"{p[0]:.1f} ({p[1]:.0%})" for p in places]
    title = "Norms over the kept tokens, and at the first positions (with the share of sinks)"
    return Section(title=title, columns=columns)


def _difference(difference: Mapping[str, Any], n_by_position: Sequence[int]) -> Section:
    """||x^1 - x^0|| by position, in spans that double (0, 1, 2-3, 4-7, ...), and by role."""
    norms, cells, start = difference["mean_norm_by_position"], [], 0
    while start < len(norms):
        stop = min(len(norms), max(1, 2 * start))
        pairs = [*zip(norms[start:stop], n_by_position[start:stop], strict=True)]
        known = [(norm, n) for norm, n in pairs if norm is not None]
        mean = sum(norm * n for norm, n in known) / max(1, sum(n for _, n in known))
        cells.append(f"{start if stop == start + 1 else f'{start}-{stop - 1}'}: {mean:.2f}")
        start = stop
    by_role = difference["mean_norm_by_role"].items()
    roles = [f"{role}: {norm:.2f}" for role, norm in by_role if norm is not None]
    lines = ["  by position  " + "  ".join(cells), "  by role      " + "  ".join(roles)]
    return Section(title="Mean norm of the difference, |x1 - x0|", notes=lines)
