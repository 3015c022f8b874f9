"""Figures: a result in, a `plotly.graph_objects.Figure` out.

Contract: data are binned before they are drawn, so a figure of 73,728 latents is as small as one of
1,024; intervals and p-values are drawn or in the hover text wherever the result has them; what is
left out is said under the title. Limit: where a result lacks what a figure shows, such as the norms
of a single site, `NothingToDraw` is raised, a ValueError.
"""

from tl_crosscoder.report.figures.latents import (
    delta_norm_map,
    latent_scaling_map,
    relative_norm_histogram,
    shared_cosine_histogram,
)
from tl_crosscoder.report.figures.recovery import recovery_bars
from tl_crosscoder.report.figures.run import run_figures, save_figure, save_norm_figure
from tl_crosscoder.report.figures.style import NothingToDraw
from tl_crosscoder.report.figures.training import (
    agreement_histogram,
    agreement_matrix,
    read_metrics,
    training_curves,
)
from tl_crosscoder.report.figures.trials import mitigation_curve, steering_sweep

__all__ = [
    "NothingToDraw",
    "agreement_histogram",
    "agreement_matrix",
    "delta_norm_map",
    "latent_scaling_map",
    "mitigation_curve",
    "read_metrics",
    "recovery_bars",
    "relative_norm_histogram",
    "run_figures",
    "save_figure",
    "save_norm_figure",
    "shared_cosine_histogram",
    "steering_sweep",
    "training_curves",
]
