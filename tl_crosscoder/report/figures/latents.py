"""Many latents as counts: histograms and maps.

Contract: values `[n]`, NaN left out, those outside the range in the bins at the border; what comes
out has as many numbers as there are bins. Limit: counts are drawn on a logarithmic scale.

Histograms over latents: which model they lean to, and whether shared ones mean the same.

Limit: of several sites two are compared, see `site.compared_sites`.

Maps of Latent Scaling: nu of error against nu of reconstruction, and each against Delta-norm.

Contract: all living latents as counts, and one by one only those that the question is about: the
ranked ones and those of one model alone, at most `N_DRAWN` a kind. Source of both plots: Minder et
al. 2025 (arXiv 2504.02922). Limit: nu is drawn from -0.5 to 1.5; what is beyond is at the border.
"""

import math
from typing import Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from tl_crosscoder.analysis.latent_scaling import NU_ERROR, NU_RECONSTRUCTION, LatentScaling
from tl_crosscoder.analysis.latents import LatentMeasures
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.analysis.norms import LATENT_CLASSES, LatentClass
from tl_crosscoder.report.figures.style import (
    COLOURS,
    SCALE,
    TEXT,
    NothingToDraw,
    dressed,
    escaped,
    hover,
    number,
)
from tl_crosscoder.results.measures import spoken

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


def compared_names(measurement: Measurement) -> tuple[str, str]:
    """The two sites as a reader says them. Raises NothingToDraw for a single site."""
    if measurement.compared is None:
        raise NothingToDraw(
            "a single site has no relative decoder norms: there is nothing to draw. Measure a "
            "crosscoder of two sites."
        )
    base, finetuned = map(spoken, measurement.compared)
    return base, finetuned


def relative_norm_histogram(measurement: Measurement) -> go.Figure:
    """How many living latents lean to which model; 1 is finetuned-only, 0 base-only.

    The y axis is logarithmic: the latents of interest are few. Raises ValueError for a measurement
    of a single site, whose latents have no relative norm.
    """
    base, finetuned = compared_names(measurement)
    latents = measurement.latents
    norms = latents.relative_decoder_norm[latents.n_active > 0]
    norms = norms[norms.isfinite()]
    bars = histogram(norms, over=(0.0, 1.0), what="relative norm")
    figure = go.Figure(bars)
    for x, name in ((0.0, f"{base} only"), (0.5, "shared"), (1.0, f"{finetuned} only")):
        anchor = "left" if x == 0 else "right" if x == 1 else "center"
        figure.add_vline(x=x, line={"color": TEXT, "dash": "dot", "width": 1})
        figure.add_annotation(
            x=x,
            y=1,
            yref="paper",
            text=escaped(name),
            showarrow=False,
            xanchor=anchor,
            yanchor="bottom",
        )
    dressed(
        figure,
        title=f"Relative decoder norm of {len(norms):,} living latents",
        said=[f"0: the latent writes to {base} alone, 1: to {finetuned} alone."],
    )
    return figure.update_layout(
        xaxis={
            "title": {"text": "R = ‖d¹‖ / (‖d⁰‖ + ‖d¹‖), a share"},
            "range": [-0.01, 1.01],
            "dtick": 0.25,
        },
        yaxis=count_axis(bars),
        bargap=0,
    )


def shared_cosine_histogram(measurement: Measurement) -> go.Figure:
    """Cosine between base and fine-tuned decoder row of the living latents that are shared.

    A shared latent of a low cosine means one thing in one model and another in the other. Raises
    ValueError where rows make no angle: of a single site, or of sites of unequal width.
    """
    base, finetuned = compared_names(measurement)
    latents = measurement.latents
    is_shared = (latents.n_active > 0) & (latents.class_ids == LATENT_CLASSES.index("shared"))
    cosines = latents.decoder_cosine
    if len(cosines) and bool(cosines.isnan().all()):
        raise NothingToDraw(
            "no latent has a decoder cosine: the sites differ in width, or no row has a length."
        )
    cosines = cosines[is_shared & cosines.isfinite()]
    low = -1.0 if bool((cosines < 0).any()) else 0.0
    bars = histogram(cosines, over=(low, 1.0), what="cosine")
    figure = dressed(
        go.Figure(bars),
        title=f"Decoder cosine of {len(cosines):,} shared living latents",
        said=["Shared: decoder norms of both models alike (Delta-norm 0.4 to 0.6)."],
    )
    return figure.update_layout(
        xaxis={"title": {"text": escaped(f"cosine of {base} and {finetuned} row")}},
        yaxis=count_axis(bars),
        bargap=0,
    )


N_DRAWN = 100
NU_RANGE = (-0.5, 1.5)
_DELTA_RANGE = (0.0, 1.0)


def latent_scaling_map(measurement: Measurement, *, direction: str = "finetuned") -> go.Figure:
    """nu_error against nu_reconstruction; near (0, 0) a latent is of one model alone.

    Args:
        measurement: with Latent Scaling.
        direction: whose rows; `random` and `other` are the controls.

    Raises:
        ValueError: no Latent Scaling (a single site, or unequal widths), or no such direction.
    """
    scaling, rows, other = _scaling(measurement, direction)
    alive = measurement.latents.n_active > 0
    x, y = scaling.nu_error[alive], scaling.nu_reconstruction[alive]
    what = "nu error %{x:.2f}, nu reconstruction %{y:.2f}"
    figure = go.Figure(density(x, y, over=(NU_RANGE, NU_RANGE), what=what))
    figure.add_shape(
        type="rect",
        **{"x0": -NU_ERROR, "x1": NU_ERROR, "y0": -NU_RECONSTRUCTION, "y1": NU_RECONSTRUCTION},
        line={"color": TEXT, "dash": "dot", "width": 1.5},
    )
    for trace in _marks(measurement, scaling, x=scaling.nu_error, y=scaling.nu_reconstruction):
        figure.add_trace(trace)
    n_specific = int(scaling.is_specific[alive].sum())
    dressed(
        figure,
        title=f"Latent Scaling of {int(alive.sum()):,} living latents",
        said=[
            f"{rows}. nu = 0: not in the {other} model, 1: as much as in its own. "
            f"Dotted: specific, |nu error| < {NU_ERROR} and |nu reconstruction| < "
            f"{NU_RECONSTRUCTION} ({n_specific:,} latents).",
            *_left_out(x, y),
        ],
        height=360,
    )
    return figure.update_layout(
        xaxis={"title": {"text": "nu error (ratio; high: shrunk in one model)"}, "range": NU_RANGE},
        yaxis={"title": {"text": "nu reconstruction (ratio; high: decoupled)"}, "range": NU_RANGE},
    )


def delta_norm_map(measurement: Measurement, *, direction: str = "finetuned") -> go.Figure:
    """Delta-norm against nu, of error and of reconstruction: do norms and activations agree?

    Args:
        measurement: with Latent Scaling.
        direction: whose rows nu is of.

    Raises:
        ValueError: as `latent_scaling_map`.
    """
    scaling, rows, _ = _scaling(measurement, direction)
    latents = measurement.latents
    alive = latents.n_active > 0
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    norms, said, outside = latents.delta_norm, [], []
    names = {"error": scaling.nu_error, "reconstruction": scaling.nu_reconstruction}
    for row, (name, nu) in enumerate(names.items(), 1):
        what = f"Delta-norm %{{x:.2f}}, nu {name} %{{y:.2f}}"
        over = (_DELTA_RANGE, NU_RANGE)
        counts = density(norms[alive], nu[alive], over=over, what=what)
        # Two bars would stand on top of each other.
        figure.add_trace(counts.update(showscale=row == 1), row=row, col=1)
        for trace in _marks(measurement, scaling, x=norms, y=nu):
            figure.add_trace(trace.update(showlegend=row == 1), row=row, col=1)
        said.append(f"{name} {number(_pearson(norms[alive], nu[alive]), '.2f')}")
        outside.append(nu[alive])
        figure.update_yaxes(title_text=f"nu {name} (ratio)", range=NU_RANGE, row=row, col=1)
    for x in (0.1, 0.4, 0.6, 0.9):
        figure.add_vline(x=x, line={"color": TEXT, "dash": "dot", "width": 1})
    figure.update_xaxes(range=_DELTA_RANGE)
    base, finetuned = compared_names(measurement)
    said_x = escaped(f"Delta-norm (1 = {finetuned} only, 0 = {base} only)")
    figure.update_xaxes(title_text=said_x, row=2, col=1)
    return dressed(
        figure,
        title=f"Delta-norm against nu of {int(alive.sum()):,} living latents",
        said=[
            f"{rows}. Pearson correlation within the axes: {', '.join(said)}. Dotted: "
            "borders of the classes.",
            *_left_out(*outside),
        ],
        height=560,
    )


def _scaling(measurement: Measurement, direction: str) -> tuple[LatentScaling, str, str]:
    """The table of a direction, whose rows it is of, and the model that they may not be in."""
    base, finetuned = compared_names(measurement)
    rows = {
        "finetuned": f"Rows of the {finetuned} decoder",
        "base": f"Rows of the {base} decoder",
        "random": "Control: random directions",
        "other": "Control: other latents' rows",
    }
    scaling = measurement.latents.scaling
    if not scaling:
        raise NothingToDraw(
            "there is no Latent Scaling in this measurement: the sites differ in width."
        )
    if direction not in scaling:
        raise ValueError(f"direction {direction!r} was not measured; there are {sorted(scaling)}.")
    return scaling[direction], rows[direction], finetuned if direction == "base" else base


def _left_out(*values: Tensor) -> list[str]:
    """What the counts do not show as it is."""
    n_nan = int(torch.stack([v.isnan() for v in values]).any(dim=0).sum())
    n_far = sum(n_outside(v, NU_RANGE) for v in values)
    low, high = NU_RANGE
    said = [f"{n_far:,} values beyond {low} or {high} are at the border."] if n_far else []
    return [*said, f"{n_nan:,} latents without a value are left out."] if n_nan else said


def _marks(
    measurement: Measurement, scaling: LatentScaling, *, x: Tensor, y: Tensor
) -> list[go.Scatter]:
    """Points of the latents to look at; a kind without any is left out."""
    base, finetuned = compared_names(measurement)
    latents = measurement.latents
    kinds = {
        f"{finetuned} only": (_of_class(latents, "finetuned-only"), COLOURS[1], "diamond"),
        f"{base} only": (_of_class(latents, "base-only"), COLOURS[2], "square"),
        "first of the ranking": ([s.latent for s in measurement.top], COLOURS[1], "circle-open"),
    }
    found = []
    for name, (ids, colour, symbol) in kinds.items():
        known = [j for j in ids if not (x[j].isnan() or y[j].isnan())]
        drawn = known[:N_DRAWN]
        if not drawn:
            continue
        shown = f"{len(drawn)} of {len(known):,}" if len(drawn) < len(known) else f"{len(drawn)}"
        found.append(
            go.Scatter(
                x=_places(x[drawn]),
                y=_places(y[drawn]),
                mode="markers",
                name=escaped(f"{name} ({shown})"),
                showlegend=True,
                marker={"color": colour, "symbol": symbol, "size": 9, "line": {"width": 2}},
                cliponaxis=False,
                **hover(_text(latents, scaling, j) for j in drawn),
            )
        )
    return found


def _places(values: Tensor) -> list[float]:
    """On the map, in as many digits as can be seen."""
    return [round(v, 4) for v in values.double().clamp(*NU_RANGE).tolist()]


def _of_class(latents: LatentMeasures, name: LatentClass) -> list[int]:
    """Living latents of a class, the most active first."""
    is_of = (latents.class_ids == LATENT_CLASSES.index(name)) & (latents.n_active > 0)
    order = latents.n_active.argsort(descending=True, stable=True)
    return order[is_of[order]].tolist()


def _text(latents: LatentMeasures, scaling: LatentScaling, j: int) -> str:
    error, reconstruction, norm, cosine = (
        number(values[j].item(), ".2f")
        for values in (
            scaling.nu_error,
            scaling.nu_reconstruction,
            latents.delta_norm,
            latents.decoder_cosine,
        )
    )
    return (
        f"latent {j}, {LATENT_CLASSES[int(latents.class_ids[j])]}<br>nu error {error}, "
        f"reconstruction {reconstruction}<br>Delta-norm {norm}, cosine {cosine}<br>active on "
        f"{int(latents.n_active[j]):,} tokens"
    )


def _pearson(x: Tensor, y: Tensor) -> float:
    """Within the axes: a ratio of two small numbers can be anything, and would decide it alone."""
    inside = (y >= NU_RANGE[0]) & (y <= NU_RANGE[1]) & x.isfinite()
    if int(inside.sum()) < 2:
        return float("nan")
    return torch.corrcoef(torch.stack([x[inside].double(), y[inside].double()]))[0, 1].item()
