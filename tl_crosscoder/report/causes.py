"""Results of interventions as sections: KL recovery, and causal tests with their controls.

Contract: results in, `Section`s out, one of one kind of predicted token or one test, with intervals
and controls; a share that must not be read as a plain one has its flag beside it and is explained
below the table. Limit: nothing is measured here; what is not in a run's folder is named with the
command that makes it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean

from tl_crosscoder.baselines.difference import ActivationDifference
from tl_crosscoder.files import CHANGES_NAME, PATCHING_NAME
from tl_crosscoder.interventions.causal_rows import FLAGS, NOTHING_PASSES, CausalRow, CausalTest
from tl_crosscoder.interventions.changes_result import Changes
from tl_crosscoder.interventions.patching import PatchingResult, PatchingRow
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.results.measures import MEASURES, spoken
from tl_crosscoder.results.render import Section

_COMMANDS = {
    "changes": "what changed: `tl-crosscoder changes`",
    "patching": "KL recovery: `tl-crosscoder patch`",
    "ablation_*": "necessity: `tl-crosscoder ablate`",
    "sufficiency_*": "sufficiency: `tl-crosscoder steer`",
    "baselines_*": "methods without a dictionary: `tl-crosscoder baselines`",
}
_PATCHING = ("variant", "n_latents", "kl", "kl_low", "kl_high",
             "recovery", "recovery_low", "recovery_high")  # fmt: skip
_BRIEF = ("latents", "n_latents", "strength", "share", "share_low", "share_high", "flag",
          "of_reachable", "strongest", "control_mean", "control_high", "p_control_holm",
          "off_target_kl", "off_target_ce")  # fmt: skip
"""Columns that fit into the width of a terminal."""
_NOT_COLUMNS = ("test", "base", "finetuned")


def with_mean_draws(rows: Sequence[PatchingRow]) -> list[PatchingRow]:
    """Rows of one kind of token, the draws of each random control as one row.

    That row has their mean, and the lowest and highest draw in place of an interval.
    """
    draws: dict[str, list[PatchingRow]] = {}
    for row in rows:
        if row.group == "random":  # a draw's name ends with its number
            draws.setdefault(row.variant.rstrip("0123456789 "), []).append(row)
    found = [row for row in rows if row.group != "random"]
    for name, drawn in draws.items():
        kl, recovery = [r.kl for r in drawn], [r.recovery for r in drawn]
        found.append(
            replace(
                drawn[0],
                variant=f"{name}, {len(drawn)} draws",
                kl=fmean(kl),
                kl_low=min(kl),
                kl_high=max(kl),
                recovery=fmean(recovery),
                recovery_low=min(recovery),
                recovery_high=max(recovery),
            )
        )
    return found


def patching_sections(result: PatchingResult) -> list[Section]:
    """KL and recovery of every variant, a table for each kind of predicted token."""
    base, finetuned = map(spoken, result.compared)
    sections = []
    for kind in dict.fromkeys(row.tokens for row in result.rows):
        own = [row for row in result.rows if row.tokens == kind]
        rows = with_mean_draws(own)
        columns = {name: [getattr(row, name) for row in rows] for name in _PATCHING}
        columns["n_latents"] = [row.n_latents or None for row in rows]
        notes = (
            f"KL of the {finetuned} model to itself with a patched activation, and the share of "
            f"the KL of the {base} activation that the patch removes; 95 % intervals over prompts, "
            "of random draws the lowest and the highest.",
            f"Candidates: {result.candidates}.",
        )
        title = (
            f"KL recovery on {kind} tokens ({own[0].n_tokens:,} tokens of {own[0].n_prompts:,} "
            "prompts)"
        )
        sections.append(Section(title=title, columns=columns, notes=notes))
    return sections


def causal_sections(result: CausalTest, *, is_brief: bool = False) -> list[Section]:
    """A table for each test; a brief one has the columns that fit into a terminal."""
    controls = f"{result.n_random} of each kind"
    if result.n_matched:
        controls += f", {result.n_matched} sets of latents that are active as often"
    every = [f.name for f in fields(CausalRow) if f.name not in _NOT_COLUMNS]
    sections = []
    for test in dict.fromkeys(row.test for row in result.rows):
        rows = [row for row in result.rows if row.test == test]
        names = _columns(rows, _BRIEF if is_brief else every)
        measure, one = MEASURES[test], rows[0]
        title = (
            f"{measure.name.capitalize()}: {result.effect} ({result.unit}: base {one.base:.3g}, "
            f"fine-tuned {one.finetuned:.3g})"
        )
        notes = (
            f"{measure.meaning} {result.n_prompts} prompts; controls: {controls}.",
            *causal_notes(result, rows),
        )
        columns = {name: [getattr(row, name) for row in rows] for name in names}
        sections.append(Section(title=title, columns=columns, notes=notes))
    return sections


def _columns(rows: Sequence[CausalRow], names: Sequence[str]) -> list[str]:
    """Those of a table that say something, or that a terminal has space for."""
    is_steered, is_curve = rows[0].test == "steer", has_curves(rows)
    absent = {
        "strength": not is_steered,
        "flag": not any(row.flag for row in rows),
        "of_reachable": is_steered and names is _BRIEF,
        "n_latents": not is_curve and names is _BRIEF,
        "p_control_holm": is_curve and names is _BRIEF,
    }
    return [name for name in names if not absent.get(name)]


def has_curves(rows: Sequence[CausalRow]) -> bool:
    """Whether rows hold a method at several numbers of latents or directions."""
    return len({row.latents for row in rows}) < len({(row.latents, row.n_latents) for row in rows})


def causal_notes(
    result: CausalTest, rows: Sequence[CausalRow], *, has_ceiling: bool = True
) -> list[str]:
    """The ceiling of a test, where asked for or where nothing passes, and what flags mean."""
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
    notes = [of_hook] if (has_ceiling and is_known) or NOTHING_PASSES in said else []
    return notes + [
        f"{flag.capitalize()}: {meaning}{bound if 'broken' in flag else ''}."
        for flag, meaning in FLAGS.items()
        if flag in said and flag != NOTHING_PASSES
    ]


def lens_section(adl: ActivationDifference, models: ModelPair) -> Section:
    """Tokens that the mean difference promotes, by position (Minder et al. 2025, 2510.13900)."""
    rows, which = adl.logit_lens(models, n=8).rows, adl.which()
    tokens = [
        ", ".join(repr(r.token) for r in rows if r.latent == i and r.is_promoted)
        for i in range(len(which))
    ]
    lines = [f"  {adl.label(w)}: {found}" for w, found in zip(which, tokens, strict=True)]
    title = "Tokens that the mean difference promotes, by position in the context"
    return Section(title=title, notes=lines)


@dataclass(frozen=True, kw_only=True)
class Causes:
    """Everything that was tested on a run's dictionary."""

    recovered: PatchingRow | None
    """The largest set of latents that was patched."""
    tested: list[tuple[CausalTest, CausalRow]]
    """The largest set of latents in the tests of necessity and of insertion."""
    sections: list[Section]
    missing: list[str]
    """Tests that were not run, with their commands."""


def causes_of(folder: Path) -> Causes:
    """Read the results in a folder. Raises ValueError for a file that is not a result."""
    patching = folder / PATCHING_NAME
    result = PatchingResult.load(patching) if patching.is_file() else None
    tests = {
        path.stem: CausalTest.load(path)
        for pattern in _COMMANDS
        if pattern not in ("changes", "patching")
        for path in sorted(folder.glob(f"{pattern}.json"))
    }
    changes = folder / CHANGES_NAME
    found = Changes.load(changes) if changes.is_file() else None
    sections = found.sections()[-1:] if found is not None and found.rows else []
    sections += [] if result is None else patching_sections(result)
    for name, test in tests.items():
        is_curve = has_curves(test.rows)
        prefix = "At equal numbers of directions. " if is_curve else "Without a dictionary. "
        prefix = prefix if name.startswith("baselines") else ""
        sections += [replace(s, title=f"{prefix}{s.title}") for s in causal_sections(test)]
    return Causes(
        recovered=None if result is None else _recovered(result),
        tested=[found for test in ("necessity", "insert") if (found := _largest(tests, test))],
        sections=sections,
        missing=[how for pattern, how in _COMMANDS.items()
                 if not any(folder.glob(f"{pattern}.json"))],
    )  # fmt: skip


def _recovered(result: PatchingResult) -> PatchingRow | None:
    """The largest of the chosen sets, or else the candidates."""
    kind = result.rows[0].tokens
    sets = [r for r in result.rows if r.tokens == kind and r.n_latents]
    chosen = [r for r in sets if r.group == "chosen"]
    chosen = chosen or [r for r in sets if r.variant == "candidates"]
    return max(chosen, key=lambda r: r.n_latents, default=None)


def _largest(tests: dict[str, CausalTest], test: str) -> tuple[CausalTest, CausalRow] | None:
    """The largest set in a test, on a behaviour where one was measured."""
    for name in sorted(tests, key=lambda name: not name.endswith("behaviour")):
        rows = [r for r in tests[name].rows if r.test == test]
        if rows and not name.startswith("baselines"):
            return tests[name], max(rows, key=lambda r: r.n_latents)
    return None
