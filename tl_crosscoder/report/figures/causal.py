"""Figures of causal tests: shares and costs beside their controls.

Contract: intervals are those of the results, every kind of control and p-value is in the hover
texts; the strongest control is a band from its mean to its 95th percentile, and a share that must
not be read as a plain one has its flag beside it. Limit: shares beyond -100 % or 150 % are
cut, and a note says so; of several sets at one place the band has the highest 95th percentile.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_crosscoder.interventions.causal_rows import (
    ALL,
    CausalRow,
    CausalTest,
    causal_notes,
    has_curves,
)
from tl_crosscoder.report.figures.style import (
    GREY,
    Figure,
    NothingToDraw,
    axis_label,
    dressed,
    error_bars,
    finite,
    hover,
    one_line,
    series,
    share_axis,
)
from tl_crosscoder.results.measures import MEASURES

_CONTROLS = {
    "control_mean": ("strongest control, mean", {"dash": "dot"}),
    "control_high": ("strongest control, 95th percentile", {"fill": "tonexty"}),
    "ceiling": ("whole activation", {"dash": "dash"}),
    "control_off_target_kl": ("strongest control, mean", {"dash": "dot"}),
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
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.07, figure=Figure()
    )
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
        return axis_label(row.latents)

    _add_controls(figure, rows, x=name)
    _add_own(figure, rows, x=name, name="this method", has_line=False)
    figure.update_xaxes(type="category", tickangle=0 if len(rows) < 4 else 45)


def _by_size(figure: go.Figure, rows: Sequence[CausalRow]) -> None:
    """One line, or of methods at several sizes each one a line."""
    far = [r for r in rows if r.latents == ALL and has_curves(rows)]
    sizes = sorted({r.n_latents for r in rows if r not in far})
    end = 2 * sizes[-1]

    def size(row: CausalRow) -> int:
        return end if row in far else row.n_latents

    _add_controls(figure, rows, x=size)
    if has_curves(rows):
        for i, name in enumerate(dict.fromkeys(r.latents for r in rows)):
            own = [r for r in rows if r.latents == name]
            _add_own(figure, own, x=size, name=one_line(name), i=i)
    else:
        # A line joins sizes of one series; through two sets of one size it means nothing.
        _add_own(figure, rows, x=size, name="latents", has_line=len(sizes) == len(rows))
    ticks = {n: str(n) for n in sizes[:: 1 + len(sizes) // 10]}
    if far:
        ticks[end] = "all"
    ends = [math.log10(sizes[0]) - 0.1, math.log10(max(sizes[-1], *ticks)) + 0.1]
    figure.update_xaxes(type="log", tickvals=[*ticks], ticktext=[*ticks.values()], range=ends)
    title = "latents or directions" if has_curves(rows) else "latents in the set"
    figure.update_xaxes(title_text=title, row=2, col=1)


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
        mode = "lines+markers" if has_line else "markers"
        trace = go.Scatter(
            x=[x(r) for r in rows],
            y=finite(columns[value]),
            error_y=error_bars(*bars),
            mode=mode + "+text" if panel == 1 and any(columns["flag"]) else mode,
            text=columns["flag"],
            textposition="top center",
            name=name,
            legendgroup=name,
            showlegend=panel == 1,
            legendrank=i,  # before the controls, though drawn on top of them
            **series(i),
            **hover(columns),
        )
        figure.add_trace(trace, row=panel, col=1)


def _add_controls(figure: go.Figure, rows: Sequence[CausalRow], *, x: Place) -> None:
    """Mean of the strongest control and its 95th percentile, and the ceiling."""
    places = list(dict.fromkeys(map(x, rows)))
    at = [[r for r in rows if x(r) == place] for place in places]
    for field, (name, style) in _CONTROLS.items():
        merge = max if field == "control_high" else fmean
        known = [[v for r in own if math.isfinite(v := getattr(r, field))] for own in at]
        values = [merge(each) if each else math.nan for each in known]
        if not any(known):
            continue
        panel = 2 if field == "control_off_target_kl" else 1
        trace = go.Scatter(
            x=places,
            y=finite(values),
            name=name,
            mode="lines+markers",
            line={"color": GREY, "width": 1, "dash": style.get("dash", "solid")},
            marker={"color": GREY, "size": 5},
            fill=style.get("fill"),
            fillcolor="rgba(136, 136, 136, 0.2)",
            legendgroup=name,
            showlegend=panel == 1,
            hovertemplate=f"%{{y:{MEASURES[field].form}}}<extra>{name}</extra>",
        )
        figure.add_trace(trace, row=panel, col=1)


def _finished(
    figure: go.Figure, result: CausalTest, rows: Sequence[CausalRow], *, notes: list[str]
) -> go.Figure:
    one, measure = rows[0], MEASURES[rows[0].test]
    ends = ("share_low", "share", "share_high", "control_mean", "control_high", "ceiling")
    axis, beyond = share_axis([getattr(r, end) for r in rows for end in ends])
    verb = "removed" if one.test == "necessity" else "induced"
    controlled = ", ".join(dict.fromkeys(r.latents for r in rows if r.strongest))
    own = f", of {controlled}" if has_curves(rows) else ""
    figure.update_yaxes(title_text=f"share {verb}", row=1, col=1, **axis)
    figure.update_yaxes(title_text="off-target KL (nats a token)", rangemode="tozero", row=2, col=1)
    figure.add_hline(y=0, line={"color": GREY, "width": 1}, row=1, col=1)  # pyright: ignore[reportArgumentType]
    return dressed(
        figure,
        title=f"{measure.name.capitalize()}: {result.effect}",
        notes=[
            f"Share of the change from base ({one.base:.3g}) to fine-tuned model "
            f"({one.finetuned:.3g}) that is {verb}, {result.unit}, with 95 % intervals over "
            f"{result.n_prompts} prompts; {result.n_random} controls of each kind{own}.",
            *causal_notes(result, rows, is_table=False),
            *beyond,
            *notes,
        ],
        height=380,
    )


def cost_curves(result: CausalTest, *, test: str = "necessity") -> go.Figure:
    """Share of the change against its off-target cost, a line a method, its sizes at the points.

    What is higher at the same place of the axis removes more at the same cost.

    Raises:
        ValueError: no method at several sizes, or none with a value.
    """
    known = [r for r in result.rows if math.isfinite(r.share) and math.isfinite(r.off_target_kl)]
    rows = [r for r in known if r.test == test]
    if not has_curves(rows):
        raise NothingToDraw("this result has no method at several numbers of directions.")
    figure = Figure()
    for i, name in enumerate(dict.fromkeys(r.latents for r in rows)):
        own = sorted((r for r in rows if r.latents == name), key=lambda r: r.n_latents)
        columns = {f.name: [getattr(r, f.name) for r in own] for f in fields(CausalRow)}
        shares = columns["share"], columns["share_low"], columns["share_high"]
        trace = go.Scatter(
            x=columns["off_target_kl"],
            y=finite(columns["share"]),
            error_y=error_bars(*shares),
            mode="lines+markers+text",
            text=[f"{r.n_latents}{', ' if r.flag else ''}{r.flag}" for r in own],
            textposition="top center",
            name=one_line(name),
            **series(i),
            **hover(columns),
        )
        figure.add_trace(trace)
    axis, beyond = share_axis([value for r in rows for value in (r.share, r.share_low)])
    verb = "removed" if rows[0].test == "necessity" else "induced"
    figure.update_yaxes(title_text=f"share {verb}", **axis)
    figure.update_xaxes(title_text="off-target KL (nats a token)", rangemode="tozero")
    return dressed(
        figure,
        title=f"Share and cost: {result.effect}",
        notes=[
            f"Numbers at the points: latents or directions; 95 % intervals over {result.n_prompts} "
            "prompts.",
            *causal_notes(result, rows, is_table=False),
            *beyond,
        ],
    )
