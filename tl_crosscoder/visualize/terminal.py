"""A measurement as plain text, at most 100 columns wide, for the terminal."""

import textwrap
import unicodedata
from collections.abc import Sequence
from itertools import accumulate

from tl_crosscoder.analysis.max_activating import Example
from tl_crosscoder.analysis.measurement import LatentSummary, Measurement
from tl_crosscoder.pair import Site

WIDTH = 100
INDENT = " " * 6


def render(measurement: Measurement, sites: Sequence[Site], *, n_examples: int = 2) -> str:
    """Tables of reconstruction and classes, then the top latents with tokens in context."""
    blocks = [
        _title(sites),
        _reconstruction(measurement),
        _classes(measurement),
        _top(measurement, n_examples=n_examples),
    ]
    return "\n\n".join(blocks)


def _title(sites: Sequence[Site]) -> str:
    names = [s.adapter or s.model_name for s in sites]
    title = f"What changed from {names[0]} to {names[-1]} at {sites[-1].hook_name}"
    return textwrap.fill(title, WIDTH, break_on_hyphens=False)


def _reconstruction(measurement: Measurement) -> str:
    r = measurement.reconstruction
    n_latents = len(measurement.latents.n_active)
    rows = [[f"FVE {site}", f"{value:.3f}"] for site, value in r.fve.items()]
    if r.difference_fve is None:
        rows.append(["FVE of the difference", "none: the models are equal at this hook"])
    else:
        note = f"the difference is {r.difference_share:.1%} of the fine-tuned variance"
        rows.append(["FVE of the difference", f"{r.difference_fve:.3f}   ({note})"])
    rows.append(["L0", f"{r.l0:.1f} active latents a token"])
    dead = f"{r.dead_share:.1%} of {n_latents:,} latents silent on {r.n_tokens:,} held-out tokens"
    rows.append(["dead", dead])
    return _table(rows)


def _classes(measurement: Measurement) -> str:
    by_class = measurement.reconstruction.difference_fve_by_class or {}
    header = ["class", "living latents", "difference explained by it alone"]
    rows = [
        [name, f"{n:,}", f"{by_class[name]:.3f}" if n and name in by_class else "-"]
        for name, n in measurement.class_counts.items()
    ]
    return _table([header, *rows])


def _top(measurement: Measurement, *, n_examples: int) -> str:
    n = len(measurement.top)
    lines = [
        f"The {n} latents that lean most to the fine-tune (R: relative decoder norm, 1 = "
        "fine-tuned only)",
    ]
    for place, summary in enumerate(measurement.top, start=1):
        lines.append(_latent(place, summary, n_tokens=measurement.reconstruction.n_tokens))
        lines += [f"{INDENT}{context(e)}" for e in summary.examples[:n_examples]]
    return "\n".join(lines)


def _latent(place: int, s: LatentSummary, *, n_tokens: int) -> str:
    return (
        f"{place:>3}  latent {s.latent:<6} R {s.relative_decoder_norm:.3f}  "
        f"Delta-norm {s.delta_norm:.3f}  cosine {s.decoder_cosine:+.2f}  "
        f"{s.latent_class:<14}  fires on {s.n_active / n_tokens:.2%}"
    )


def wrapped(text: str) -> str:
    """A paragraph, its further lines indented."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ")


def context(example: Example) -> str:
    """One line: the end of the context, the token in brackets, and what follows."""
    token = _visible(example.token)
    before, after = (_visible(" ".join(t.split())) for t in (example.before, example.after))
    gap = " " if example.before[-1:].isspace() or token[:1].isspace() else ""
    gap_after = " " if example.after[:1].isspace() or example.token[-1:].isspace() else ""
    token, source = _cut(token.strip() or token, 40), _cut(_visible(example.source), 30)
    room = WIDTH - len(INDENT) - _columns(f"{gap}[{token}]   ({source})")
    before = _cut(before[::-1], room * 2 // 3)[::-1]
    after = _cut(after, room - _columns(before))
    return f"{before}{gap}[{token}]{gap_after}{after}  ({source})"


def _visible(text: str) -> str:
    """Control characters, which would move the cursor, as their escapes."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in text)


def _columns(text: str) -> int:
    """Width in a terminal: two for a CJK character or an emoji, none for a combining mark."""
    marks = sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(c) in "WF" for c in text)


def _cut(text: str, room: int) -> str:
    """The start of `text` that fits into `room` columns, with an ellipsis for the rest."""
    if _columns(text) <= room:
        return text
    ends = accumulate(_columns(c) for c in text)
    return "".join(c for c, end in zip(text, ends, strict=True) if end < room) + "…"


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
