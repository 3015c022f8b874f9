"""What `patch`, `ablate`, `steer` and `baselines` found, as the report's tables and first words.

Contract: read from the JSON files of a run's folder; a table is columns by the names of the fields
of results, which `html_tables` shows with their units. Limit: nothing is tested here; what is not
there is named with the command that makes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from tl_crosscoder.interventions.patching import PatchingResult, PatchingRow
from tl_crosscoder.interventions.trials import CausalRow, CausalTest
from tl_crosscoder.report.terminal import spoken

TESTS = {
    "necessity": "Taken out of the fine-tuned model: share of the change that goes",
    "insert": "What they add put into the base model: share of the change that comes",
    "steer": "The base model steered by them: share of the change that comes",
}
"""What each test of `CausalTest` asks."""
_COMMANDS = {
    "patching": "KL recovery: `tl-crosscoder patch`",
    "ablation_*": "necessity: `tl-crosscoder ablate`",
    "sufficiency_*": "sufficiency: `tl-crosscoder steer`",
    "baselines_*": "methods without a dictionary: `tl-crosscoder baselines`",
}
_PATCHING = ("kl", "kl_low", "kl_high", "recovery", "recovery_low", "recovery_high")


@dataclass(frozen=True, kw_only=True)
class CauseTable:
    """One table."""

    title: str
    note: str
    columns: dict[str, list[Any]]


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """The largest set of latents that was patched."""

    variant: str
    n_latents: int
    tokens: str
    share: float
    share_low: float
    share_high: float


@dataclass(frozen=True, kw_only=True)
class Tested:
    """The largest set of latents in one test."""

    effect: str
    unit: str
    row: CausalRow


@dataclass(frozen=True, kw_only=True)
class Causes:
    """All that was tested."""

    recovered: Recovered | None
    tested: list[Tested]
    """Necessity and insertion, where they were tested."""
    tables: list[CauseTable]
    missing: list[str]
    """What was not tested, with its command."""


def causes_of(folder: Path) -> Causes:
    """Read what is there. Raises ValueError for a file that is no result."""
    patching = folder / "patching.json"
    result = PatchingResult.load(patching) if patching.is_file() else None
    tests = {
        path.stem: CausalTest.load(path)
        for pattern in _COMMANDS
        if pattern != "patching"
        for path in sorted(folder.glob(f"{pattern}.json"))
    }
    tables = [] if result is None else _patching_tables(result)
    return Causes(
        recovered=None if result is None else _recovered(result),
        tested=[found for test in ("necessity", "insert") if (found := _largest(tests, test))],
        tables=tables + [t for name, test in tests.items() for t in _test_tables(name, test)],
        missing=[said for pattern, said in _COMMANDS.items()
                 if not any(folder.glob(f"{pattern}.json"))],
    )  # fmt: skip


def _recovered(result: PatchingResult) -> Recovered | None:
    """Of the sets that were asked for, or else of the candidates."""
    kind = result.rows[0].tokens
    sets = [r for r in result.rows if r.tokens == kind and r.n_latents]
    chosen = [r for r in sets if r.group == "chosen"]
    chosen = chosen or [r for r in sets if r.variant == "candidates"]
    if not chosen:
        return None
    row = max(chosen, key=lambda r: r.n_latents)
    return Recovered(
        variant=row.variant,
        n_latents=row.n_latents,
        tokens=row.tokens,
        share=row.recovery,
        share_low=row.recovery_low,
        share_high=row.recovery_high,
    )


def _largest(tests: dict[str, CausalTest], test: str) -> Tested | None:
    """The largest set in a test, on a behaviour where one was measured."""
    for name in sorted(tests, key=lambda name: not name.endswith("behaviour")):
        rows = [r for r in tests[name].rows if r.test == test]
        if rows and not name.startswith("baselines"):
            row = max(rows, key=lambda r: r.n_latents)
            return Tested(effect=tests[name].effect, unit=tests[name].unit, row=row)
    return None


def _patching_tables(result: PatchingResult) -> list[CauseTable]:
    """One for each kind of predicted token."""
    base, finetuned = map(spoken, result.compared)
    tables = []
    for kind in dict.fromkeys(row.tokens for row in result.rows):
        rows = [row for row in result.rows if row.tokens == kind]
        note = (
            f"The {finetuned} model goes on from a patched stream: KL to what it predicts as it is,"
            f" and the share of the {base} stream's KL that the patch takes away. "
            f"{rows[0].n_tokens:,} tokens of {rows[0].n_prompts} prompts. Of random draws: the "
            f"mean, in brackets the least and the most. Candidates: {result.candidates}."
        )
        own = [r for r in rows if r.group != "random"]
        columns = {
            "variant": [r.variant for r in own],
            "n_latents": [r.n_latents or None for r in own],
            **{name: [getattr(r, name) for r in own] for name in _PATCHING},
        }
        for name, drawn in _by_kind([r for r in rows if r.group == "random"]).items():
            columns["variant"].append(f"{name}, {len(drawn)} draws")
            columns["n_latents"].append(drawn[0].n_latents)
            for stem in ("kl", "recovery"):
                values = [getattr(r, stem) for r in drawn]
                ends = {"": fmean(values), "_low": min(values), "_high": max(values)}
                for end, value in ends.items():
                    columns[f"{stem}{end}"].append(value)
        tables.append(CauseTable(title=f"KL recovery, {kind} tokens", note=note, columns=columns))
    return tables


def _by_kind(rows: Sequence[PatchingRow]) -> dict[str, list[PatchingRow]]:
    """Draws of one kind differ by a number at the end of their names."""
    found: dict[str, list[PatchingRow]] = {}
    for row in rows:
        found.setdefault(row.drawn_as, []).append(row)
    return found


def _test_tables(name: str, result: CausalTest) -> list[CauseTable]:
    """One a test of one file."""
    controls = f"{result.n_random} norm-matched random directions"
    if result.n_matched:
        controls += f" and {result.n_matched} sets of latents of the same firing rate"
    prefix = "Without a dictionary. " if name.startswith("baselines") else ""
    tables = []
    for test in dict.fromkeys(row.test for row in result.rows):
        rows = [row for row in result.rows if row.test == test]
        note = (
            f"{result.effect} ({result.unit}): base {rows[0].base:.3g}, fine-tuned "
            f"{rows[0].finetuned:.3g}, on {result.n_prompts} prompts. Controls: {controls}."
        )
        names = [f.name for f in fields(CausalRow) if f.name not in ("test", "base", "finetuned")]
        columns = {n: [getattr(row, n) for row in rows] for n in names}
        tables.append(
            CauseTable(title=f"{prefix}{TESTS.get(test, test)}", note=note, columns=columns)
        )
    return tables
