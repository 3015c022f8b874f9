"""A measurement as plain text, at most 100 columns wide, for the terminal."""

import math
import textwrap
from collections.abc import Sequence

from tl_crosscoder.analysis.examples.database import Example
from tl_crosscoder.analysis.measurement import LatentSummary, Measurement
from tl_crosscoder.models.site import Site
from tl_crosscoder.results.measures import DIRECTIONS, visible
from tl_crosscoder.results.render import WIDTH, cut, n_columns, wrapped
from tl_crosscoder.results.reprs import UNRANKED

INDENT = " " * 6
_USUAL = ("base", "finetuned")


def render(measurement: Measurement, sites: Sequence[Site], *, n_examples: int = 2) -> str:
    """Tables of reconstruction and classes, then the top latents with tokens in context."""
    blocks = [
        _title(sites),
        _reconstruction(measurement),
        *_comparison(measurement),
        *_scaling(measurement),
        _top(measurement, n_examples=n_examples),
    ]
    return "\n\n".join(blocks)


def _title(sites: Sequence[Site]) -> str:
    return textwrap.fill(question(sites), WIDTH, break_on_hyphens=False)


def question(sites: Sequence[Site]) -> str:
    """What is compared: models at hook points, hook points of one model, or a difference."""
    sites = [*(s.minus for s in sites if s.minus), *sites]
    hooks = list(dict.fromkeys(s.hook_name for s in sites))
    # A model against itself, at one hook, is named twice.
    models = [visible(s.label) for s in sites]
    models = models if len(hooks) == 1 else list(dict.fromkeys(models))
    if len(sites) == 1:
        return f"What there is in {models[0]} at {hooks[0]}"
    if len(models) == 1:
        return f"What changed from {' to '.join(hooks)} in {models[0]}"
    return f"What changed from {' to '.join(models)} at {', '.join(hooks)}"


def spoken(site: str) -> str:
    """A site's name as a reader says it."""
    return {"finetuned": "fine-tuned"}.get(site, site)


def _reconstruction(measurement: Measurement) -> str:
    r = measurement.reconstruction
    n_latents = len(measurement.latents.n_active)
    rows = [[f"FVE {site}", f"{value:.3f}"] for site, value in r.fve.items()]
    if measurement.compared:
        rows.append(["FVE of the difference", _difference(measurement)])
    rows.append(["L0", f"{r.l0:.1f} active latents a token"])
    dead = f"{r.dead_share:.1%} of {n_latents:,} latents silent on {r.n_tokens:,} held-out tokens"
    rows.append(["dead", dead])
    return _table(rows)


def _difference(measurement: Measurement) -> str:
    r = measurement.reconstruction
    if r.difference_share is None:
        return "none: the sites differ in width"
    if r.difference_fve is None:
        return "none: the models are equal at this hook"
    of = "fine-tuned variance" if measurement.compared == _USUAL else "variance"
    return f"{r.difference_fve:.3f}   (the difference is {r.difference_share:.1%} of the {of})"


def _comparison(measurement: Measurement) -> list[str]:
    """The table of classes, and first which sites are meant."""
    if measurement.compared is None:
        return []
    said = meant_sites(measurement.compared)
    return [*([wrapped(said)] if said else []), _classes(measurement)]


def meant_sites(compared: tuple[str, str] | None) -> str:
    """Which two sites the measures compare, where their names do not say it."""
    if compared in (None, _USUAL):
        return ""
    base, finetuned = compared
    return f"Difference, R and classes compare {finetuned} (as finetuned) with {base} (as base)."


def _classes(measurement: Measurement) -> str:
    by_class = measurement.reconstruction.difference_fve_by_class or {}
    header = ["class", "living latents", "difference explained by it alone"]
    rows = [
        [name, f"{n:,}", f"{by_class[name]:.3f}" if n and name in by_class else "-"]
        for name, n in measurement.class_counts.items()
    ]
    return _table([header, *rows])


def _scaling(measurement: Measurement) -> list[str]:
    """Latent Scaling of the living latents, by direction, its controls beside."""
    scaling, alive = measurement.latents.scaling, measurement.latents.n_active > 0
    if not scaling or not bool(alive.any()):
        return []
    header = ["Latent Scaling", "specific latents", "median |nu|: error", "reconstruction"]
    rows = [
        [
            DIRECTIONS[name],
            f"{int(table.is_specific.sum()):,}",
            _number(table.nu_error[alive].abs().nanmedian().item(), ".2f").strip(),
            _number(table.nu_reconstruction[alive].abs().nanmedian().item(), ".2f").strip(),
        ]
        for name, table in scaling.items()
    ]
    note = "(specific: |nu error| < 0.2 and |nu reconstruction| < 0.5; Minder et al. 2025)"
    return [f"{_table([header, *rows])}\n  {note}"]


def _top(measurement: Measurement, *, n_examples: int) -> str:
    lines = [wrapped(_ranking(measurement))]
    for summary in measurement.top:
        lines.append(_latent(summary))
        lines += [f"{INDENT}{context(e)}" for e in summary.examples[:n_examples]]
    return "\n".join(lines)


_ORDERS = {
    "score": "by the share of the difference that each says alone, times R",
    "difference": "by the share of the difference that each says alone",
    "relative_decoder_norm": "by R",
    "nu": "by the ranks of |nu|",
}


def _ranking(measurement: Measurement) -> str:
    n = len(measurement.top)
    if not n:
        return UNRANKED
    if measurement.order == "activity" or measurement.compared is None:
        return f"The {n} latents that are active on most tokens"
    finetuned = measurement.compared[1]
    whose = "the fine-tune's" if measurement.compared == _USUAL else f"{finetuned}'s"
    return (
        f"The {n} latents most likely to be {whose} ({_ORDERS[measurement.order]}; R: relative "
        f"decoder norm, 1 = {spoken(finetuned)} only; nu of error and reconstruction, 0 = not in "
        "the other model)"
    )


def _latent(s: LatentSummary) -> str:
    r = s.ranked
    head, fires = f"{r.place:>3}  latent {r.latent:<6}", f"fires {r.active_share:.2%}"
    if math.isnan(r.relative_decoder_norm):
        return f"{head} {fires}"
    # Rows of unequal width make no angle and have no difference.
    parts = [
        f"says {_number(r.explained_difference, '5.1%')}",
        f"R {r.relative_decoder_norm:.3f}",
        f"nu {_number(r.nu_error, '5.2f')} {_number(r.nu_reconstruction, '5.2f')}",
        f"cosine {_number(r.decoder_cosine, '+.2f')}",
        r.latent_class,
        fires,
    ]
    return f"{head} {'  '.join(parts)}"


def _number(value: float, form: str) -> str:
    return "    -" if math.isnan(value) else format(value, form)


def context(example: Example) -> str:
    """One line: the end of the context, the token in brackets, and what follows."""
    token = visible(example.token)
    before, after = (visible(" ".join(t.split())) for t in (example.before, example.after))
    gap = " " if example.before[-1:].isspace() or token[:1].isspace() else ""
    gap_after = " " if example.after[:1].isspace() or example.token[-1:].isspace() else ""
    token, source = cut(token.strip() or token, 40), cut(visible(example.source), 30)
    room = WIDTH - len(INDENT) - n_columns(f"{gap}[{token}]   ({source})")
    before = cut(before[::-1], room * 2 // 3)[::-1]
    after = cut(after, room - n_columns(before))
    return f"{before}{gap}[{token}]{gap_after}{after}  ({source})"


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
