"""A run as others will see it: which files are published, changed how, and what must not go.

`PublishedRun.read(folder).files()` maps paths to content: the dictionary, its record, its
measures, what interventions found, and `saelens/`, the same dictionary for SAELens alone. Changed
are only where it was written (`training.output`, `training.cache`: left out), names that the
publisher renames, and examples, which are text of the dataset and go only when requested.
`findings` of `secrets` says what in them must not go. Limit: no figures.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_crosscoder import files
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.crosscoder.config import CrosscoderConfig
from tl_crosscoder.crosscoder.crosscoder import (
    Crosscoder,
    concatenation_config,
)
from tl_crosscoder.files import (
    ANALYSIS_NAMES,
    ATTRIBUTION_NAMES,
    CFG_NAME,
    CHANGES_NAME,
    EXAMPLES_NAME,
    PATCHING_NAME,
    RECORD_NAME,
    WATERFALL_NAME,
    WEIGHTS_NAME,
)
from tl_crosscoder.hub.secrets import Content
from tl_crosscoder.interventions.causal_rows import CausalTest
from tl_crosscoder.interventions.changes_result import Changes
from tl_crosscoder.interventions.patching import PatchingResult
from tl_crosscoder.interventions.waterfall import Waterfall
from tl_crosscoder.models.saelens import PairView
from tl_crosscoder.models.site import Site
from tl_crosscoder.run.causal import causal_files

SAELENS_FOLDER = "saelens"


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """The content of a run's folder, renamed and without what stays here."""

    folder: Path
    with_examples: bool
    """Whether there are examples, which go along."""
    cfg: dict[str, Any]
    record: dict[str, Any] | None
    """`runner_cfg.json`; None for a dictionary that was not trained here."""
    analysis: dict[str, Any] | None
    """`analysis.json`; None where nothing has been measured, as in the next three."""
    measurement: Measurement | None
    patching: PatchingResult | None
    what_changed: dict[str, dict[str, Any]]
    """Attribution, waterfall and changes, by the name of the file; texts only with examples."""
    answer: list[str]
    """What changed, in lines."""
    causal_tests: dict[str, CausalTest]
    """Results of interventions, by the name of the file."""

    @classmethod
    def read(
        cls, folder: Path, *, renamed: Mapping[str, str] | None = None, with_examples: bool = False
    ) -> "PublishedRun":
        """Read a folder.

        Args:
            folder: of a run, or at least of a dictionary.
            renamed: names of models and texts by what they are called here, or the starts of paths.
            with_examples: keep tokens in context.

        Raises:
            FileNotFoundError, ValueError: as `Crosscoder.load` does: a damaged or diverged
                dictionary is not published.
        """
        Crosscoder.load(folder)

        def read(name: str) -> dict[str, Any]:
            return _renamed(files.read_object(folder / name), renamed or {})

        has = {p.name for p in folder.iterdir() if p.is_file()}
        record = read(RECORD_NAME) if RECORD_NAME in has else None
        if record is not None:
            record["training"] |= {"output": None, "cache": None}
        analysis = read(ANALYSIS_NAMES[0]) if has.issuperset(ANALYSIS_NAMES) else None
        if analysis is not None and not with_examples:
            analysis["top"] = [top | {"examples": []} for top in analysis["top"]]
        names = (ATTRIBUTION_NAMES[0], WATERFALL_NAME, CHANGES_NAME)
        what_changed, answer = {name: read(name) for name in names if name in has}, []
        if WATERFALL_NAME in has:
            answer = [Waterfall.load(folder / WATERFALL_NAME).line()]
        if CHANGES_NAME in has:
            changes = Changes.load(folder / CHANGES_NAME)
            changes = changes if with_examples else changes.without_texts()
            what_changed[CHANGES_NAME] = _renamed(changes.to_json(), renamed or {})
            answer += changes.lines()
        return cls(
            folder=folder,
            with_examples=with_examples and EXAMPLES_NAME in has,
            cfg=read(CFG_NAME),
            record=record,
            analysis=analysis,
            measurement=None if analysis is None else Measurement.load(folder),
            patching=PatchingResult.load(folder / PATCHING_NAME) if PATCHING_NAME in has else None,
            what_changed=what_changed,
            answer=answer,
            causal_tests={path.stem: CausalTest.load(path) for path in causal_files(folder)},
        )

    def files(self) -> dict[str, Content]:
        """Content by its path in the dictionary's folder; cards are made elsewhere."""
        saelens = concatenation_config(CrosscoderConfig.from_dict(dict(self.cfg)))
        saelens.metadata.hook_name = PairView.HOOK_NAME
        made = {
            CFG_NAME: self.cfg,
            RECORD_NAME: self.record,
            ANALYSIS_NAMES[0]: self.analysis,
            **self.what_changed,
            f"{SAELENS_FOLDER}/{CFG_NAME}": saelens.to_dict(),
        }
        as_it_is = {
            ANALYSIS_NAMES[1]: self.analysis is not None,
            ATTRIBUTION_NAMES[1]: ATTRIBUTION_NAMES[0] in self.what_changed,
            PATCHING_NAME: self.patching is not None,
            EXAMPLES_NAME: self.with_examples,
            **{f"{name}.json": True for name in self.causal_tests},
        }
        # The hub keeps one copy of the weights, which are those of both layouts.
        weights = [WEIGHTS_NAME, f"{SAELENS_FOLDER}/{WEIGHTS_NAME}"]
        return {
            **{name: _json(content) for name, content in made.items() if content is not None},
            **{name: self.folder / name for name, is_there in as_it_is.items() if is_there},
            **dict.fromkeys(weights, self.folder / WEIGHTS_NAME),
        }

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, renamed."""
        return tuple(Site.from_dict(s) for s in self.cfg["sites"])

    @property
    def read_sites(self) -> tuple[Site, ...]:
        """Sites that models are read at: for a difference the two that it is between."""
        return tuple(s for own in self.sites for s in (own.minus, own) if s is not None)


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
