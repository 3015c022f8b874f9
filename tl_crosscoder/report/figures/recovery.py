"""`recovery_bars`: bars of KL recovery, by group of variants and kind of predicted token.

Contract: intervals are those of the results; draws of a random control are one bar, with the lowest
and the highest draw in place of an interval. Limit: bars beyond -100 % or 150 % are cut, and a note
says so.
"""

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from tl_crosscoder.interventions.patching import PatchingResult, PatchingRow
from tl_crosscoder.report.causes import with_mean_draws
from tl_crosscoder.report.figures.style import (
    COLOURS,
    GREY,
    Figure,
    NothingToDraw,
    axis_label,
    dressed,
    error_bars,
    finite,
    hover,
    one_line,
    share_axis,
)
from tl_crosscoder.results.measures import spoken

_HEADINGS = {
    "dictionary": "Whole dictionary",
    "candidates": "Candidates",
    "places": "Some tokens",
    "random": "Random controls",
    "chosen": "Chosen latents",
}
_ROW_PIXELS = 16
_SHOWN = ("variant", "n_latents", "tokens", "n_tokens", "n_prompts", "recovery", "recovery_low",
          "recovery_high", "kl", "kl_low", "kl_high")  # fmt: skip
Name = tuple[str, str | None]
"""A group and its variant; None is the group's heading."""


def recovery_bars(result: PatchingResult) -> go.Figure:
    """KL recovery of each patch, a bar a variant and kind of predicted token.

    Draws of a random control are one bar, with the lowest and the highest draw as its interval.
    Raises ValueError where no row has a recovery, as of equal models.
    """
    kinds = list(dict.fromkeys(r.tokens for r in result.rows))
    every = {kind: [r for r in result.rows if r.tokens == kind] for kind in kinds}
    # Recovery is measured from the base activation, which therefore has no bar.
    known = [r for kind in kinds for r in with_mean_draws(_known(every[kind]))]
    rows = [r for r in known if r.variant != "base stream"]
    if not rows:
        raise NothingToDraw(
            "no variant has a recovery: the models predict alike, or nothing was patched."
        )
    axis, beyond = share_axis([r.recovery for r in rows] + [r.recovery_low for r in rows])
    places = _places(rows)
    figure = Figure()
    for i, kind in enumerate(kinds):
        own = [r for r in rows if r.tokens == kind]
        if own:
            y = [places[r.group, r.variant] + i - (len(kinds) - 1) / 2 for r in own]
            figure.add_trace(_bars(own, y, name=_kind_name(every[kind]), colour=COLOURS[i % 4]))
    n_unknown = len(result.rows) - len(_known(result.rows))
    finetuned = spoken(result.compared[1])
    labels = [f"<b>{one_line(_HEADINGS.get(g, g))}</b>" if v is None else axis_label(v)
              for g, v in places]  # fmt: skip
    figure.update_yaxes(tickvals=[*places.values()], ticktext=labels, showgrid=False)
    figure.update_yaxes(range=[max(places.values()) + 1, -1])
    figure.update_xaxes(title_text="KL recovery (share)", **axis)
    figure.update_layout(barmode="overlay")
    return dressed(
        figure,
        title="KL recovery: what is recovered by each patch",
        notes=[
            f"1 - KL({finetuned} ‖ patched) / KL({finetuned} ‖ base activation), nats a token; 95 "
            f"% intervals over {rows[0].n_prompts} prompts; random controls: lowest to highest "
            "draw.",
            f"Candidates: {result.candidates}.",
            *beyond,
            *([f"{n_unknown} rows without a value are left out."] if n_unknown else []),
        ],
        height=int(max(places.values()) * _ROW_PIXELS) + 30,
    )


def _known(rows: Sequence[PatchingRow]) -> list[PatchingRow]:
    return [r for r in rows if not math.isnan(r.recovery)]


def _places(rows: Sequence[PatchingRow]) -> dict[Name, float]:
    """Where variants, and the headings of their groups, stand, in rows from the top."""
    places: dict[Name, float] = {}
    n_kinds = len({r.tokens for r in rows})
    place = 0.0
    for group in dict.fromkeys(r.group for r in rows):
        places[group, None] = place
        place += 1.2
        for variant in dict.fromkeys(r.variant for r in rows if r.group == group):
            size = max(n_kinds, axis_label(variant).count("<br>") + 1)
            places[group, variant] = place + (size - 1) / 2
            place += size + 0.4
        place += 0.5
    return places


def _bars(rows: Sequence[PatchingRow], y: list[float], *, name: str, colour: str) -> go.Bar:
    values = [r.recovery for r in rows]
    bars = error_bars(values, [r.recovery_low for r in rows], [r.recovery_high for r in rows])
    return go.Bar(
        x=finite(values),
        y=y,
        orientation="h",
        width=0.9,
        name=name,
        showlegend=True,
        marker={"color": colour, "line": {"width": 0}},
        error_x=bars | {"color": GREY},
        **hover({field: [getattr(r, field) for r in rows] for field in _SHOWN}),
    )


def _kind_name(rows: Sequence[PatchingRow]) -> str:
    base = [f"; base activation {r.kl:.3g} nats" for r in rows if r.variant == "base stream"]
    return one_line(f"{rows[0].tokens} ({rows[0].n_tokens:,} tokens{''.join(base)})")
