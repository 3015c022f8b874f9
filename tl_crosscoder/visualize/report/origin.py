"""How a dictionary was made, as its record says it, in words for the report.

Contract: sections of (name, value); settings that were left at None are left out. Limit: what
`runner_cfg.json` holds; the folders it was written to are not shown.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tl_crosscoder.html_results import site_columns
from tl_crosscoder.organisms.suite import load_suite
from tl_crosscoder.result_columns import plain
from tl_crosscoder.run_folder import RunFolder

_PLACES = ("output", "cache")
"""Settings that say where things lie on somebody's disk, and nothing of the dictionary."""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """What was planted in an embedded fine-tune, and whether its words were found."""

    said: str
    latents: list[int]
    words: list[tuple[str, int, int]]
    """Word, latents with it in a top context, latents active on it."""
    share: float
    """Of the top contexts of these latents, those with a planted word."""
    random_share: float
    p_value: float


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the dictionary comes from."""

    sites: dict[str, list[Any]]
    """A column a fact, a row a site."""
    sections: list[tuple[str, list[tuple[str, str]]]]
    planted: Planted | None


def origin_of(run: RunFolder) -> Origin:
    """What the record, the last training metrics and the recovery of planted words say."""
    record = run.record
    sections = [
        ("Training", _facts(record["training"])),
        ("Dictionary", _facts({k: record[k] for k in ("d_sae", "sparsity", "parts", "auxk")
                               if k in record})),
        ("Training text", _text(record.get("text", {}))),
        ("Held-out text", _text(record.get("held_out", {}))),
        ("Versions", _facts(record.get("environment", {}))),
    ]  # fmt: skip
    return Origin(
        sites=site_columns(run.crosscoder.sites, scales=True),
        sections=[(title, facts) for title, facts in sections if facts],
        planted=_planted(run),
    )


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, plain(value))
        for name, value in values.items()
        if value not in (None, [], {}) and name not in _PLACES
    ]


def _text(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Counts by mask, source and role on a line each."""
    names = {"tokens_by_mask": "tokens by mask", "tokens_by_source": "tokens by source",
             "tokens_by_role": "tokens by role"}  # fmt: skip
    return [(names.get(name, name), value) for name, value in _facts(values)]


def _planted(run: RunFolder) -> Planted | None:
    """Only of a run of `demo`, which looks for planted words."""
    path, organism = run.path / "recovery.json", run.organism()
    if organism is None or not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return Planted(
        said=load_suite()[organism].planted,
        latents=found["latents"],
        words=[(word, n, found["at_token"][word]) for word, n in found["in_context"].items()],
        share=found["share_in_context"],
        random_share=found["random_share_in_context"],
        p_value=found["p_value"],
    )
