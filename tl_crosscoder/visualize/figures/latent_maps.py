"""Maps of Latent Scaling: nu of error against nu of reconstruction, and each against Delta-norm.

Contract: all living latents as counts, and one by one only those that the question is about: the
ranked ones and those of one model alone, at most `N_DRAWN` a kind. Source of both plots: Minder et
al. 2025 (arXiv 2504.02922). Limit: nu is drawn from -0.5 to 1.5; what is beyond is at the border.
"""

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from tl_crosscoder.analysis.decoder_norms import LATENT_CLASSES, LatentClass
from tl_crosscoder.analysis.latent_measures import LatentMeasures
from tl_crosscoder.analysis.latent_scaling import NU_ERROR, NU_RECONSTRUCTION, LatentScaling
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.visualize.figures.binned import density, n_outside
from tl_crosscoder.visualize.figures.latents import compared_names
from tl_crosscoder.visualize.figures.style import (
    COLOURS,
    TEXT,
    NothingToDraw,
    dressed,
    escaped,
    hover,
    number,
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
