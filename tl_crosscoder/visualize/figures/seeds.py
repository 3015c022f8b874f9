"""Agreement over seeds: a matrix of all pairs, and one pair's cosines.

Limit: dictionaries are called by their place unless they are given names.
"""

from collections.abc import Sequence
from typing import Literal

import plotly.graph_objects as go

from tl_crosscoder.analysis.agreement import Agreement, SeedAgreement, SeedAgreements
from tl_crosscoder.visualize.figures.binned import histogram
from tl_crosscoder.visualize.figures.style import (
    COLOURS,
    SCALE,
    NothingToDraw,
    dressed,
    escaped,
    finite,
    lines,
    percent,
)

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
