"""What a cache of activations holds, as text for a terminal."""

from typing import Any

from tl_crosscoder.data.cache import ActivationCache

_FIRST_POSITIONS = 4


def render_cache(cache: ActivationCache) -> str:
    """Sites, size, what counts, sources and roles, and the statistics of each site."""
    manifest, text = cache.manifest, cache.text
    n = max(1, cache.n_rows)
    where = [f"  {site.name:<12} {site.label}, {site.hook_name}" for site in cache.sites]
    rows = [
        f"Activations in {cache.folder}",
        "",
        *where,
        "",
        f"  tokens       {cache.n_rows:,} in {len(text):,} contexts of {text.context_size}, "
        f"{len(text) - manifest['n_training_contexts']:,} of them held out",
        f"  on disk      {cache.n_bytes / 1e9:,.3f} GB in {len(cache.shards):,} shards, "
        f"{manifest['store']}, {cache.n_bytes / n:,.0f} bytes a token",
        f"  left out     {_counts(manifest['mask_counts'], without=('counts',))}",
        f"  sources      {_counts(text.source_counts)}",
        f"  roles        {_counts(text.role_counts)}",
        f"  rounding     {_errors(manifest['storage_error'])}",
        "",
        *_sites_table(manifest["statistics"]),
    ]
    difference = manifest["statistics"].get("difference")
    if difference:
        rows += ["", *_difference_tables(difference, manifest["statistics"]["n_by_position"])]
    return "\n".join(rows)


def _counts(counts: dict[str, int], *, without: tuple[str, ...] = ()) -> str:
    shown = {k: v for k, v in counts.items() if v and k not in without}
    return ", ".join(f"{k} {v:,}" for k, v in shown.items()) or "none"


def _errors(errors: dict[str, float]) -> str:
    shown = ", ".join(f"{k} {v:.1e}" for k, v in errors.items())
    return f"{shown} (squared error of the number format, of the squared norm)"


def _sites_table(statistics: dict[str, Any]) -> list[str]:
    """Norms and sinks of each site, over the tokens that count and at the first positions."""
    first = range(_FIRST_POSITIONS)
    rows = [
        "  norms: of the tokens that count, and at the first positions (with the share of sinks)",
        f"    {'':<12} {'RMS':>8} {'|mean|':>8} {'sinks':>7}" + "".join(f"{i:>14}" for i in first),
    ]
    for name, site in statistics["sites"].items():
        norms, sinks = site["mean_norm_by_position"], site["sink_share_by_position"]
        pairs = zip(norms[:_FIRST_POSITIONS], sinks[:_FIRST_POSITIONS], strict=True)
        cells = "".join(f"{'-' if n is None else f'{n:.1f} ({s:.0%})':>14}" for n, s in pairs)
        rows.append(
            f"    {name:<12} {site['mean_squared_norm'] ** 0.5:>8.2f} {site['norm_of_mean']:>8.2f} "
            f"{site['sink_share']:>7.2%}{cells}"
        )
    return rows


def _difference_tables(difference: dict[str, Any], n_by_position: list[int]) -> list[str]:
    """||x^1 - x^0|| by position, in spans that double, and by role."""
    norms = difference["mean_norm_by_position"]
    cells = []
    for start, stop in _spans(len(norms)):
        n = n_by_position[start:stop]
        pairs = [(v, k) for v, k in zip(norms[start:stop], n, strict=True) if v is not None]
        mean = sum(v * k for v, k in pairs) / max(1, sum(k for _, k in pairs))
        cells.append(f"{start if stop == start + 1 else f'{start}-{stop - 1}'}: {mean:.2f}")
    by_role = {k: v for k, v in difference["mean_norm_by_role"].items() if v is not None}
    return [
        "  size of the difference, |x1 - x0|",
        f"    by position  {'  '.join(cells)}",
        f"    by role      {'  '.join(f'{k}: {v:.2f}' for k, v in by_role.items())}",
    ]


def _spans(n: int) -> list[tuple[int, int]]:
    """0, 1, 2-3, 4-7, and so on."""
    spans, start = [(0, 1)], 1
    while start < n:
        spans.append((start, min(n, 2 * start)))
        start *= 2
    return spans
