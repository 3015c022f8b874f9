"""The look that all figures share.

Contract: colours have a contrast of 3 or more with white and with #111, text of 4.3, and paper is
transparent, so one figure serves both (colours: Okabe and Ito 2008, which the colour-blind tell
apart). Plotly reads text as HTML, so text that came from elsewhere goes through `one_line`, `lines`
or `hover`. Limit: titles are wrapped for a page of 390 pixels, and stay so on a wide one.
"""

import base64
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import plotly.graph_objects as go

from tl_crosscoder.results.render import NONE, escaped, row_texts, visible

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
GREY = "#888888"
"""Colour of controls."""
TEXT = "#797979"
SCALE = ((0.0, "#a4b4be"), (0.5, "#4d9bcb"), (1.0, "#00669f"))
"""Colours from few to many."""
_GRID = "rgba(128, 128, 128, 0.3)"
_BOTTOM, _LEGEND_ROW = 60, 20
"""Pixels: below the plot, and a row of the legend."""
_SMALL = '<span style="font-size:12px">'
_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "pentagon", "hexagon")
_BUTTONS = (
    *("zoom2d", "pan2d", "select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"),
    "sendChartToCloud",
)
_AXIS = {
    "gridcolor": _GRID,
    "linecolor": _GRID,
    "zeroline": False,
    "automargin": True,
    "title": {"standoff": 8, "font": {"size": 13}},
}
_TEMPLATE = go.layout.Template(
    layout={
        "font": {"color": TEXT, "size": 12, "family": "system-ui, Helvetica, Arial, sans-serif"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": COLOURS,
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "hoverlabel": {"align": "left"},
        # Upright and with few buttons, for a telephone always shows them, on top of the title. One
        # would send the data to plotly's servers.
        "modebar": {
            "orientation": "v",
            "bgcolor": "rgba(0,0,0,0)",
            "color": TEXT,
            "activecolor": COLOURS[0],
            "remove": _BUTTONS,
        },
    }
)


class NothingToDraw(ValueError):
    """A result without what the figure shows."""


class Figure(go.Figure):
    """A plotly figure that keeps a picture beside the live one in a notebook's output.

    GitHub, nbconvert and mail show the picture, where the live figure needs a script. It is made
    where kaleido (`pip install tl-crosscoder[notebook]`) finds a Chrome, in a second or two.
    """

    def _ipython_display_(self) -> None:
        live = self._repr_mimebundle_()
        picture = static_picture(self) if live else None
        if picture is None:
            super()._ipython_display_()
        else:
            from IPython.display import display

            display(live | {"image/png": picture}, raw=True)


_HAS_PICTURES = [find_spec("kaleido") is not None]
_PICTURE_WIDTH = 720


def static_picture(figure: go.Figure) -> str | None:
    """A PNG on white in base64; None where kaleido or its browser is missing."""
    if not _HAS_PICTURES[0]:
        return None
    drawn = go.Figure(figure).update_layout(paper_bgcolor="white")
    try:
        picture = drawn.to_image("png", width=_PICTURE_WIDTH, scale=1.5)
    except Exception:  # kaleido's own errors differ by version; the live figure does without
        _HAS_PICTURES[0] = False  # and the next figure does not wait for a browser in vain
        return None
    return base64.b64encode(picture).decode()


def dressed(
    figure: go.Figure, *, title: str, notes: Sequence[str] = (), height: int = 340
) -> go.Figure:
    """Give a figure its look, title and margins; `height` is of the plot without these, in pixels.

    Notes stand in small letters under the title, and the legend under them: a reader who sees only
    the beginning of a figure sees what its lines are.
    """
    big, small = lines(title, 36), [x for sentence in notes for x in lines(sentence, 52)]
    text = "<br>".join([f"<b>{'<br>'.join(big)}</b>", *(f"{_SMALL}{x}</span>" for x in small)])
    words, n_rows = 30 + 21 * (len(big) + len(small)), _legend_rows(figure)
    top = words + 8 + (_LEGEND_ROW * n_rows + 8 if n_rows else 0)
    total = top + height + _BOTTOM
    return figure.update_layout(
        template=_TEMPLATE,
        title={
            "text": text,
            "font": {"size": 16},
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 24, "l": 14},
        },
        height=total,
        margin={"t": top, "b": _BOTTOM, "l": 64, "r": 18},
        legend={
            "orientation": "h",
            "yref": "container",
            "y": 1 - words / total,
            "yanchor": "top",
            "xref": "container",
            "x": 0.02,
            "tracegroupgap": 0,
        },
    )


def _legend_rows(figure: go.Figure) -> int:
    """Rows of the legend on a narrow page, of about 350 pixels."""
    traces: Any = figure.data
    names = [t.name for t in traces if t.name and t.showlegend is not False]
    rows, left = 0, 0.0
    for name in names:
        width = 45 + 6.5 * len(name)
        rows, left = (rows, left - width) if width <= left else (rows + 1, 350 - width)
    return rows


def series(i: int) -> dict[str, Any]:
    """Line and marker of the i-th of several series: never told apart by colour alone."""
    colour = COLOURS[i % len(COLOURS)]
    return {
        "line": {"color": colour, "dash": _DASHES[i // len(COLOURS) % len(_DASHES)], "width": 2},
        "marker": {"color": colour, "symbol": _SYMBOLS[i % len(_SYMBOLS)], "size": 8},
    }


def one_line(text: str) -> str:
    """Text from anywhere as plotly shows it unchanged, in one line."""
    return escaped(visible(" ".join(text.split())))


def lines(text: str, width: int) -> list[str]:
    """Text from anywhere, wrapped, each line ready for plotly."""
    return [one_line(line) for line in textwrap.wrap(text, width, break_on_hyphens=False)]


def axis_label(text: str) -> str:
    """Text from anywhere, wrapped to stand beside an axis."""
    return "<br>".join(lines(text, 24))


def hover(columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Arguments of a trace: a hover text for each row of these columns, a line a value."""
    texts = [
        "<br>".join(one_line(f"{label}: {text}") for label, text in row if text != NONE)
        for row in row_texts(columns)
    ]
    return {"hovertext": texts, "hovertemplate": "%{hovertext}<extra></extra>"}


def finite(values: Iterable[float]) -> list[float | None]:
    """Values as plotly and JSON have them: None for NaN and infinity."""
    return [v if math.isfinite(v) else None for v in values]


def error_bars(
    values: Sequence[float], lows: Sequence[float], highs: Sequence[float]
) -> dict[str, Any]:
    """Bars from lowest to highest, as `error_x` or `error_y`."""
    triples = [*zip(values, lows, highs, strict=True)]
    return {
        "type": "data",
        "symmetric": False,
        "array": finite(high - value for value, _, high in triples),
        "arrayminus": finite(value - low for value, low, _ in triples),
        "thickness": 1.5,
        "width": 4,
    }


def share_axis(values: Iterable[float]) -> tuple[dict[str, Any], list[str]]:
    """An axis in percent that holds 0, 1 and the values within -1 and 1.5; a note on the others."""
    known = [v for v in values if math.isfinite(v)]
    low, high = max(-1.0, min([-0.02, *known])), min(1.5, max([1.0, *known]))
    pad = 0.03 * (high - low)
    n = sum(not low - pad <= v <= high + pad for v in known)
    notes = [f"{n} values are beyond the axis: see the hover texts."] if n else []
    return {"range": [low - pad, high + pad], "tickformat": ".0%"}, notes
