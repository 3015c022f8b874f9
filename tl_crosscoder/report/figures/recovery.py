"""Bars of KL recovery, one a variant and kind of token.

Contract: intervals are those of the result; draws of a random control are one bar, with the lowest
and the highest as its interval. Limit: bars beyond -100 % are cut, and said to be.
"""

from dataclasses import replace
from statistics import fmean

import plotly.graph_objects as go

from tl_crosscoder.interventions.patching import PatchingResult, PatchingRow
from tl_crosscoder.report.figures.style import (
    COLOURS,
    GREY,
    NothingToDraw,
    beyond,
    dressed,
    error_bars,
    escaped,
    finite,
    hover,
    lines,
    share_axis,
    with_interval,
)
from tl_crosscoder.results.measures import spoken

_HEADINGS = {
    "dictionary": "Whole dictionary",
    "candidates": "Candidates",
    "places": "Some tokens",
    "random": "Random controls",
    "chosen": "Chosen latents",
}
_ROW_PIXELS = 16
Name = tuple[str, str | None]
"""A group and its variant; None is the group's heading."""


def recovery_bars(result: PatchingResult) -> go.Figure:
    """How much of what the fine-tune does comes back with each patch.

    Raises:
        ValueError: no row has a recovery, as of equal models.
    """
    kinds = list(dict.fromkeys(r.tokens for r in result.rows))
    rows = [r for kind in kinds for r in _shown(result, kind)]
    if not rows:
        raise NothingToDraw(
            "no variant has a recovery: the models predict alike, or nothing was patched."
        )
    axis = share_axis([r.recovery for r in rows] + [r.recovery_low for r in rows])
    places = _places(rows)
    figure = go.Figure()
    for i, kind in enumerate(kinds):
        own = [r for r in rows if r.tokens == kind]
        if own:
            figure.add_trace(_bars(own, places, name=_kind(result, kind), i=i, n=len(kinds)))
    n_prompts, n_unknown = rows[0].n_prompts, sum(r.recovery != r.recovery for r in result.rows)
    finetuned = spoken(result.compared[1])
    dressed(
        figure,
        title="KL recovery: what comes back with each patch",
        said=[
            f"1 - KL({finetuned} ‖ patched) / KL({finetuned} ‖ base stream), nats a token; 95 % "
            f"intervals over {n_prompts} prompts; random controls: lowest to highest draw.",
            f"Candidates: {result.candidates}.",
            *beyond([r.recovery for r in rows], axis),
            *([f"{n_unknown} rows without a value are left out."] if n_unknown else []),
        ],
        height=int(max(places.values()) * _ROW_PIXELS) + 30,
    )
    return figure.update_layout(
        xaxis={"title": {"text": "recovery (share of KL)"}, **axis},
        yaxis={
            "tickvals": [*places.values()],
            "ticktext": [_heading(g) if v is None else _label(v) for g, v in places],
            "range": [max(places.values()) + 1, -1],
            "showgrid": False,
        },
        barmode="overlay",
    )


def _shown(result: PatchingResult, kind: str) -> list[PatchingRow]:
    """Rows with a value; the base stream is what recovery is measured from."""
    own = [r for r in result.rows if r.tokens == kind and r.recovery == r.recovery]
    draws: dict[str, list[PatchingRow]] = {}
    for row in own:
        if row.group == "random":
            draws.setdefault(row.drawn_as, []).append(row)
    rest = [r for r in own if r.group != "random" and r.variant != "base stream"]
    return [*rest, *(_mean(name, drawn) for name, drawn in draws.items())]


def _mean(name: str, drawn: list[PatchingRow]) -> PatchingRow:
    shares = [r.recovery for r in drawn]
    return replace(
        drawn[0],
        variant=f"{name.removeprefix('candidates, ')}, mean of {len(drawn)}",
        kl=fmean(r.kl for r in drawn),
        kl_low=min(r.kl for r in drawn),
        kl_high=max(r.kl for r in drawn),
        recovery=fmean(shares),
        recovery_low=min(shares),
        recovery_high=max(shares),
    )


def _heading(group: str) -> str:
    return f"<b>{escaped(_HEADINGS.get(group, group))}</b>"


def _label(variant: str) -> str:
    return "<br>".join(lines(variant, 24))


def _places(rows: list[PatchingRow]) -> dict[Name, float]:
    """Where variants, and the headings of their groups, stand, in rows from the top."""
    places: dict[Name, float] = {}
    n_kinds = len({r.tokens for r in rows})
    place = 0.0
    for group in dict.fromkeys(r.group for r in rows):
        places[group, None] = place
        place += 1.2
        for row in (r for r in rows if r.group == group):
            if (group, row.variant) in places:
                continue
            size = max(n_kinds, _label(row.variant).count("<br>") + 1)
            places[group, row.variant] = place + (size - 1) / 2
            place += size + 0.4
        place += 0.5
    return places


def _bars(
    rows: list[PatchingRow], places: dict[Name, float], *, name: str, i: int, n: int
) -> go.Bar:
    values = [r.recovery for r in rows]
    bars = error_bars(values, [r.recovery_low for r in rows], [r.recovery_high for r in rows])
    return go.Bar(
        x=finite(values),
        y=[places[r.group, r.variant] + i - (n - 1) / 2 for r in rows],
        orientation="h",
        width=0.9,
        name=name,
        showlegend=True,
        marker={"color": COLOURS[i % len(COLOURS)], "line": {"width": 0}},
        error_x=bars | {"color": GREY},
        **hover(map(_text, rows)),
    )


def _kind(result: PatchingResult, kind: str) -> str:
    row = next(r for r in result.rows if r.tokens == kind)
    known = {r.tokens: r.kl for r in result.rows if r.variant == "base stream"}
    base = f"; base stream {known[kind]:.3g} nats" if kind in known else ""
    return escaped(f"{kind} ({row.n_tokens:,} tokens{base})")


def _text(row: PatchingRow) -> str:
    n = f", {row.n_latents:,} latents" if row.n_latents else ""
    return (
        f"{escaped(row.variant)}{n}<br>{escaped(row.tokens)}: {row.n_tokens:,} tokens, "
        f"{row.n_prompts} prompts<br>recovery "
        f"{with_interval(row.recovery, row.recovery_low, row.recovery_high)}<br>KL {row.kl:.4f} "
        f"[{row.kl_low:.4f}, {row.kl_high:.4f}] nats a token"
    )
