"""Curves of causal trials: mitigation and insertion by size of the set, steering by strength.

Contract: above, the share of the change from base to fine-tuned model that goes or comes; below,
the off-target KL on neutral text. Intervals are drawn, p-values are in the hover texts, and random
directions are a band from their mean to their 95th percentile. Limit: of several sets at one place
the band has the highest 95th percentile.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_crosscoder.interventions.trials import CausalRow, CausalTest
from tl_crosscoder.report.figures.style import (
    GREY,
    NothingToDraw,
    beyond,
    dressed,
    error_bars,
    escaped,
    finite,
    hover,
    lines,
    number,
    percent,
    series,
    share_axis,
    with_interval,
)

Place = Callable[[CausalRow], Any]
_TITLES = {
    "necessity": ("Taken out of the fine-tuned model", "goes"),
    "insert": ("Inserted into the base model", "comes"),
    "steer": ("Steering the base model", "comes"),
}


def mitigation_curve(result: CausalTest, *, test: str = "necessity") -> go.Figure:
    """Share of the change and off-target KL against the number of latents.

    Methods without latents stand side by side by their names.

    Args:
        result: with trials of the test.
        test: `necessity`, or `insert` for what latents bring into the base model.

    Raises:
        ValueError: no such trials, or none with a value.
    """
    if test == "steer":
        raise ValueError("test 'steer' has strengths, not sizes: draw it with steering_sweep.")
    rows, said = _rows(result, test)
    sizes = sorted({r.n_latents for r in rows})
    by_name = sizes[0] < 1
    rows = rows if by_name else sorted(rows, key=lambda r: r.n_latents)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.07)
    x: Place = _short if by_name else lambda r: r.n_latents
    # A line joins sizes of one series; through methods, or two sets of one size, it means nothing.
    mode = "markers" if by_name or len(sizes) < len(rows) else "lines+markers"
    _add_controls(figure, rows, x=x)
    _add_own(figure, rows, x=x, name="this method" if by_name else "latents", i=0, mode=mode)
    if by_name:
        figure.update_xaxes(type="category", tickangle=0 if len(rows) < 4 else 45)
    else:
        ends = [math.log10(sizes[0]) - 0.1, math.log10(sizes[-1]) + 0.1]
        figure.update_xaxes(type="log", tickvals=sizes[:: 1 + len(sizes) // 10], range=ends)
        figure.update_xaxes(title_text="latents in the set", row=2, col=1)
    return _finished(figure, result, rows, test=test, said=said)


def steering_sweep(result: CausalTest) -> go.Figure:
    """Share of the change and off-target KL against the strength of steering, a line a set.

    Raises:
        ValueError: no steering trials, or none with a value.
    """
    rows, said = _rows(result, "steer")
    rows = sorted(rows, key=lambda r: r.strength)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.07)
    _add_controls(figure, rows, x=_strength)
    for i, name in enumerate(sorted({r.latents for r in rows}, key=_first(result))):
        own = [r for r in rows if r.latents == name]
        _add_own(figure, own, x=_strength, name=escaped(name), i=i, mode="lines+markers")
    figure.update_xaxes(title_text="strength alpha (in mean norms of the stream)", row=2, col=1)
    return _finished(figure, result, rows, test="steer", said=said)


def _strength(row: CausalRow) -> float:
    return row.strength


def _first(result: CausalTest) -> Callable[[str], int]:
    names = [r.latents for r in result.rows]
    return names.index


def _short(row: CausalRow) -> str:
    return "<br>".join(lines(row.latents, 24))


def _rows(result: CausalTest, test: str) -> tuple[list[CausalRow], list[str]]:
    """Trials of a test that have a value, and what to say of the others."""
    of_test = [r for r in result.rows if r.test == test]
    rows = [r for r in of_test if math.isfinite(r.share)]
    if not rows:
        tests = sorted({r.test for r in result.rows})
        raise NothingToDraw(
            f"this result has {len(of_test)} trials of the test {test!r} and none with a value; "
            f"its tests are {tests}."
        )
    n = len(of_test) - len(rows)
    return rows, [f"{n} trials without a value are left out."] if n else []


def _add_own(
    figure: go.Figure, rows: Sequence[CausalRow], *, x: Place, name: str, i: int, mode: str
) -> None:
    """Shares above, costs below, with intervals."""
    panels = (
        ([r.share for r in rows], [r.share_low for r in rows], [r.share_high for r in rows]),
        (
            [r.off_target_kl for r in rows],
            [r.off_target_low for r in rows],
            [r.off_target_high for r in rows],
        ),
    )
    for panel, (values, lows, highs) in enumerate(panels, 1):
        trace = go.Scatter(
            x=[x(r) for r in rows],
            y=finite(values),
            error_y=error_bars(values, lows, highs),
            mode=mode,
            name=name,
            legendgroup=name,
            showlegend=panel == 1,
            legendrank=i,  # before the controls, though drawn on top of them
            **series(i),
            **hover(map(_text, rows)),
        )
        figure.add_trace(trace, row=panel, col=1)


def _add_controls(figure: go.Figure, rows: Sequence[CausalRow], *, x: Place) -> None:
    """Means of random directions and their 95th percentile, of matched latents and a null pair."""
    places = list(dict.fromkeys(map(x, rows)))
    at = [[r for r in rows if x(r) == place] for place in places]

    def add(name: str, values: list[float], *, row: int = 1, **style: Any) -> None:
        if any(map(math.isfinite, values)):
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
                showlegend=row == 1,
                hovertemplate=f"%{{y:{'.1%' if row == 1 else '.3g'}}}<extra>{name}</extra>",
            )
            figure.add_trace(trace, row=row, col=1)

    def mean(field: str) -> list[float]:
        return [fmean(getattr(r, field) for r in own) for own in at]

    add("random directions, mean", mean("random_mean"), dash="dot")
    highs = [max(r.random_high for r in own) for own in at]
    add("random directions, 95th percentile", highs, fill="tonexty")
    add("same firing rate, mean", mean("matched_mean"), dash="dash", symbol="x")
    add("null pair, mean", mean("null_mean"), dash="dashdot", symbol="square")
    add("random directions, mean", mean("random_off_target_kl"), row=2, dash="dot")


def _finished(
    figure: go.Figure, result: CausalTest, rows: Sequence[CausalRow], *, test: str, said: list[str]
) -> go.Figure:
    title, verb = _TITLES[test]
    drawn = [
        v for r in rows for v in (r.share_low, r.share, r.share_high, r.random_mean, r.random_high)
    ]
    axis, one = share_axis(drawn), rows[0]
    figure.update_yaxes(title_text=f"share that {verb}", row=1, col=1, **axis)
    figure.update_yaxes(title_text="off-target KL (nats a token)", rangemode="tozero", row=2, col=1)
    figure.add_hline(y=0, line={"color": GREY, "width": 1}, row=1, col=1)  # pyright: ignore[reportArgumentType]
    return dressed(
        figure,
        title=f"{title}: {result.effect}",
        said=[
            f"Share of the change from base ({one.base:.3g}) to fine-tuned model "
            f"({one.finetuned:.3g}), {result.unit}, with 95 % intervals over {result.n_prompts} "
            f"prompts; {result.n_random} norm-matched random directions.",
            *beyond([r.share for r in rows], axis),
            *said,
        ],
        height=380,
    )


def _text(row: CausalRow) -> str:
    n = f", {row.n_latents:,} latents" if row.n_latents else ""
    strength = "" if math.isnan(row.strength) else f", strength {row.strength:g}"
    found = [
        f"{escaped(row.latents)}{n}{strength}",
        f"share {with_interval(row.share, row.share_low, row.share_high)}",
        f"value {row.value:.4g} (base {row.base:.4g}, fine-tuned {row.finetuned:.4g})",
        f"random: mean {percent(row.random_mean)}, 95th {percent(row.random_high)}",
        f"p = {number(row.p_random, '.2g')}, after Holm {number(row.p_random_holm, '.2g')}",
    ]
    if not math.isnan(row.matched_mean):
        p = number(row.p_matched, ".2g")
        found.append(f"same firing rate: mean {percent(row.matched_mean)}, p = {p}")
    cost, low, high, random = (
        number(v, ".4f")
        for v in (
            row.off_target_kl,
            row.off_target_low,
            row.off_target_high,
            row.random_off_target_kl,
        )
    )
    found += [f"off-target KL {cost} [{low}, {high}] nats a token", f"random directions' {random}"]
    return "<br>".join(found)
