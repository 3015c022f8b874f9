"""Many latents as counts: histograms and maps.

Contract: values `[n]`, NaN left out, those outside the range in the bins at the border; what comes
out has as many numbers as there are bins. Limit: counts are drawn on a logarithmic scale.
"""

import math
from typing import Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.visualize.figures.style import COLOURS, SCALE

N_BINS = 51
"""Odd, so that the middle of the range is the middle of a bin and not its border."""
Range = tuple[float, float]


def histogram(
    values: Float[Tensor, " n"], *, over: Range, what: str, colour: str = COLOURS[0], name: str = ""
) -> go.Bar:
    """Bars over the middles of their bins; `what` is what the hover text calls the value."""
    counts = torch.bincount(_bins(values, over), minlength=N_BINS).tolist()
    low, width = over[0], (over[1] - over[0]) / N_BINS
    return go.Bar(
        x=[low + (i + 0.5) * width for i in range(N_BINS)],
        y=[n or None for n in counts],
        width=width,
        name=name,
        marker={"color": colour, "line": {"width": 0}},
        hovertemplate=f"{what} %{{x:.2f}}: %{{y:,.0f}} latents<extra></extra>",
    )


def count_axis(bars: go.Bar) -> dict[str, object]:
    """A logarithmic axis, from 0.5, so that a bar of one latent has a height."""
    heights: Any = bars.y
    most = max((n for n in heights if n), default=1)
    return {
        "title": {"text": "number of latents"},
        "type": "log",
        "dtick": 1,
        "range": [math.log10(0.5), math.log10(most) + 0.2],
    }


def density(
    x: Float[Tensor, " n"], y: Float[Tensor, " n"], *, over: tuple[Range, Range], what: str
) -> go.Heatmap:
    """How many latents are where; `what` is the hover text's two values, as a plotly template."""
    known = ~(x.isnan() | y.isnan())
    cells = _bins(x[known], over[0]) + N_BINS * _bins(y[known], over[1])
    counts = torch.bincount(cells, minlength=N_BINS**2).view(N_BINS, N_BINS).tolist()
    most = math.log10(max(1, *(n for row in counts for n in row)))
    steps = [(high - low) / N_BINS for low, high in over]
    ticks = range(math.floor(most) + 1)
    return go.Heatmap(
        z=[[round(math.log10(n), 2) if n else None for n in row] for row in counts],
        x0=over[0][0] + steps[0] / 2,
        dx=steps[0],
        y0=over[1][0] + steps[1] / 2,
        dy=steps[1],
        customdata=counts,
        zmin=0,
        zmax=max(1.0, most),
        colorscale=SCALE,
        colorbar={
            "title": {"text": "latents"},
            "tickvals": [*ticks],
            "ticktext": [f"{10**i:,}" for i in ticks],
            "thickness": 10,
            "outlinewidth": 0,
        },
        hoverongaps=False,
        hovertemplate=f"{what}: %{{customdata:,}} latents<extra></extra>",
    )


def n_outside(values: Float[Tensor, " n"], over: Range) -> int:
    """Values that a border bin holds though they are beyond it."""
    return int(((values < over[0]) | (values > over[1])).sum())


def _bins(values: Float[Tensor, " n"], over: Range) -> Tensor:
    values = values[~values.isnan()].detach().double().cpu()
    places = (values - over[0]) / (over[1] - over[0]) * N_BINS
    return places.clamp(0, N_BINS - 1).long()
