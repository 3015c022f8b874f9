"""Results of interventions as sections: KL recovery, and causal tests with their controls.

Contract: results in, `Section`s out, one of one kind of predicted token or one test, with intervals
and controls; a share that must not be read as a plain one has its flag beside it and is explained
below the table. Limit: nothing is measured here; what is not in a run's folder is named with the
command that makes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from tl_crosscoder.baselines.difference import ActivationDifference
from tl_crosscoder.baselines.generations import Generations
from tl_crosscoder.baselines.mining import DiffMining
from tl_crosscoder.files import CHANGES_NAME, GENERATIONS_NAMES, MINED_NAME, PATCHING_NAME
from tl_crosscoder.interventions.causal_rows import (
    CausalRow,
    CausalTest,
    causal_sections,
    has_curves,
)
from tl_crosscoder.interventions.changes_result import Changes
from tl_crosscoder.interventions.patching import PatchingResult, PatchingRow
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.results.measures import spoken
from tl_crosscoder.results.render import Section
from tl_crosscoder.run.causal import causal_files

_COMMANDS = {
    "changes": "what changed: `tl-crosscoder changes`",
    "patching": "KL recovery: `tl-crosscoder patch`",
    "ablation_*": "necessity: `tl-crosscoder ablate`",
    "sufficiency_*": "sufficiency: `tl-crosscoder steer`",
    "curves_*": "how many latents it takes: `tl-crosscoder curves`",
    "baselines_*": "methods without a dictionary: `tl-crosscoder baselines`",
}
_PATCHING = ("variant", "n_latents", "kl", "kl_low", "kl_high",
             "recovery", "recovery_low", "recovery_high")  # fmt: skip


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
    """The largest set of latents in the tests of necessity and of insertion: of every behaviour, of
    predictions where there is none."""
    sections: list[Section]
    missing: list[str]
    """Tests that were not run, with their commands."""


def causes_of(folder: Path) -> Causes:
    """Read the results in a folder. Raises ValueError for a file that is not a result."""
    patching = folder / PATCHING_NAME
    result = PatchingResult.load(patching) if patching.is_file() else None
    tests = {path.stem: CausalTest.load(path) for path in causal_files(folder)}
    changes = folder / CHANGES_NAME
    found = Changes.load(changes) if changes.is_file() else None
    sections = found.sections()[-1:] if found is not None and found.rows else []
    sections += [] if result is None else patching_sections(result)
    headings = {name: _heading(name, test) for name, test in tests.items()}
    for heading in dict.fromkeys(headings.values()):
        own = [test for name, test in tests.items() if headings[name] == heading]
        sections += [replace(s, title=f"{heading}{s.title}") for s in causal_sections(*own)]
    texts = {MINED_NAME: DiffMining, **dict.fromkeys(GENERATIONS_NAMES, Generations)}
    for name, kind in texts.items():
        if (folder / name).is_file():
            sections += kind.load(folder / name).sections()
    return Causes(
        recovered=None if result is None else _recovered(result),
        tested=[found for test in ("necessity", "insert") for found in _largest(tests, test)],
        sections=sections,
        missing=[how for pattern, how in _COMMANDS.items()
                 if not any(folder.glob(f"{pattern}.json"))],
    )  # fmt: skip


def _heading(name: str, result: CausalTest) -> str:
    """What stands before the title of a test's sections."""
    is_without = name.startswith("baselines") and not has_curves(result.rows)
    return "Without a dictionary. " if is_without else ""


def _recovered(result: PatchingResult) -> PatchingRow | None:
    """The largest of the chosen sets, or else the candidates."""
    kind = result.rows[0].tokens
    sets = [r for r in result.rows if r.tokens == kind and r.n_latents]
    chosen = [r for r in sets if r.group == "chosen"]
    chosen = chosen or [r for r in sets if r.variant == "candidates"]
    return max(chosen, key=lambda r: r.n_latents, default=None)


def _largest(tests: dict[str, CausalTest], test: str) -> list[tuple[CausalTest, CausalRow]]:
    """The largest set in a test, on every behaviour where one was measured."""
    found = {}
    for name, result in tests.items():
        rows = [r for r in result.rows if r.test == test]
        if rows and name.startswith(("ablation", "sufficiency")):
            found[name] = result, max(rows, key=lambda r: r.n_latents)
    behaviours = [each for name, each in found.items() if "_behaviour" in name]
    return behaviours or [*found.values()]
