"""Histograms over latents: which model they lean to, and whether shared ones mean the same.

Limit: of several sites two are compared, see `site.compared_sites`.
"""

import plotly.graph_objects as go

from tl_crosscoder.analysis.decoder_norms import LATENT_CLASSES
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.visualize.figures.binned import count_axis, histogram
from tl_crosscoder.visualize.figures.style import TEXT, NothingToDraw, dressed, escaped
from tl_crosscoder.visualize.terminal import spoken


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
