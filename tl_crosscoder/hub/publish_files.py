"""Which files of a run are published, and what is changed in them on the way.

Contract: `dictionary_files(published)` are the dictionary, its record, its measures and what
interventions found; `saelens/` is the same dictionary for SAELens alone. Changed are only where it
was written (`training.output`, `training.cache`: left out), names that the publisher renames, and
examples, which are text of the dataset and go only when asked for. Limit: no figures.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.crosscoder.config import CrosscoderConfig
from tl_crosscoder.crosscoder.crosscoder import (
    CFG_NAME,
    WEIGHTS_NAME,
    Crosscoder,
    concatenation_config,
)
from tl_crosscoder.interventions.causal_result import CausalTest
from tl_crosscoder.interventions.patching import PatchingResult
from tl_crosscoder.pair_view import PairView
from tl_crosscoder.site import Site
from tl_crosscoder.train.record import RECORD_NAME

ANALYSIS_NAMES = ("analysis.json", "analysis.safetensors")
PATCHING_NAME = "patching.json"
EXAMPLES_NAME = "examples.sqlite"
SAELENS_FOLDER = "saelens"
_CAUSAL = ("ablation_*.json", "sufficiency_*.json", "baselines_*.json")


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """One file that would go."""

    path: str
    """In the dictionary's folder."""
    content: Path | bytes

    @property
    def n_bytes(self) -> int:
        """Its size."""
        if isinstance(self.content, bytes):
            return len(self.content)
        return self.content.stat().st_size


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A run as others will see it. Raises as `Crosscoder.load` does."""

    folder: Path
    renamed: Mapping[str, str]
    """Names of models and texts by what they are called here; also the start of a path."""
    with_examples: bool = False

    def __post_init__(self) -> None:
        Crosscoder.load(self.folder)  # a damaged or diverged dictionary goes nowhere

    @cached_property
    def cfg(self) -> dict[str, Any]:
        """`cfg.json`."""
        return self._read(CFG_NAME)

    @cached_property
    def record(self) -> dict[str, Any] | None:
        """`runner_cfg.json`; None of a dictionary that was not trained here."""
        if not (self.folder / RECORD_NAME).is_file():
            return None
        record = self._read(RECORD_NAME)
        record["training"] |= {"output": None, "cache": None}
        return record

    @cached_property
    def analysis(self) -> dict[str, Any] | None:
        """`analysis.json`; None where nothing has been measured."""
        if not all((self.folder / name).is_file() for name in ANALYSIS_NAMES):
            return None
        content = self._read(ANALYSIS_NAMES[0])
        for summary in [] if self.with_examples else content["top"]:
            summary["examples"] = []
        return content

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites, renamed."""
        return tuple(Site.from_dict(s) for s in self.cfg["sites"])

    @property
    def read_sites(self) -> tuple[Site, ...]:
        """Those that models are read at: of a diff-SAE, what is subtracted too."""
        return tuple(s for own in self.sites for s in (own.minus, own) if s is not None)

    @cached_property
    def measurement(self) -> Measurement | None:
        """The measures; None where nothing has been measured."""
        return None if self.analysis is None else Measurement.load(self.folder)

    @cached_property
    def patching(self) -> PatchingResult | None:
        """KL recovery; None where it has not been measured."""
        path = self.folder / PATCHING_NAME
        return PatchingResult.load(path) if path.is_file() else None

    @cached_property
    def causal_tests(self) -> dict[str, CausalTest]:
        """What interventions found, by the name of the file."""
        paths = [p for pattern in _CAUSAL for p in sorted(self.folder.glob(pattern))]
        return {p.stem: CausalTest.load(p) for p in paths}

    def _read(self, name: str) -> dict[str, Any]:
        content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        return _renamed(content, self.renamed)


def dictionary_files(run: PublishedRun) -> list[PublishedFile]:
    """The files of a run, but for its cards."""
    found = [PublishedFile(path=CFG_NAME, content=_json(run.cfg)), _as_it_is(run, WEIGHTS_NAME)]
    if run.record is not None:
        found.append(PublishedFile(path=RECORD_NAME, content=_json(run.record)))
    if run.analysis is not None:
        found.append(PublishedFile(path=ANALYSIS_NAMES[0], content=_json(run.analysis)))
        found.append(_as_it_is(run, ANALYSIS_NAMES[1]))
    if run.patching is not None:
        found.append(_as_it_is(run, PATCHING_NAME))
    found += [_as_it_is(run, f"{name}.json") for name in run.causal_tests]
    if run.with_examples and (run.folder / EXAMPLES_NAME).is_file():
        found.append(_as_it_is(run, EXAMPLES_NAME))
    return found + _saelens_files(run)


def _as_it_is(run: PublishedRun, name: str) -> PublishedFile:
    return PublishedFile(path=name, content=run.folder / name)


def _saelens_files(run: PublishedRun) -> list[PublishedFile]:
    """`export_concat` without a copy: the weights are the same file, which the hub keeps once."""
    cfg = concatenation_config(CrosscoderConfig.from_dict(dict(run.cfg)))
    cfg.metadata.hook_name = PairView.HOOK_NAME
    return [
        PublishedFile(path=f"{SAELENS_FOLDER}/{CFG_NAME}", content=_json(cfg.to_dict())),
        PublishedFile(path=f"{SAELENS_FOLDER}/{WEIGHTS_NAME}", content=run.folder / WEIGHTS_NAME),
    ]


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """The value with every string that is, or is a path below, one of the names renamed."""
    if isinstance(value, dict):
        return {k: _renamed(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [_renamed(v, names) for v in value]
    if isinstance(value, str):
        for old, new in names.items():
            if value == old or value.startswith((f"{old}/", f"{old}\\")):
                return new + value[len(old) :]
    return value
