"""`CausalTest`: the table of causal tests, a row a set of latents and test.

Contract: plain values, saved as JSON; shares are of the change from base to fine-tuned model, costs
in nats a token of neutral text; `flag` says why a share must not be read as a plain one. Shown are
a table for each test, of curves with a column for each number of latents. Limit: a kind of control
has mean, 95th percentile and p-value, not its draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from tl_crosscoder.interventions.controls import ENOUGH
from tl_crosscoder.results.measures import MEASURES
from tl_crosscoder.results.render import Section
from tl_crosscoder.results.tables import TableOfRows

TESTS = ("necessity", "insert", "steer")
ALL = "all latents"
"""Name of the set of all latents in curves, in which they are a point and no line."""
REACHED = 0.8
"""Share of what passes the hook at which a table says how many latents it takes."""
NOTHING_PASSES = "nothing passes this hook"
FLAGS = {
    NOTHING_PASSES: "replacing the whole activation changes less than 5 % of the "
    "effect, or its interval holds 0",
    "broken model": "the edit raises the cross-entropy of neutral text beyond the bound, so the "
    "behaviour may be gone with everything else",
    "above 100 %": "more than the whole change from one model to the other",
    "broken control": "the model is broken under the strongest control",
    "control above 100 %": "the strongest control, or its 95th percentile, does more than the "
    "whole change",
}
"""Why a share must not be read as a plain one."""

_BRIEF = ("latents", "strength", "share", "share_low", "share_high", "flag",
          "of_reachable", "strongest", "control_mean", "control_high", "p_control_holm",
          "off_target_kl", "off_target_ce")  # fmt: skip
"""Columns that fit into the width of a terminal."""
_NOT_COLUMNS = ("test", "base", "finetuned")


@dataclass(frozen=True, kw_only=True)
class CausalRow:
    """One set of latents in one test; `share` is of the change from base to fine-tuned model."""

    test: str
    """`necessity`, `insert` or `steer`; the last two are sufficiency."""
    latents: str
    """Name of the set, or of a method without latents."""
    n_latents: int
    """Latents, or directions of a method that is compared with them; else 0."""
    strength: float
    """alpha of steering, else NaN."""
    value: float
    """Mean of the effect over prompts under the edit, such as the probability of a behaviour."""
    base: float
    """Mean of the effect in the base model as it is."""
    finetuned: float
    """Mean of the effect in the fine-tuned model as it is."""
    share: float
    """Share of the change that is removed (necessity) or induced (sufficiency)."""
    share_low: float
    share_high: float
    flag: str
    """Why the share must not be read as a plain one, among `FLAGS`; empty where it may."""
    ceiling: float
    """Share for the whole activation of the other model at this hook: what can be reached there."""
    ceiling_low: float
    ceiling_high: float
    of_reachable: float
    """share / ceiling; NaN where nothing passes the hook."""
    strongest: str
    """The strongest kind of control, that of the highest mean share; empty without any."""
    control_mean: float
    """Its mean share."""
    control_high: float
    """Its 95th percentile."""
    effect_size: float
    """Standard deviations of the strongest controls above their mean."""
    p_control: float
    """p-value among the strongest controls."""
    p_control_holm: float
    """`p_control`, corrected for the number of sets in this test."""
    random_mean: float
    """Mean share of isotropic directions; mean, 95th percentile and p-value of a kind that was not
    run are NaN."""
    random_high: float
    p_random: float
    covariance_mean: float
    """Mean share of directions with the covariance of x^1 - x^0."""
    covariance_high: float
    p_covariance: float
    shuffled_mean: float
    """Mean share of other latents' rows at the same codes."""
    shuffled_high: float
    p_shuffled: float
    matched_mean: float
    """Mean share of other latents of the same firing rate; NaN of steering."""
    matched_high: float
    p_matched: float
    null_mean: float
    """Mean share of directions of a null pair's dictionary."""
    null_high: float
    p_null: float
    off_target_kl: float
    """KL to the unedited model on neutral text, nats a token."""
    off_target_low: float
    off_target_high: float
    off_target_ce: float
    """Cross-entropy of neutral text, edited minus unedited model, nats a token."""
    off_target_ce_low: float
    off_target_ce_high: float
    control_off_target_kl: float
    """Mean of the strongest controls."""
    control_off_target_ce: float
    """Mean of the strongest controls."""

    def doubt(self, *, max_p: float = 0.05) -> str:
        """Why the share proves nothing; empty where it does."""
        if self.flag:
            return self.flag
        if not (self.p_control <= max_p and self.share > self.control_high):
            return "controls do as much"
        return "" if self.share_low > 0 else "the interval holds 0"


@dataclass(frozen=True, kw_only=True)
class CausalTest(TableOfRows):
    """Every set in every test, and what the models do unedited."""

    ROW: ClassVar[type] = CausalRow
    rows: tuple[CausalRow, ...]
    effect: str
    """What was measured."""
    unit: str
    """What its values are."""
    n_prompts: int
    n_random: int
    n_matched: int
    first_round: int = 0
    """Controls of each kind in the first round; 0 where all were run. See `ControlSettings`."""
    max_ce_cost: float
    """Bound of `off_target_ce` above which a model is called broken."""
    sets: dict[str, list[int]]
    """The latents of each set."""
    note: str = ""
    """Why there is nothing to cause, where that is so."""

    def least_p(self, row: CausalRow) -> float:
        """The smallest `p_control_holm` that these controls and sets can give; NaN without any."""
        n = self.n_matched if row.strongest == "matched" else self.n_random
        n_sets = sum(r.test == row.test and not math.isnan(r.p_control) for r in self.rows)
        return min(1.0, n_sets / (n + 1)) if row.strongest else math.nan

    def needed(self, test: str, name: str, *, share: float = REACHED) -> CausalRow | None:
        """The smallest set of an order or method that does a share of what passes the hook.

        None where none of those tested does.
        """
        own = [r for r in self.rows if (r.test, r.latents) == (test, name)]
        own = [r for r in own if r.of_reachable >= share]
        return min(own, key=lambda r: r.n_latents, default=None)

    def sections(self) -> list[Section]:
        """A table for each test, as `causal_sections` has them for a terminal."""
        return causal_sections(self, is_brief=True)


def causal_sections(*results: CausalTest, is_brief: bool = False) -> list[Section]:
    """A table for each test and effect; a brief one has the columns that fit into a terminal.

    Tables of one test stand together, and what they have in common is said below the last.
    """
    sections: list[Section] = []
    for test in TESTS:
        own = [result for result in results if any(row.test == test for row in result.rows)]
        sections += _said_once([_section(r, test, is_brief=is_brief) for r in own])
    return sections + [Section(title=result.note) for result in results if result.note]


def _section(result: CausalTest, test: str, *, is_brief: bool) -> Section:
    rows = [row for row in result.rows if row.test == test]
    measure, one, is_curve = MEASURES[test], rows[0], has_curves(rows)
    every = [f.name for f in fields(CausalRow) if f.name not in _NOT_COLUMNS]
    names = _columns(rows, _BRIEF if is_brief else every)
    columns = {name: [getattr(row, name) for row in rows] for name in names}
    title = (
        f"{measure.name.capitalize()}{', by number' if is_curve else ''}: {result.effect} "
        f"({result.unit}: base {one.base:.3g}, fine-tuned {one.finetuned:.3g}; "
        f"{result.n_prompts} prompts)"
    )
    controls = f"{result.n_random} of each kind"
    if result.n_matched:
        controls += f", {result.n_matched} sets of latents that are active as often"
    if result.first_round:
        controls += (
            f"; {result.first_round} of each first, the rest of the strongest kind alone, where "
            f"fewer than {ENOUGH} of these did as much"
        )
    in_curves = (
        f" Controls, of the first order alone and their 95th percentile: {controls}. For 80%: the "
        "smallest number tested that does 80 % of the ceiling, and its cost."
    )
    said = in_curves if is_curve else f" Controls: {controls}."
    notes = (f"{measure.meaning}{said}", *causal_notes(result, rows))
    return Section(
        title=title, columns=_by_number(result, rows) if is_curve else columns, notes=notes
    )


def _by_number(result: CausalTest, rows: Sequence[CausalRow]) -> dict[str, list[Any]]:
    """A line for each order or method, a column for each number of latents or directions."""
    test, curves = rows[0].test, dict[str, dict[int, CausalRow]]()
    for row in rows:
        if row.latents != ALL:
            curves.setdefault(row.latents, {})[row.n_latents] = row
    sizes = sorted({n for own in curves.values() for n in own})
    lines = [(name, own, "share") for name, own in curves.items()]
    lines += [
        (f"controls of {name}", own, "control_high")
        for name, own in curves.items()
        if any(row.strongest for row in own.values())
    ]
    needed = [result.needed(test, name) for name, _, _ in lines]
    return {
        "latents": [name for name, _, _ in lines],
        **{
            f"{test}@{n}": [
                getattr(own[n], field) if n in own else math.nan for _, own, field in lines
            ]
            for n in sizes
        },
        "n_needed": [None if row is None else row.n_latents for row in needed],
        "off_target_kl": [math.nan if row is None else row.off_target_kl for row in needed],
    }


def _said_once(sections: Sequence[Section]) -> list[Section]:
    """Sections of which no note is one of a later section."""
    later = [{note for s in sections[i + 1 :] for note in s.notes} for i in range(len(sections))]
    return [
        replace(section, notes=[note for note in section.notes if note not in said])
        for section, said in zip(sections, later, strict=True)
    ]


def _columns(rows: Sequence[CausalRow], names: Sequence[str]) -> list[str]:
    """Those of a table that say something, or that a terminal has space for."""
    is_steered = rows[0].test == "steer"
    absent = {
        "strength": not is_steered,
        "flag": not any(row.flag for row in rows),
        # A direction at every token is no exchange of activations: the ceiling is not one of it.
        "of_reachable": is_steered,
    }
    return [name for name in names if not absent.get(name)]


def has_curves(rows: Sequence[CausalRow]) -> bool:
    """Whether rows hold a method at several numbers of latents or directions."""
    return len({row.latents for row in rows}) < len({(row.latents, row.n_latents) for row in rows})


def causal_notes(
    result: CausalTest, rows: Sequence[CausalRow], *, is_table: bool = True
) -> list[str]:
    """The ceiling of a test, and what flags mean; of a figure only what is not drawn in it."""
    one, said = rows[0], {flag for row in rows for flag in row.flag.split("; ")}
    ceiling = f"{one.ceiling:.0%} [{one.ceiling_low:.0%}, {one.ceiling_high:.0%}]"
    of_hook = (
        f"Replacing the whole activation at this hook changes {ceiling} of the effect: the ceiling."
        if NOTHING_PASSES not in said
        else f"Nothing passes this hook: replacing the whole activation there changes {ceiling} of "
        "the effect, so shares here mean nothing. Choose another hook."
    )
    bound = f" (bound: {result.max_ce_cost:g} nats a token)"
    is_known = not math.isnan(one.ceiling)
    notes = [of_hook] if (is_table and is_known) or NOTHING_PASSES in said else []
    every = [row for row in rows if row.latents == ALL and is_table]
    notes += [
        f"All {row.n_latents:,} latents together: {row.share:.0%} [{row.share_low:.0%}, "
        f"{row.share_high:.0%}]."
        for row in every
    ]
    return notes + [
        f"{flag.capitalize()}{_places(rows, flag) if is_table else ''}: {meaning}"
        f"{bound if 'broken' in flag else ''}."
        for flag, meaning in FLAGS.items()
        if flag in said and flag != NOTHING_PASSES
    ]


def _places(rows: Sequence[CausalRow], flag: str) -> str:
    """At which numbers of latents or directions, where these are columns."""
    if not has_curves(rows):
        return ""
    own: dict[str, list[str]] = {}
    for row in rows:
        if flag in row.flag.split("; "):
            own.setdefault(row.latents, []).append(str(row.n_latents))
    return " ({})".format("; ".join(f"{name} at {', '.join(ns)}" for name, ns in own.items()))
