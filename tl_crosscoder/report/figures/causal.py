"""Figures of interventions: bars of KL recovery, and curves of causal tests beside their controls.

Contract: intervals are those of the results, p-values are in the hover texts; random directions are
a band from their mean to their 95th percentile. Limit: bars and shares beyond -100 % or 150 % are
cut, and a note says so; of several sets at one place the band has the highest 95th percentile.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_crosscoder.interventions.patching import PatchingResult, PatchingRow
from tl_crosscoder.interventions.trials import CausalRow, CausalTest
from tl_crosscoder.report.figures.style import (
    COLOURS,
    GREY,
    NothingToDraw,
    dressed,
    error_bars,
    finite,
    hover,
    lines,
    one_line,
    series,
    share_axis,
)
from tl_crosscoder.report.sections import with_mean_draws
from tl_crosscoder.results.measures import MEASURES, spoken

# --- KL recovery ----------------------------------------------------------------------------------

_HEADINGS = {
    "dictionary": "Whole dictionary",
    "candidates": "Candidates",
    "places": "Some tokens",
    "random": "Random controls",
    "chosen": "Chosen latents",
}
_ROW_PIXELS = 16
_SHOWN = ("variant", "n_latents", "tokens", "n_tokens", "n_prompts", "recovery", "recovery_low",
          "recovery_high", "kl", "kl_low", "kl_high")  # fmt: skip
Name = tuple[str, str | None]
"""A group and its variant; None is the group's heading."""


def recovery_bars(result: PatchingResult) -> go.Figure:
    """KL recovery of each patch, a bar a variant and kind of predicted token.

    Draws of a random control are one bar, with the lowest and the highest draw as its interval.
    Raises ValueError where no row has a recovery, as of equal models.
    """
    kinds = list(dict.fromkeys(r.tokens for r in result.rows))
    every = {kind: [r for r in result.rows if r.tokens == kind] for kind in kinds}
    # Recovery is measured from the base activation, which therefore has no bar.
    known = [r for kind in kinds for r in with_mean_draws(_known(every[kind]))]
    rows = [r for r in known if r.variant != "base stream"]
    if not rows:
        raise NothingToDraw(
            "no variant has a recovery: the models predict alike, or nothing was patched."
        )
    axis, beyond = share_axis([r.recovery for r in rows] + [r.recovery_low for r in rows])
    places = _places(rows)
    figure = go.Figure()
    for i, kind in enumerate(kinds):
        own = [r for r in rows if r.tokens == kind]
        if own:
            y = [places[r.group, r.variant] + i - (len(kinds) - 1) / 2 for r in own]
            figure.add_trace(_bars(own, y, name=_kind_name(every[kind]), colour=COLOURS[i % 4]))
    n_unknown = len(result.rows) - len(_known(result.rows))
    finetuned = spoken(result.compared[1])
    labels = [f"<b>{one_line(_HEADINGS.get(g, g))}</b>" if v is None else _label(v)
              for g, v in places]  # fmt: skip
    figure.update_yaxes(tickvals=[*places.values()], ticktext=labels, showgrid=False)
    figure.update_yaxes(range=[max(places.values()) + 1, -1])
    figure.update_xaxes(title_text="KL recovery (share)", **axis)
    figure.update_layout(barmode="overlay")
    return dressed(
        figure,
        title="KL recovery: what is recovered by each patch",
        notes=[
            f"1 - KL({finetuned} ‖ patched) / KL({finetuned} ‖ base activation), nats a token; 95 "
            f"% intervals over {rows[0].n_prompts} prompts; random controls: lowest to highest "
            "draw.",
            f"Candidates: {result.candidates}.",
            *beyond,
            *([f"{n_unknown} rows without a value are left out."] if n_unknown else []),
        ],
        height=int(max(places.values()) * _ROW_PIXELS) + 30,
    )


def _known(rows: Sequence[PatchingRow]) -> list[PatchingRow]:
    return [r for r in rows if not math.isnan(r.recovery)]


def _label(variant: str) -> str:
    return "<br>".join(lines(variant, 24))


def _places(rows: Sequence[PatchingRow]) -> dict[Name, float]:
    """Where variants, and the headings of their groups, stand, in rows from the top."""
    places: dict[Name, float] = {}
    n_kinds = len({r.tokens for r in rows})
    place = 0.0
    for group in dict.fromkeys(r.group for r in rows):
        places[group, None] = place
        place += 1.2
        for variant in dict.fromkeys(r.variant for r in rows if r.group == group):
            size = max(n_kinds, _label(variant).count("<br>") + 1)
            places[group, variant] = place + (size - 1) / 2
            place += size + 0.4
        place += 0.5
    return places


def _bars(rows: Sequence[PatchingRow], y: list[float], *, name: str, colour: str) -> go.Bar:
    values = [r.recovery for r in rows]
    bars = error_bars(values, [r.recovery_low for r in rows], [r.recovery_high for r in rows])
    return go.Bar(
        x=finite(values),
        y=y,
        orientation="h",
        width=0.9,
        name=name,
        showlegend=True,
        marker={"color": colour, "line": {"width": 0}},
        error_x=bars | {"color": GREY},
        **hover({field: [getattr(r, field) for r in rows] for field in _SHOWN}),
    )


def _kind_name(rows: Sequence[PatchingRow]) -> str:
    base = [f"; base activation {r.kl:.3g} nats" for r in rows if r.variant == "base stream"]
    return one_line(f"{rows[0].tokens} ({rows[0].n_tokens:,} tokens{''.join(base)})")


# --- causal tests ---------------------------------------------------------------------------------

_CONTROLS = {
    "random_mean": {"dash": "dot"},
    "random_high": {"fill": "tonexty"},
    "matched_mean": {"dash": "dash", "symbol": "x"},
    "null_mean": {"dash": "dashdot", "symbol": "square"},
    "random_off_target_kl": {"dash": "dot"},
}
_NAMES = {
    "random_mean": "random directions, mean",
    "random_high": "random directions, 95th percentile",
    "matched_mean": "active as often, mean",
    "null_mean": "null pair, mean",
    "random_off_target_kl": "random directions, mean",
}
Place = Callable[[CausalRow], Any]


def causal_curve(result: CausalTest, *, test: str = "necessity") -> go.Figure:
    """Share of the change and off-target KL, by the size of the set or the strength of steering.

    Methods without latents stand side by side by their names.

    Args:
        result: with trials of the test.
        test: `necessity`, `insert` or `steer`.

    Raises:
        ValueError: no such trials, or none with a value.
    """
    of_test = [r for r in result.rows if r.test == test]
    rows = [r for r in of_test if math.isfinite(r.share)]
    if not rows:
        raise NothingToDraw(
            f"this result has {len(of_test)} trials of the test {test!r} and none with a value; "
            f"its tests are {sorted({r.test for r in result.rows})}."
        )
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.07)
    if test == "steer":
        _by_strength(figure, sorted(rows, key=lambda r: r.strength))
    elif any(r.n_latents < 1 for r in rows):
        _by_name(figure, rows)
    else:
        _by_size(figure, sorted(rows, key=lambda r: r.n_latents))
    n_unknown = len(of_test) - len(rows)
    unknown = [f"{n_unknown} trials without a value are left out."] if n_unknown else []
    return _finished(figure, result, rows, notes=unknown)


def _by_strength(figure: go.Figure, rows: Sequence[CausalRow]) -> None:
    """Line of each set of latents."""

    def strength(row: CausalRow) -> float:
        return row.strength

    _add_controls(figure, rows, x=strength)
    for i, name in enumerate(dict.fromkeys(r.latents for r in rows)):
        own = [r for r in rows if r.latents == name]
        _add_own(figure, own, x=strength, name=one_line(name), i=i)
    title = "strength (in mean norms of the activation)"
    figure.update_xaxes(title_text=title, row=2, col=1)


def _by_name(figure: go.Figure, rows: Sequence[CausalRow]) -> None:
    def name(row: CausalRow) -> str:
        return _label(row.latents)

    _add_controls(figure, rows, x=name)
    _add_own(figure, rows, x=name, name="this method", has_line=False)
    figure.update_xaxes(type="category", tickangle=0 if len(rows) < 4 else 45)


def _by_size(figure: go.Figure, rows: Sequence[CausalRow]) -> None:
    def size(row: CausalRow) -> int:
        return row.n_latents

    sizes = sorted({r.n_latents for r in rows})
    _add_controls(figure, rows, x=size)
    # A line joins sizes of one series; through two sets of one size it means nothing.
    _add_own(figure, rows, x=size, name="latents", has_line=len(sizes) == len(rows))
    ends = [math.log10(sizes[0]) - 0.1, math.log10(sizes[-1]) + 0.1]
    figure.update_xaxes(type="log", tickvals=sizes[:: 1 + len(sizes) // 10], range=ends)
    figure.update_xaxes(title_text="latents in the set", row=2, col=1)


def _add_own(
    figure: go.Figure,
    rows: Sequence[CausalRow],
    *,
    x: Place,
    name: str,
    i: int = 0,
    has_line: bool = True,
) -> None:
    """Shares above, costs below, with intervals."""
    names = [f.name for f in fields(CausalRow) if f.name != "test"]
    columns = {field: [getattr(r, field) for r in rows] for field in names}
    for panel, (value, stem) in enumerate((("share", "share"), ("off_target_kl", "off_target")), 1):
        bars = columns[value], columns[f"{stem}_low"], columns[f"{stem}_high"]
        trace = go.Scatter(
            x=[x(r) for r in rows],
            y=finite(columns[value]),
            error_y=error_bars(*bars),
            mode="lines+markers" if has_line else "markers",
            name=name,
            legendgroup=name,
            showlegend=panel == 1,
            legendrank=i,  # before the controls, though drawn on top of them
            **series(i),
            **hover(columns),
        )
        figure.add_trace(trace, row=panel, col=1)


def _add_controls(figure: go.Figure, rows: Sequence[CausalRow], *, x: Place) -> None:
    """Means of random directions and their 95th percentile, of matched latents and a null pair."""
    places = list(dict.fromkeys(map(x, rows)))
    at = [[r for r in rows if x(r) == place] for place in places]
    for field, style in _CONTROLS.items():
        merge = max if field == "random_high" else fmean
        values = [merge(getattr(r, field) for r in own) for own in at]
        if not any(map(math.isfinite, values)):
            continue
        panel = 2 if field == "random_off_target_kl" else 1
        name, digits = _NAMES[field], MEASURES[field].form
        trace = go.Scatter(
            x=places,
            y=finite(values),
            name=name,
            mode="lines+markers",
            line={"color": GREY, "width": 1, "dash": style.get("dash", "solid")},
            marker={"color": GREY, "size": 5, "symbol": style.get("symbol", "circle")},
            fill=style.get("fill"),
            fillcolor="rgba(136, 136, 136, 0.2)",
            legendgroup=name,
            showlegend=panel == 1,
            hovertemplate=f"%{{y:{digits}}}<extra>{name}</extra>",
        )
        figure.add_trace(trace, row=panel, col=1)


def _finished(
    figure: go.Figure, result: CausalTest, rows: Sequence[CausalRow], *, notes: list[str]
) -> go.Figure:
    one, measure = rows[0], MEASURES[rows[0].test]
    ends = ("share_low", "share", "share_high", "random_mean", "random_high")
    axis, beyond = share_axis([getattr(r, end) for r in rows for end in ends])
    verb = "removed" if one.test == "necessity" else "induced"
    figure.update_yaxes(title_text=f"share {verb}", row=1, col=1, **axis)
    figure.update_yaxes(title_text="off-target KL (nats a token)", rangemode="tozero", row=2, col=1)
    figure.add_hline(y=0, line={"color": GREY, "width": 1}, row=1, col=1)  # pyright: ignore[reportArgumentType]
    return dressed(
        figure,
        title=f"{measure.name.capitalize()}: {result.effect}",
        notes=[
            f"Share of the change from base ({one.base:.3g}) to fine-tuned model "
            f"({one.finetuned:.3g}) that is {verb}, {result.unit}, with 95 % intervals over "
            f"{result.n_prompts} prompts; {result.n_random} random directions of the same norms.",
            *beyond,
            *notes,
        ],
        height=380,
    )
