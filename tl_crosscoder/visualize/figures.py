"""Figures: a result in, a `plotly.graph_objects.Figure` out.

Data are binned before they are drawn, so a figure of 73,728 latents is as small as one of 1,024.
"""

import math
from pathlib import Path

import plotly.graph_objects as go
import torch

from tl_crosscoder import files
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.visualize.terminal import spoken

N_BINS = 51
"""Odd, so that 0.5 is the middle of a bin and not its border."""
_COLOUR = "#4c78a8"
_GREY = "rgba(128, 128, 128, 0.35)"


def relative_norm_histogram(measurement: Measurement) -> go.Figure:
    """How many living latents lean to which model; 1 is finetuned-only, 0 base-only.

    The y axis is logarithmic: the latents of interest are few. Raises ValueError for a measurement
    of a single site, whose latents have no relative norm.
    """
    if measurement.compared is None:
        raise ValueError("a single site has no relative decoder norms: there is nothing to draw.")
    base, finetuned = (spoken(name) for name in measurement.compared)
    latents = measurement.latents
    norms = latents.relative_decoder_norm[latents.n_active > 0]
    norms = norms[norms.isfinite()].double().cpu()
    counts = torch.histogram(norms, bins=N_BINS, range=(0.0, 1.0)).hist
    centres = [(i + 0.5) / N_BINS for i in range(N_BINS)]
    bars = go.Bar(
        x=centres,
        y=[c or None for c in counts.tolist()],
        width=1 / N_BINS,
        marker={"color": _COLOUR, "line": {"width": 0}},
        hovertemplate="relative norm %{x:.2f}: %{y:.0f} latents<extra></extra>",
    )
    figure = go.Figure(bars)
    for x, label in ((0.0, f"{base} only"), (0.5, "shared"), (1.0, f"{finetuned} only")):
        anchor = "left" if x == 0 else "right" if x == 1 else "center"
        figure.add_vline(x=x, line={"color": "grey", "dash": "dot", "width": 1})
        figure.add_annotation(
            x=x, y=1.02, yref="paper", text=label, showarrow=False, xanchor=anchor, yanchor="bottom"
        )
    figure.update_layout(
        title={"text": f"Relative decoder norm of {len(norms):,} living latents", "x": 0.5},
        xaxis={
            "title": "relative decoder norm  ‖d¹‖ / (‖d⁰‖ + ‖d¹‖)",
            "range": [-0.01, 1.01],
            "gridcolor": _GREY,
            "zeroline": False,
        },
        yaxis={
            "title": "number of latents",
            "type": "log",
            "dtick": 1,
            # From 0.5, so that a bar of one latent has a height.
            "range": [math.log10(0.5), math.log10(max(counts.max().item(), 1)) + 0.2],
            "gridcolor": _GREY,
        },
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#7f7f7f", "size": 14},
        margin={"t": 90},
        bargap=0,
    )
    return figure


def save_figure(figure: go.Figure, path: Path) -> Path:
    """Write one self-contained HTML file that opens without a network."""
    files.write_text(path, figure.to_html(include_plotlyjs=True, full_html=True))
    return path
