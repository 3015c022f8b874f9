"""Figures of many latents as counts: histograms, and maps of Latent Scaling.

Contract: latents are binned before they are drawn; only those that the question is about, the
ranked ones and those of one model alone, are points, at most `N_DRAWN` a kind. NaN is left out,
values outside the range are in the bins at its border. Of several sites two are compared, see
`site.compared_sites`. Source of the maps: Minder et al. 2025 (arXiv 2504.02922).
"""

import math
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from tl_crosscoder.analysis.geometry import LATENT_CLASSES
from tl_crosscoder.analysis.latent_scaling import NU_ERROR, NU_RECONSTRUCTION, LatentScaling
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.report.figures.style import (
    COLOURS,
    SCALE,
    TEXT,
    Figure,
    NothingToDraw,
    dressed,
    hover,
    one_line,
)
from tl_crosscoder.results.measures import spoken

N_BINS = 51
"""Odd, so that the middle of the range is the middle of a bin and not its border."""
N_DRAWN = 100
NU_RANGE = (-0.5, 1.5)
Range = tuple[float, float]
_CLASS_BORDERS = (0.1, 0.4, 0.6, 0.9)


# --- histograms -----------------------------------------------------------------------------------


def relative_norm_histogram(measurement: Measurement) -> go.Figure:
    """Number of active latents by relative decoder norm; 1 is finetuned-only, 0 base-only.

    The y axis is logarithmic: the latents of interest are few. Raises ValueError for a measurement
    of a single site, whose latents have no relative norm.
    """
    base, finetuned = _compared(measurement)
    norms = measurement.latents.relative_decoder_norm[measurement.latents.n_active > 0]
    norms = norms[norms.isfinite()]
    figure = histogram({"": norms}, over=(0.0, 1.0), what="relative norm")
    for x, name in ((0.0, f"{base} only"), (0.5, "shared"), (1.0, f"{finetuned} only")):
        figure.add_vline(x=x, line={"color": TEXT, "dash": "dot", "width": 1})
        figure.add_annotation(
            x=x,
            y=1,
            yref="paper",
            text=one_line(name),
            showarrow=False,
            xanchor="left" if x == 0 else "right" if x == 1 else "center",
            yanchor="bottom",
        )
    figure.update_xaxes(
        title_text="R = ‖d¹‖ / (‖d⁰‖ + ‖d¹‖), a share", range=[-0.01, 1.01], dtick=0.25
    )
    return dressed(
        figure,
        title=f"Relative decoder norm of {len(norms):,} active latents",
        notes=[f"0: the latent writes to {base} alone, 1: to {finetuned} alone."],
    )


def shared_cosine_histogram(measurement: Measurement) -> go.Figure:
    """Cosine between base and fine-tuned decoder row of the active latents that are shared.

    A shared latent of a low cosine means one thing in one model and another in the other. Raises
    ValueError where rows make no angle: of a single site, or of sites of unequal width.
    """
    base, finetuned = _compared(measurement)
    latents = measurement.latents
    is_shared = (latents.n_active > 0) & (latents.class_ids == LATENT_CLASSES.index("shared"))
    cosines = latents.decoder_cosine
    if len(cosines) and bool(cosines.isnan().all()):
        raise NothingToDraw(
            "no latent has a decoder cosine: the sites differ in width, or no row has a length."
        )
    cosines = cosines[is_shared & cosines.isfinite()]
    figure = histogram({"": cosines}, over=cosine_range(cosines), what="cosine")
    figure.update_xaxes(title_text=one_line(f"cosine of {base} and {finetuned} row"))
    return dressed(
        figure,
        title=f"Decoder cosine of {len(cosines):,} shared active latents",
        notes=["Shared: decoder norms of both models alike (Delta-norm 0.4 to 0.6)."],
    )


def histogram(kinds: Mapping[str, Float[Tensor, " n"]], *, over: Range, what: str) -> go.Figure:
    """Stacked bars, a kind each; a single kind has a logarithmic axis."""
    width = (over[1] - over[0]) / N_BINS
    figure = Figure()
    for colour, (name, values) in zip(COLOURS, kinds.items(), strict=False):
        counts = torch.bincount(_bins(values, over), minlength=N_BINS).tolist()
        figure.add_bar(
            x=[over[0] + (i + 0.5) * width for i in range(N_BINS)],
            y=[n or None for n in counts],
            width=width,
            name=name,
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate=f"{what} %{{x:.2f}}: %{{y:,.0f}} latents<extra></extra>",
        )
    figure.update_layout(barmode="stack", bargap=0, yaxis={"title": {"text": "number of latents"}})
    if len(kinds) == 1:
        traces: Any = figure.data
        most = max((n for n in traces[0].y if n), default=1)
        # From 0.5, so that a bar of one latent has a height.
        ends = [math.log10(0.5), math.log10(most) + 0.2]
        figure.update_yaxes(type="log", dtick=1, range=ends)
    return figure


def cosine_range(cosines: Float[Tensor, " n"]) -> Range:
    """[0, 1], or [-1, 1] where a cosine is below 0."""
    return (-1.0 if bool((cosines < 0).any()) else 0.0), 1.0


def _bins(values: Float[Tensor, " n"], over: Range) -> Tensor:
    values = values[~values.isnan()].detach().double().cpu()
    places = (values - over[0]) / (over[1] - over[0]) * N_BINS
    return places.clamp(0, N_BINS - 1).long()


def _compared(measurement: Measurement) -> tuple[str, str]:
    """Names of the two sites in a sentence. Raises NothingToDraw for a single site."""
    if measurement.compared is None:
        raise NothingToDraw(
            "a single site has no relative decoder norms: there is nothing to draw. Measure a "
            "crosscoder of two sites."
        )
    base, finetuned = map(spoken, measurement.compared)
    return base, finetuned


# --- maps of Latent Scaling -----------------------------------------------------------------------


def latent_scaling_map(measurement: Measurement) -> go.Figure:
    """nu_error against nu_reconstruction; near (0, 0) a latent is of the fine-tuned model alone.

    Raises ValueError for a measurement without Latent Scaling: a single site, or unequal widths.
    """
    scaling, is_active = _scaling(measurement), measurement.latents.n_active > 0
    base, finetuned = _compared(measurement)
    x, y = scaling.nu_error, scaling.nu_reconstruction
    figure = Figure(
        _density(x[is_active], y[is_active], over=(NU_RANGE, NU_RANGE),
                 what="nu error %{x:.2f}, nu reconstruction %{y:.2f}")
    )  # fmt: skip
    figure.add_shape(
        type="rect",
        **{"x0": -NU_ERROR, "x1": NU_ERROR, "y0": -NU_RECONSTRUCTION, "y1": NU_RECONSTRUCTION},
        line={"color": TEXT, "dash": "dot", "width": 1.5},
    )
    figure.add_traces(_points(measurement, scaling, x=x, y=y))
    figure.update_xaxes(title_text="nu error (ratio; high: shrunk in one model)", range=NU_RANGE)
    figure.update_yaxes(title_text="nu reconstruction (ratio; high: decoupled)", range=NU_RANGE)
    return dressed(
        figure,
        title=f"Latent Scaling of {int(is_active.sum()):,} active latents",
        notes=[
            f"Rows of the {finetuned} decoder. nu = 0: not in the {base} model, 1: as much as in "
            f"its own. Dotted: specific, |nu error| < {NU_ERROR} and |nu reconstruction| < "
            f"{NU_RECONSTRUCTION} ({int(scaling.is_specific[is_active].sum()):,} latents).",
            *_left_out(x[is_active], y[is_active]),
        ],
        height=360,
    )


def delta_norm_map(measurement: Measurement) -> go.Figure:
    """Delta-norm against nu, of error and of reconstruction: do norms and activations agree?

    Raises ValueError for a measurement without Latent Scaling: a single site, or unequal widths.
    """
    scaling, is_active = _scaling(measurement), measurement.latents.n_active > 0
    base, finetuned = _compared(measurement)
    norms, correlations = measurement.latents.delta_norm, []
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, figure=Figure()
    )
    names = {"error": scaling.nu_error, "reconstruction": scaling.nu_reconstruction}
    for row, (name, nu) in enumerate(names.items(), 1):
        what = f"Delta-norm %{{x:.2f}}, nu {name} %{{y:.2f}}"
        over = ((0.0, 1.0), NU_RANGE)
        counts = _density(norms[is_active], nu[is_active], over=over, what=what)
        # Two colour bars would stand on top of each other.
        figure.add_trace(counts.update(showscale=row == 1), row=row, col=1)
        for trace in _points(measurement, scaling, x=norms, y=nu):
            figure.add_trace(trace.update(showlegend=row == 1), row=row, col=1)
        correlations.append(f"{name} {_pearson(norms[is_active], nu[is_active]):.2f}")
        figure.update_yaxes(title_text=f"nu {name} (ratio)", range=NU_RANGE, row=row, col=1)
    for x in _CLASS_BORDERS:
        figure.add_vline(x=x, line={"color": TEXT, "dash": "dot", "width": 1})
    figure.update_xaxes(range=(0.0, 1.0))
    title = one_line(f"Delta-norm (1 = {finetuned} only, 0 = {base} only)")
    figure.update_xaxes(title_text=title, row=2, col=1)
    return dressed(
        figure,
        title=f"Delta-norm against nu of {int(is_active.sum()):,} active latents",
        notes=[
            f"Rows of the {finetuned} decoder. Pearson correlation within the axes: "
            f"{', '.join(correlations)}. Dotted: borders of the classes.",
            *_left_out(*(nu[is_active] for nu in names.values())),
        ],
        height=560,
    )


def _scaling(measurement: Measurement) -> LatentScaling:
    """Latent Scaling of the fine-tuned rows. Raises NothingToDraw where there is none."""
    _compared(measurement)
    if not measurement.latents.scaling:
        raise NothingToDraw(
            "there is no Latent Scaling in this measurement: the sites differ in width."
        )
    return measurement.latents.scaling["finetuned"]


def _density(
    x: Float[Tensor, " n"], y: Float[Tensor, " n"], *, over: tuple[Range, Range], what: str
) -> go.Heatmap:
    """Number of latents in each cell; `what` is the hover text's two values, a plotly template."""
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


def _left_out(*values: Tensor) -> list[str]:
    """Notes on what the counts do not show as it is."""
    n_nan = int(torch.stack([v.isnan() for v in values]).any(dim=0).sum())
    low, high = NU_RANGE
    n_far = sum(int(((v < low) | (v > high)).sum()) for v in values)
    notes = [f"{n_far:,} values beyond {low} or {high} are at the border."] if n_far else []
    return [*notes, f"{n_nan:,} latents without a value are left out."] if n_nan else notes


def _points(
    measurement: Measurement, scaling: LatentScaling, *, x: Tensor, y: Tensor
) -> list[go.Scatter]:
    """Points of the latents to look at; a kind without any is left out."""
    base, finetuned = _compared(measurement)
    latents = measurement.latents
    by_activity = latents.n_active.argsort(descending=True, stable=True)
    by_activity = by_activity[latents.n_active[by_activity] > 0]
    classes = latents.class_ids[by_activity]
    only = {name: by_activity[classes == LATENT_CLASSES.index(name)].tolist()
            for name in ("finetuned-only", "base-only")}  # fmt: skip
    kinds = {
        f"{finetuned} only": (only["finetuned-only"], COLOURS[1], "diamond"),
        f"{base} only": (only["base-only"], COLOURS[2], "square"),
        "first of the ranking": ([s.latent for s in measurement.top], COLOURS[1], "circle-open"),
    }
    traces = []
    for name, (ids, colour, symbol) in kinds.items():
        known = [j for j in ids if not (x[j].isnan() or y[j].isnan())]
        drawn = known[:N_DRAWN]
        if not drawn:
            continue
        shown = f"{len(drawn)} of {len(known):,}" if len(drawn) < len(known) else f"{len(drawn)}"
        columns = {
            "latent": drawn,
            "latent_class": [LATENT_CLASSES[i] for i in latents.class_ids[drawn].tolist()],
            "nu_error": scaling.nu_error[drawn].tolist(),
            "nu_reconstruction": scaling.nu_reconstruction[drawn].tolist(),
            "delta_norm": latents.delta_norm[drawn].tolist(),
            "decoder_cosine": latents.decoder_cosine[drawn].tolist(),
            "n_active": latents.n_active[drawn].tolist(),
        }
        traces.append(
            go.Scatter(
                x=_places(x[drawn]),
                y=_places(y[drawn]),
                mode="markers",
                name=one_line(f"{name} ({shown})"),
                showlegend=True,
                marker={"color": colour, "symbol": symbol, "size": 9, "line": {"width": 2}},
                cliponaxis=False,
                **hover(columns),
            )
        )
    return traces


def _places(values: Tensor) -> list[float]:
    """Places on the map, in as many digits as can be seen."""
    return [round(v, 4) for v in values.double().clamp(*NU_RANGE).tolist()]


def _pearson(x: Tensor, y: Tensor) -> float:
    """Correlation within the axes: a ratio of two small numbers can be anything."""
    inside = (y >= NU_RANGE[0]) & (y <= NU_RANGE[1]) & x.isfinite()
    if int(inside.sum()) < 2:
        return math.nan
    return torch.corrcoef(torch.stack([x[inside].double(), y[inside].double()]))[0, 1].item()
