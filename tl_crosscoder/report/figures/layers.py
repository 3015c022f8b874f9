"""`layer_curves`: what passes each layer, and the size of the difference there.

Contract: intervals are those of the scan; the recommended layer is marked, and the last quarter of
the layers, which is not recommended, is shaded. Limit: shares beyond -100 % or 150 % are cut, and a
note says so.
"""

from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.interventions.layer_scan_result import LayerScan, n_recommendable
from tl_crosscoder.report.figures.style import (
    GREY,
    Figure,
    dressed,
    error_bars,
    finite,
    hover,
    one_line,
    series,
    share_axis,
)

_SHOWN = ("hook_name", "kl", "kl_low", "kl_high", "passing_share", "passing_share_low",
          "passing_share_high", "rise")  # fmt: skip


def layer_curves(scan: LayerScan) -> go.Figure:
    """Share of the change that passes each layer; below it the relative size of the difference."""
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.07, figure=Figure()
    )
    columns = scan.columns()
    x, shares = columns["layer"], columns["passing_share"]
    bars = error_bars(shares, columns["passing_share_low"], columns["passing_share_high"])
    how: dict[str, Any] = {"x": x, "mode": "lines+markers"}
    trace = go.Scatter(
        **how, y=finite(shares), error_y=bars, name="passes", showlegend=False, **series(0),
        **hover({name: columns[name] for name in _SHOWN}),
    )  # fmt: skip
    figure.add_trace(trace, row=1, col=1)
    of_role = {role: finite(columns[f"{role}_difference"]) for role in ROLES}
    known = {role: values for role, values in of_role.items() if any(v is not None for v in values)}
    lines = {"all tokens": finite(columns["relative_difference"])}
    lines |= known if len(known) > 1 else {}
    for i, (name, values) in enumerate(lines.items()):
        trace = go.Scatter(
            **how, y=values, name=name, **series(i),
            hovertemplate="layer %{x}: %{y:.1%}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
        figure.add_trace(trace, row=2, col=1)
    _mark(figure, scan)
    axis, beyond = share_axis([*shares, *columns["passing_share_low"]])
    figure.update_yaxes(title_text="share that passes", row=1, col=1, **axis)
    sizes = {"tickformat": ".0%", "rangemode": "tozero"}
    figure.update_yaxes({"title_text": "‖x¹ - x⁰‖ / ‖x⁰‖", **sizes}, row=2, col=1)
    figure.update_xaxes(title_text="layer", row=2, col=1)
    return dressed(
        figure,
        title=f"Where the change passes: {' → '.join(scan.models)}",
        notes=[
            f"Dashed, {scan.hook_name}: {scan.reason}.",
            f"Share of {scan.kl:.3g} nats a token that is lost when the base activation stands at "
            f"the hook; 95 % intervals over {scan.text['n_contexts']} contexts.",
            *beyond,
        ],
        height=380,
    )


def _mark(figure: go.Figure, scan: LayerScan) -> None:
    """The recommended layer, and those that are left out."""
    place = next(row.layer for row in scan.rows if row.hook_name == scan.hook_name)
    first, last = scan.rows[0].layer, scan.rows[-1].layer
    ends: dict[str, Any] = {"x0": n_recommendable(scan.n_layers) - 0.5, "x1": last + 0.5}
    for row in (1, 2):
        at: dict[str, Any] = {"row": row, "col": 1}
        figure.add_vline(x=place, line={"color": GREY, "width": 1, "dash": "dash"}, **at)
        if ends["x0"] < last:
            figure.add_vrect(**ends, fillcolor=GREY, opacity=0.15, line_width=0, **at)
    label = {"text": one_line(f"layer {place}"), "showarrow": False, "xanchor": "left"}
    figure.add_annotation(x=place, y=1, xref="x", yref="y domain", yanchor="bottom", **label)
    figure.update_xaxes(range=[first - 0.5, last + 0.5])
    if len(scan.rows) <= 12:
        figure.update_xaxes(tickvals=[row.layer for row in scan.rows])
