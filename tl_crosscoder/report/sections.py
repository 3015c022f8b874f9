"""Results as text for a terminal, and as sections that the report shows too.

Contract: measurements, caches, samples and results of interventions in, `Section`s or text of at
most `render.WIDTH` columns out; a section of an intervention is of one kind of predicted token or
one test, with its controls and intervals. Limit: nothing is measured here; what is not in a run's
folder is named with the command that makes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.baselines.difference import ActivationDifference
from tl_crosscoder.data.cache import ActivationCache
from tl_crosscoder.files import PATCHING_NAME
from tl_crosscoder.interventions.patching import PatchingResult, PatchingRow
from tl_crosscoder.interventions.trials import CausalRow, CausalTest
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.site import Site, site_columns
from tl_crosscoder.results.measures import MEASURES, spoken
from tl_crosscoder.results.render import Section, as_text, plain, visible, wrapped


def render(measurement: Measurement, sites: Sequence[Site], *, n_examples: int = 2) -> str:
    """Tables of reconstruction and classes, then the first latents with tokens in context."""
    tables = as_text(measurement.sections(n_examples=n_examples))
    return f"{wrapped(question(sites))}\n\n{tables}"


def question(sites: Sequence[Site]) -> str:
    """Title of a comparison: models at hook points, hook points of a model, or a difference."""
    sites = [*(s.minus for s in sites if s.minus), *sites]
    hooks = list(dict.fromkeys(s.hook_name for s in sites))
    # A model against itself, at one hook, is named twice.
    models = [visible(s.label) for s in sites]
    models = models if len(hooks) == 1 else list(dict.fromkeys(models))
    if len(sites) == 1:
        return f"What there is in {models[0]} at {hooks[0]}"
    if len(models) == 1:
        return f"What changed from {' to '.join(hooks)} in {models[0]}"
    return f"What changed from {' to '.join(models)} at {', '.join(hooks)}"


def samples_text(samples: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """Texts of models after each prompt, by the name of the model."""
    blocks = []
    for prompt, texts in samples:
        width = max(map(len, texts))
        lines = [wrapped(f"> {_one_line(prompt)}")]
        lines += [wrapped(f"  {name:<{width}}  {_one_line(text)}") for name, text in texts.items()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _one_line(text: str) -> str:
    return visible(" ".join(text.split()))


# --- caches ---------------------------------------------------------------------------------------

_FIRST_POSITIONS = 4


def cache_sections(cache: ActivationCache) -> list[Section]:
    """Sites, size, masks, sources and roles of a cache, and the statistics of each site."""
    manifest, text = cache.manifest, cache.text
    statistics, rounding = manifest["statistics"], manifest["storage_error"]
    masked = {name: n for name, n in manifest["mask_counts"].items() if name != "kept"}
    n_held_out = len(text) - manifest["n_training_contexts"]
    facts = {
        "tokens": f"{cache.n_rows:,} in {len(text):,} contexts of {text.context_size}, "
        f"{n_held_out:,} of them held out",
        "on disk": f"{cache.n_bytes / 1e9:,.3f} GB in {len(cache.shards):,} shards, "
        f"{manifest['store']}, {cache.n_bytes / max(1, cache.n_rows):,.0f} bytes a token",
        "masked": _counts(masked),
        "sources": _counts(text.source_counts),
        "roles": _counts(text.role_counts),
        "rounding": f"{plain(rounding)} (squared error of the number format over squared norm)",
    }
    found = [
        Section(title=f"Activations in {cache.folder}", columns=site_columns(cache.sites)),
        Section(notes=[f"  {name:<10}{fact}" for name, fact in facts.items()]),
        _norms(statistics["sites"]),
    ]
    if statistics.get("difference"):
        found.append(_difference(statistics["difference"], statistics["n_by_position"]))
    return found


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items() if n) or "none"


def _norms(sites: Mapping[str, Mapping[str, Any]]) -> Section:
    """Norms and attention sinks, over the kept tokens and at the first positions."""
    each = [*sites.values()]
    columns: dict[str, list[Any]] = {
        "site": [*sites],
        "RMS norm": [site["mean_squared_norm"] ** 0.5 for site in each],
        "norm of the mean": [site["norm_of_mean"] for site in each],
        "sinks": [f"{site['sink_share']:.2%}" for site in each],
    }
    for i in range(_FIRST_POSITIONS):
        places = [
            (norm[i], sinks[i]) if i < len(norm) and norm[i] is not None else None
            for site in each
            for norm, sinks in [(site["mean_norm_by_position"], site["sink_share_by_position"])]
        ]
        columns[f"position {i}"] = [p and f"{p[0]:.1f} ({p[1]:.0%})" for p in places]
    title = "Norms over the kept tokens, and at the first positions (with the share of sinks)"
    return Section(title=title, columns=columns)


def _difference(difference: Mapping[str, Any], n_by_position: Sequence[int]) -> Section:
    """||x^1 - x^0|| by position, in spans that double (0, 1, 2-3, 4-7, ...), and by role."""
    norms, cells, start = difference["mean_norm_by_position"], [], 0
    while start < len(norms):
        stop = min(len(norms), max(1, 2 * start))
        pairs = [*zip(norms[start:stop], n_by_position[start:stop], strict=True)]
        known = [(norm, n) for norm, n in pairs if norm is not None]
        mean = sum(norm * n for norm, n in known) / max(1, sum(n for _, n in known))
        cells.append(f"{start if stop == start + 1 else f'{start}-{stop - 1}'}: {mean:.2f}")
        start = stop
    by_role = difference["mean_norm_by_role"].items()
    roles = [f"{role}: {norm:.2f}" for role, norm in by_role if norm is not None]
    lines = ["  by position  " + "  ".join(cells), "  by role      " + "  ".join(roles)]
    return Section(title="Mean norm of the difference, |x1 - x0|", notes=lines)


# --- interventions --------------------------------------------------------------------------------

_COMMANDS = {
    "patching": "KL recovery: `tl-crosscoder patch`",
    "ablation_*": "necessity: `tl-crosscoder ablate`",
    "sufficiency_*": "sufficiency: `tl-crosscoder steer`",
    "baselines_*": "methods without a dictionary: `tl-crosscoder baselines`",
}
_PATCHING = ("variant", "n_latents", "kl", "kl_low", "kl_high",
             "recovery", "recovery_low", "recovery_high")  # fmt: skip
_BRIEF = ("latents", "strength", "value", "share", "share_low", "share_high", "random_mean",
          "random_high", "matched_mean", "p_random_holm", "off_target_kl",
          "random_off_target_kl")  # fmt: skip
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
    controls = f"{result.n_random} random directions of the same norms"
    if result.n_matched:
        controls += f" and {result.n_matched} sets of latents that are active as often"
    every = [f.name for f in fields(CausalRow) if f.name not in _NOT_COLUMNS]
    sections = []
    for test in dict.fromkeys(row.test for row in result.rows):
        rows = [row for row in result.rows if row.test == test]
        names = [n for n in (_BRIEF if is_brief else every) if n != "strength" or test == "steer"]
        measure, one = MEASURES[test], rows[0]
        title = (
            f"{measure.name.capitalize()}: {result.effect} ({result.unit}: base {one.base:.3g}, "
            f"fine-tuned {one.finetuned:.3g})"
        )
        notes = (f"{measure.meaning} {result.n_prompts} prompts; controls: {controls}.",)
        columns = {name: [getattr(row, name) for row in rows] for name in names}
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
        if pattern != "patching"
        for path in sorted(folder.glob(f"{pattern}.json"))
    }
    sections = [] if result is None else patching_sections(result)
    for name, test in tests.items():
        prefix = "Without a dictionary. " if name.startswith("baselines") else ""
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
