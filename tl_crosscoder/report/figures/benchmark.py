"""Figures of the benchmark: how much of the planted behaviours each method removes, at which cost.

Contract: `method_bars` draws coverage and mitigation of every method and ranking with bootstrap
intervals over organisms; `mitigation_curves` draws mitigation against off-target cost by number.
Limit: means over organisms; the tables have them apart.
"""

from pathlib import Path

import plotly.graph_objects as go

from tl_crosscoder.benchmark.tables import method_section, planted, read_results
from tl_crosscoder.report.figures.style import (
    COLOURS,
    GREY,
    Figure,
    NothingToDraw,
    dressed,
    error_bars,
    finite,
    hover,
    one_line,
    series,
    share_axis,
)

_ROW_PIXELS = 34
_MOST_CURVES = 8
_MIN_COST = 1e-6
"""Nats a token below which a cost stands at the left edge of the logarithmic axis."""


def method_bars(folder: str | Path) -> go.Figure:
    """Coverage and mitigation of every method and ranking, the best at the top."""
    rows, _, settings = read_results(folder)
    columns = method_section(rows, settings).columns
    pairs = zip(columns["method"], columns["ranking"], strict=True)
    names = [f"{one_line(method)}<br>by {_said(ranking)}" for method, ranking in pairs]
    figure = Figure()
    for i, name in enumerate(("coverage", "mitigation")):
        values, low, high = (columns[f"{name}{end}"] for end in ("", "_low", "_high"))
        figure.add_trace(
            go.Bar(
                x=finite(values),
                y=names,
                name=name,
                orientation="h",
                marker={"color": COLOURS[i]},
                error_x=error_bars(values, low, high) | {"color": GREY},
                **hover({k: v for k, v in columns.items() if not k.endswith(("_low", "_high"))}),
            )
        )
    axis, notes = share_axis([*columns["coverage"], *columns["mitigation"]])
    figure.update_xaxes(**axis)
    figure.update_yaxes(autorange="reversed")
    return dressed(
        figure,
        title=f"What the first {settings['n_named']} of each ranking remove",
        notes=[
            "Coverage: share of planted behaviours removed by a tenth or more, and more than by "
            "controls. Mitigation: share removed of what passes the hook. 95 % intervals over "
            "organisms.",
            *notes,
        ],
        height=_ROW_PIXELS * len(names) + 20,
    )


def mitigation_curves(folder: str | Path) -> go.Figure:
    """Mitigation against the cost on neutral text, a line a method, its points the numbers."""
    rows, _, _ = read_results(folder)
    tested = planted(rows)
    tested = tested[tested.of_reachable.notna()]
    if not len(tested):
        raise NothingToDraw("no planted behaviour has been tested.")
    # Means over other organisms are not to be compared.
    n_organisms = tested.groupby("method").organism.nunique()
    tested = tested[tested.method.map(n_organisms) == n_organisms.max()]
    means = tested.groupby(["method", "ranking", "n"])[["of_reachable", "cost"]].mean()
    best = means.groupby(["method", "ranking"]).of_reachable.max().sort_values(ascending=False)
    figure = Figure()
    for i, (method, ranking) in enumerate([*best.index][:_MOST_CURVES]):
        own = means.loc[(method, ranking)]
        figure.add_trace(
            go.Scatter(
                x=[max(_MIN_COST, c) for c in own.cost],
                y=finite(own.of_reachable),
                mode="lines+markers",
                name=one_line(f"{method}, {_said(ranking)}"),
                **series(i),
                **hover(
                    {
                        "n": [*own.index],
                        "mitigation": [*own.of_reachable],
                        "off_target_kl": [*own.cost],
                    }
                ),
            )
        )
    axis, notes = share_axis([*means.of_reachable])
    figure.update_xaxes(type="log", title_text="off-target KL (nats a token)")
    figure.update_yaxes(title_text="removed of what passes the hook", **axis)
    return dressed(
        figure,
        title="Mitigation against cost",
        notes=[
            f"The {min(_MOST_CURVES, len(best))} rankings that remove most, of methods that were "
            f"run on all {n_organisms.max()} organisms; means over these.",
            *notes,
        ],
    )


def _said(ranking: str) -> str:
    return one_line(ranking.replace("_", " "))
