"""Training curves from `metrics.jsonl`.

Contract: columns as long as there are rows, NaN where a row says nothing; long records are drawn as
means of `N_POINTS` stretches. Limit: figures of single training batches, see `train.metrics`.

Agreement over seeds: a matrix of all pairs, and one pair's cosines.

Limit: dictionaries are called by their place unless they are given names.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_crosscoder.analysis.agreement import Agreement, SeedAgreement, SeedAgreements
from tl_crosscoder.report.figures.latents import histogram
from tl_crosscoder.report.figures.style import (
    COLOURS,
    SCALE,
    NothingToDraw,
    dressed,
    escaped,
    finite,
    lines,
    percent,
    series,
)
from tl_crosscoder.results.measures import spoken

METRICS_NAME = "metrics.jsonl"
N_POINTS = 400
Metrics = Mapping[str, Sequence[float]]


def read_metrics(folder: str | Path) -> dict[str, list[float]]:
    """What a run has logged so far, by name.

    Raises:
        FileNotFoundError: no `metrics.jsonl` there.
        ValueError: a damaged line.
    """
    path = Path(folder) / METRICS_NAME
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
    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.04)
    n_each = math.ceil(len(tokens) / N_POINTS)
    for row, (title, names) in enumerate(panels.items(), 1):
        is_log = _AXES[title].get("type") == "log"
        for i, (name, metric) in enumerate(names.items()):
            figure.add_trace(
                _curve(tokens, metrics[metric], n_each, name=name, i=i, is_log=is_log),
                row=row,
                col=1,
            )
        figure.update_yaxes(title_text=title, row=row, col=1, **_AXES[title])
    figure.update_xaxes(rangemode="tozero")
    figure.update_xaxes(title_text="tokens trained on", row=len(panels), col=1)
    return dressed(
        figure,
        title="Training",
        said=[
            "Single training batches"
            + (f", each point the mean of {n_each} of them." if n_each > 1 else ".")
            + " FVE: fraction of variance explained; below -10 % it is beyond the axis."
        ],
        height=150 * len(panels),
    )


_AXES: dict[str, dict[str, Any]] = {
    "loss a token": {"type": "log", "exponentformat": "power"},
    "FVE": {"range": [-0.1, 1.02], "tickformat": ".0%"},
    "L0 (latents a token)": {"rangemode": "tozero"},
    "dead latents": {"rangemode": "tozero", "tickformat": "~%"},
}


def _panels(metrics: Metrics) -> dict[str, dict[str, str]]:
    """Metrics by the name of their line, by the title of their panel."""
    losses = [m for m in metrics if m == "loss" or m.startswith("loss/")]
    fves = [m for m in metrics if m.startswith("fve/")]
    one = {"L0 (latents a token)": "l0", "dead latents": "dead_share"}
    return {
        "loss a token": {escaped(m.replace("/", ": ")): m for m in losses},
        "FVE": {escaped(f"FVE {spoken(m.removeprefix('fve/'))}"): m for m in fves},
        **{title: {escaped(m): m} if m in metrics else {} for title, m in one.items()},
    }


def _curve(
    tokens: Sequence[float],
    values: Sequence[float],
    n_each: int,
    *,
    name: str,
    i: int,
    is_log: bool,
) -> go.Scatter:
    return go.Scatter(
        x=_means(tokens, n_each),
        y=[v if v is None or not is_log or v > 0 else None for v in _means(values, n_each)],
        mode="lines",
        name=name,
        showlegend=name not in ("l0", "dead_share"),
        line=series(i)["line"],
        hovertemplate="%{x:,.0f} tokens: %{y:.4g}<extra>%{fullData.name}</extra>",
    )


def _means(values: Sequence[float], n_each: int) -> list[float | None]:
    """Of stretches of so many rows, over those that have a value."""
    stretches = (values[i : i + n_each] for i in range(0, len(values), n_each))
    known = ([v for v in stretch if math.isfinite(v)] for stretch in stretches)
    return finite(fmean(own) if own else math.nan for own in known)


Value = Literal["mutual_share_above_0_7", "mutual_share_above_0_9", "mean_max_cosine"]
_TITLES = {
    "mutual_share_above_0_7": "Latents found again: mutual matches above cosine 0.7",
    "mutual_share_above_0_9": "Latents found again: mutual matches above cosine 0.9",
    "mean_max_cosine": "Mean cosine to the nearest latent (MMCS)",
}


def agreement_matrix(
    result: SeedAgreements,
    *,
    value: Value = "mutual_share_above_0_7",
    names: Sequence[str] | None = None,
) -> go.Figure:
    """Which share of each dictionary's latents is in each other dictionary.

    Args:
        result: of `agreement_over_seeds`.
        value: what is drawn; the others are in the hover text.
        names: of the dictionaries, in their order; None is their numbers.

    Raises:
        ValueError: no rows, or not one name a dictionary.
    """
    n = 1 + max((max(r.first, r.second) for r in result.rows), default=-1)
    names = [f"{i}" for i in range(n)] if names is None else names
    labels = ["<br>".join(lines(name, 14)) for name in names]
    if not n:
        raise NothingToDraw("there are no pairs of dictionaries: compare two or more.")
    if value not in _TITLES or len(labels) != n or len(set(labels)) != n:
        raise ValueError(
            f"value {value!r} and names {names} for {n} dictionaries: draw one of {[*_TITLES]}, "
            "and give each dictionary a name of its own."
        )
    at = {(r.first, r.second): r for r in result.rows}
    cells = [[at.get((i, j)) for j in range(n)] for i in range(n)]
    heatmap = go.Heatmap(
        x=labels,
        y=labels,
        z=[finite(float("nan") if c is None else getattr(c, value) for c in row) for row in cells],
        zmin=0,
        zmax=1,
        colorscale=SCALE,
        texttemplate="%{z:.0%}" if value != "mean_max_cosine" else "%{z:.2f}",
        hoverongaps=False,
        hovertext=[["" if c is None else _text(c, names) for c in row] for row in cells],
        hovertemplate="%{hovertext}<extra></extra>",
        colorbar={"thickness": 10, "outlinewidth": 0},
    )
    figure = dressed(
        go.Figure(heatmap),
        title=_TITLES[value],
        said=[f"By {result.by} rows, sites {', '.join(result.sites)}."],
    )
    return figure.update_layout(
        xaxis={"title": {"text": "… are in dictionary"}, "type": "category"},
        yaxis={
            "title": {"text": "latents of dictionary"},
            "type": "category",
            "autorange": "reversed",
        },
    )


def agreement_histogram(result: Agreement) -> go.Figure:
    """How near each latent's nearest latent in the other dictionary is.

    Raises:
        ValueError: no latent has a nearest one.
    """
    known = ~result.cosine.isnan()
    cosine, is_mutual = result.cosine[known], result.is_mutual[known]
    if not len(cosine):
        raise NothingToDraw("no latent has a nearest one in the other dictionary: all are dead.")
    low = -1.0 if bool((cosine < 0).any()) else 0.0
    kinds = {"mutual match": is_mutual, "nearest, but not mutual": ~is_mutual}
    figure = go.Figure(
        [
            histogram(cosine[own], over=(low, 1.0), what="cosine", colour=COLOURS[i], name=name)
            for i, (name, own) in enumerate(kinds.items())
        ]
    )
    share = percent(result.mutual_share(0.7))
    dressed(
        figure,
        title=f"Nearest latents of {len(cosine):,} latents in the other dictionary",
        said=[
            f"By {result.by} rows, sites {', '.join(result.sites)}. Mutual matches above cosine "
            f"0.7: {share}; mean cosine {result.mean_max_cosine():.2f}."
        ],
    )
    return figure.update_layout(
        xaxis={"title": {"text": "cosine to the nearest latent"}},
        yaxis={"title": {"text": "number of latents"}},
        barmode="stack",
        bargap=0,
    )


def _text(row: SeedAgreement, names: Sequence[str]) -> str:
    return (
        f"{row.n_latents:,} latents of {escaped(names[row.first])} in {escaped(names[row.second])}"
        f"<br>mutual above 0.7: {percent(row.mutual_share_above_0_7)}, above 0.9: "
        f"{percent(row.mutual_share_above_0_9)}<br>mean cosine to the nearest "
        f"{row.mean_max_cosine:.3f}"
    )
