"""Figures of training: curves from `metrics.jsonl`, and how well other seeds find the same latents.

Contract: metrics are columns as long as there are rows, NaN where a row has no value; long records
are drawn as means of `N_POINTS` stretches. Limit: values are of single training batches.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_crosscoder import files
from tl_crosscoder.analysis.agreement import Agreement, SeedAgreements
from tl_crosscoder.files import METRICS_NAME
from tl_crosscoder.report.figures.latents import cosine_range, histogram
from tl_crosscoder.report.figures.style import (
    SCALE,
    Figure,
    NothingToDraw,
    dressed,
    finite,
    lines,
    one_line,
    series,
)
from tl_crosscoder.results.measures import spoken

N_POINTS = 400
Metrics = Mapping[str, Sequence[float]]


def read_metrics(folder: str | Path) -> dict[str, list[float]]:
    """Metrics that a run has logged so far, by name.

    Raises:
        FileNotFoundError: no `metrics.jsonl` there.
        ValueError: a damaged line.
    """
    path = files.user_path(folder) / METRICS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: give the folder of a run, or train with an output folder."
        )
    text = path.read_text(encoding="utf-8")
    # A run that is still at work may be in the middle of its last line.
    complete, rows = text[: text.rfind("\n") + 1].splitlines(), []
    for i, line in enumerate(complete, 1):
        try:
            rows.append(
                {k: math.nan if v is None else float(v) for k, v in json.loads(line).items()}
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"line {i} of {path} is damaged ({error}): delete that line."
            ) from error
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, math.nan) for row in rows] for name in names}


_AXES: dict[str, dict[str, Any]] = {
    "loss a token": {"type": "log", "exponentformat": "power"},
    "FVE": {"range": [-0.1, 1.02], "tickformat": ".0%"},
    "L0 (latents a token)": {"rangemode": "tozero"},
    "dead latents": {"rangemode": "tozero", "tickformat": "~%"},
}


def training_curves(metrics: Metrics) -> go.Figure:
    """Loss, FVE, L0 and dead latents against the tokens trained on.

    Args:
        metrics: as `read_metrics` reads them; panels without a metric are left out.

    Raises:
        ValueError: no rows, or nothing that these panels show.
    """
    tokens = metrics.get("n_tokens", ())
    panels = {title: names for title, names in _panels(metrics).items() if names}
    if not len(tokens) or not panels:
        raise NothingToDraw(
            f"these metrics have {len(tokens)} rows and the names {sorted(metrics)}: give those of "
            "a run that has trained for a step."
        )
    figure = make_subplots(
        rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.04, figure=Figure()
    )
    n_each = math.ceil(len(tokens) / N_POINTS)
    for row, (title, names) in enumerate(panels.items(), 1):
        for i, (name, metric) in enumerate(names.items()):
            values = _means(metrics[metric], n_each)
            if _AXES[title].get("type") == "log":
                values = [None if v is None or v <= 0 else v for v in values]
            trace = go.Scatter(
                x=_means(tokens, n_each),
                y=values,
                mode="lines",
                name=name,
                showlegend=metric not in ("l0", "dead_share"),
                line=series(i)["line"],
                hovertemplate="%{x:,.0f} tokens: %{y:.4g}<extra>%{fullData.name}</extra>",
            )
            figure.add_trace(trace, row=row, col=1)
        figure.update_yaxes(title_text=title, row=row, col=1, **_AXES[title])
    figure.update_xaxes(rangemode="tozero")
    figure.update_xaxes(title_text="tokens trained on", row=len(panels), col=1)
    means = f", each point the mean of {n_each} of them" if n_each > 1 else ""
    note = (
        f"Single training batches{means}. FVE: fraction of variance explained; below -10 % it is "
        "beyond the axis."
    )
    return dressed(figure, title="Training", notes=[note], height=150 * len(panels))


def _panels(metrics: Metrics) -> dict[str, dict[str, str]]:
    """Metrics by the name of their line, by the title of their panel."""
    losses = [m for m in metrics if m == "loss" or m.startswith("loss/")]
    fves = [m for m in metrics if m.startswith("fve/")]
    one = {"L0 (latents a token)": "l0", "dead latents": "dead_share"}
    return {
        "loss a token": {one_line(m.replace("/", ": ")): m for m in losses},
        "FVE": {one_line(f"FVE {spoken(m.removeprefix('fve/'))}"): m for m in fves},
        **{title: {m: m} if m in metrics else {} for title, m in one.items()},
    }


def _means(values: Sequence[float], n_each: int) -> list[float | None]:
    """Means of stretches of so many rows, over those that have a value."""
    stretches = (values[i : i + n_each] for i in range(0, len(values), n_each))
    known = ([v for v in stretch if math.isfinite(v)] for stretch in stretches)
    return finite(fmean(own) if own else math.nan for own in known)


def agreement_matrix(result: SeedAgreements, *, names: Sequence[str] | None = None) -> go.Figure:
    """Share of each dictionary's latents with a mutual match above cosine 0.7 in each other one.

    Args:
        result: of `agreement_over_seeds`.
        names: of the dictionaries, in their order; None is their numbers.

    Raises:
        ValueError: no rows, or not one name a dictionary.
    """
    n = 1 + max((max(r.first, r.second) for r in result.rows), default=-1)
    if not n:
        raise NothingToDraw("there are no pairs of dictionaries: compare two or more.")
    called = [f"{i}" for i in range(n)] if names is None else [*names]
    labels = ["<br>".join(lines(name, 14)) for name in called]
    if len(labels) != n or len(set(labels)) != n:
        raise ValueError(f"names {called} for {n} dictionaries: give each dictionary its own name.")
    shares: list[list[float | None]] = [[None] * n for _ in range(n)]
    texts = [[""] * n for _ in range(n)]
    for row in result.rows:
        shares[row.first][row.second] = row.mutual_share_above_0_7
        texts[row.first][row.second] = (
            f"{row.n_latents:,} latents of {one_line(called[row.first])} in "
            f"{one_line(called[row.second])}<br>"
            f"mutual above 0.7: {row.mutual_share_above_0_7:.1%}, "
            f"above 0.9: {row.mutual_share_above_0_9:.1%}<br>mean cosine to the nearest "
            f"{row.mean_max_cosine:.3f}"
        )
    heatmap = go.Heatmap(
        x=labels,
        y=labels,
        z=[finite(math.nan if v is None else v for v in row) for row in shares],
        zmin=0,
        zmax=1,
        colorscale=SCALE,
        texttemplate="%{z:.0%}",
        hoverongaps=False,
        hovertext=texts,
        hovertemplate="%{hovertext}<extra></extra>",
        colorbar={"thickness": 10, "outlinewidth": 0},
    )
    figure = Figure(heatmap)
    figure.update_xaxes(title_text="… are in dictionary", type="category")
    figure.update_yaxes(title_text="latents of dictionary", type="category", autorange="reversed")
    return dressed(
        figure,
        title="Latents found again: mutual matches above cosine 0.7",
        notes=[f"By {result.by} rows, sites {', '.join(result.sites)}."],
    )


def agreement_histogram(result: Agreement) -> go.Figure:
    """Number of latents by the cosine to the nearest latent of the other dictionary.

    Raises ValueError where no latent has a nearest one.
    """
    known = ~result.cosine.isnan()
    cosine, is_mutual = result.cosine[known], result.is_mutual[known]
    if not len(cosine):
        raise NothingToDraw("no latent has a nearest one in the other dictionary: all are dead.")
    kinds = {"mutual match": cosine[is_mutual], "nearest, but not mutual": cosine[~is_mutual]}
    figure = histogram(kinds, over=cosine_range(cosine), what="cosine")
    figure.update_xaxes(title_text="cosine to the nearest latent")
    return dressed(
        figure,
        title=f"Nearest latents of {len(cosine):,} latents in the other dictionary",
        notes=[
            f"By {result.by} rows, sites {', '.join(result.sites)}. Mutual matches above cosine "
            f"0.7: {result.mutual_share(0.7):.1%}; mean cosine {result.mean_max_cosine():.2f}."
        ],
    )
