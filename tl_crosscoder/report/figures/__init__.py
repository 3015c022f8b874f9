"""Figures: a result in, a `plotly.graph_objects.Figure` out; all of a run by `run_figures`.

Contract: data are binned before they are drawn, so a figure of 73,728 latents is as small as one of
1,024; intervals and p-values are drawn or in the hover text wherever the result has them; a note
under the title says what is left out. Limit: where a result lacks what a figure shows, such as the
norms of a single site, `NothingToDraw` is raised, a ValueError.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import plotly.graph_objects as go

from tl_crosscoder import files
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.interventions.causal_rows import CausalTest, has_curves
from tl_crosscoder.interventions.layer_scan_result import LayerScan
from tl_crosscoder.interventions.patching import PatchingResult
from tl_crosscoder.report.figures.causal import causal_curve, cost_curves
from tl_crosscoder.report.figures.latents import (
    delta_norm_map,
    latent_scaling_map,
    relative_norm_histogram,
    shared_cosine_histogram,
)
from tl_crosscoder.report.figures.layers import layer_curves
from tl_crosscoder.report.figures.recovery import recovery_bars
from tl_crosscoder.report.figures.style import NothingToDraw
from tl_crosscoder.report.figures.training import (
    agreement_histogram,
    agreement_matrix,
    read_metrics,
    training_curves,
)
from tl_crosscoder.run.causal import causal_files
from tl_crosscoder.run.run import Run, opened_path
from tl_crosscoder.train.checkpoint import read_record

__all__ = [
    "NothingToDraw",
    "agreement_histogram",
    "agreement_matrix",
    "causal_curve",
    "cost_curves",
    "delta_norm_map",
    "latent_scaling_map",
    "layer_curves",
    "read_metrics",
    "recovery_bars",
    "relative_norm_histogram",
    "run_figures",
    "save_figure",
    "save_norm_figure",
    "save_scan_figure",
    "shared_cosine_histogram",
    "training_curves",
]

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>tl_crosscoder</title>
</head>
<body>
{figure}
</body>
</html>
"""


def run_figures(run: Run | str | Path) -> dict[str, go.Figure]:
    """Figures of the results in a run's folder, by a name that serves as a file's.

    Nothing is measured, and no model is loaded. A figure with nothing to show, such as the norms of
    a single site, is left out.

    Raises:
        FileNotFoundError: no run there.
        ValueError: a file of it is damaged, or of an earlier version.
    """
    folder = run.path if isinstance(run, Run) else opened_path(run)
    read_record(folder)
    found = {}
    for name, draw in _makers(folder):
        try:
            found[name] = draw()
        except NothingToDraw:
            continue
    return found


def _makers(folder: Path) -> Iterator[tuple[str, Callable[[], go.Figure]]]:
    """Names of the figures that the files suggest, and what draws them, in the order of reading."""
    if (folder / files.SCAN_NAMES[0]).is_file():
        yield "layer_scan", partial(layer_curves, LayerScan.load(folder / files.SCAN_NAMES[0]))
    if (folder / files.METRICS_NAME).is_file():
        yield "training", partial(training_curves, read_metrics(folder))
    if (folder / files.ANALYSIS_NAMES[0]).is_file():
        measurement = Measurement.load(folder)
        yield "relative_decoder_norm", partial(relative_norm_histogram, measurement)
        yield "shared_decoder_cosine", partial(shared_cosine_histogram, measurement)
        yield "latent_scaling", partial(latent_scaling_map, measurement)
        yield "delta_norm", partial(delta_norm_map, measurement)
    if (folder / files.PATCHING_NAME).is_file():
        patching = PatchingResult.load(folder / files.PATCHING_NAME)
        yield "kl_recovery", partial(recovery_bars, patching)
    for path in causal_files(folder):
        result = CausalTest.load(path)
        for test in dict.fromkeys(row.test for row in result.rows):
            yield f"{path.stem}_{test}", partial(causal_curve, result, test=test)
        if has_curves(result.rows):
            yield f"{path.stem}_cost", partial(cost_curves, result)


def save_norm_figure(measurement: Measurement, folder: Path) -> None:
    """Write `relative_decoder_norm.html`, the histogram of R, where there are two sites."""
    if measurement.compared:
        figure = relative_norm_histogram(measurement)
        save_figure(figure, folder / files.NORMS_NAME, shares_script=True)


def save_scan_figure(folder: Path) -> None:
    """Write `layer_scan.html` where the folder holds a layer scan."""
    table, figure = (folder / name for name in files.SCAN_NAMES)
    if table.is_file():
        save_figure(layer_curves(LayerScan.load(table)), figure, shares_script=True)


def save_figure(figure: go.Figure, path: Path, *, shares_script: bool = False) -> Path:
    """Write one HTML file that opens without a network, on a light or dark page.

    Args:
        figure: what is drawn.
        path: of the file.
        shares_script: take plotly from `plotly.min.js` in the same folder, which is written where
            it is not there, so that each figure of a folder is small. Else the file stands alone,
            with 4.8 MB of plotly in it.
    """
    script: str | bool = True
    if shares_script:
        script = files.PLOTLY_NAME
        _write_plotly(path.parent / script)
    how = {"include_plotlyjs": script, "full_html": False, "config": {"displaylogo": False}}
    files.write_text(path, _PAGE.format(figure=figure.to_html(**how)))
    return path


def _write_plotly(path: Path) -> None:
    from plotly.offline import get_plotlyjs

    script = get_plotlyjs()
    if not path.is_file() or path.stat().st_size != len(script.encode()):
        files.write_text(path, script)
