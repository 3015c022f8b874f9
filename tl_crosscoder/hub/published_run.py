"""What must not go to the hub: secrets, and paths of this machine.

Contract: `findings(path, content)` for every file that would go; text by line, a safetensors file
by its header, any other file as one. A secret's value is masked, a path is shown. Limits: known
shapes of tokens only; in examples (text of a dataset) secrets are looked for and paths are not.

Which files of a run are published, and what is changed in them on the way.

Contract: `dictionary_files(published)` are the dictionary, its record, its measures and what
interventions found; `saelens/` is the same dictionary for SAELens alone. Changed are only where it
was written (`training.output`, `training.cache`: left out), names that the publisher renames, and
examples, which are text of the dataset and go only when asked for. Limit: no figures.
"""

import json
import re
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
from tl_crosscoder.interventions.patching import PatchingResult
from tl_crosscoder.interventions.trials import CausalTest
from tl_crosscoder.models.saelens import PairView
from tl_crosscoder.models.site import Site
from tl_crosscoder.train.checkpoint import RECORD_NAME

TEXT_SUFFIXES = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".html", ".csv", ".py")
_SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": r"\bAIza[\w-]{35}",
    "a Slack token": r"\bxox[abprs]-[\w-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password or key": (
        r"(?i)\b(?:api[_-]?key|secret[_-]?key|secret|access[_-]?token|auth[_-]?token|password"
        r"|passwd)\b[\"']?\s*[:=]\s*[\"']?[^\s\"',;{}\[\]]{6,}"
    ),
}
_NAME = r"[^\s\"'<>|:*?/\\]"
_PATHS = (
    rf"(?<![\w./:<>\]*~-])/{_NAME}+(?:/{_NAME}*)+",  # /data/text.jsonl
    rf"(?<=[\"'`])/{_NAME}+(?=[\"'`])",  # "/text.jsonl"
    rf"(?<![\w/])~\w*/{_NAME}+",  # ~/runs
    r"\bfile:/+[^\s\"']+",
    r"(?<!\w)[A-Za-z]:(?:\\{1,2}|/(?!/))[^\s\"'<>|?*]+",  # C:\runs, and as JSON writes it
    r"(?<![\w\\:])\\{2,4}[\w.$-]+\\{1,2}[\w.$-]+",  # \\server\share
)
_EXAMPLE = re.compile(r'^\s*"(?:before|token|after)": ')


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that must not be published."""

    path: str
    line: int | None
    """None of a file that has no lines."""
    what: str
    shown: str

    def __str__(self) -> str:
        """`runner_cfg.json:48: an absolute path, '/runs/gemma'`."""
        where = self.path if self.line is None else f"{self.path}:{self.line}"
        return f"{where}: {self.what}, {self.shown!r}"


def findings(path: str, content: Path | bytes) -> list[Finding]:
    """What must not be published in a file; `path` is its path in the repository."""
    if path.endswith(".safetensors"):
        return _in_line(path, None, _header(content), with_paths=True)
    data = content if isinstance(content, bytes) else content.read_bytes()
    if not path.endswith(TEXT_SUFFIXES):
        return _in_line(path, None, data.decode("latin-1"), with_paths=False)
    lines = data.decode(errors="replace").splitlines()
    if path.endswith((".json", ".jsonl")):  # which may write the letters of a path as escapes
        lines = [re.sub(r"\\u([0-9a-f]{4})", lambda m: chr(int(m[1], 16)), line) for line in lines]
    return [
        found
        for i, line in enumerate(lines, start=1)
        for found in _in_line(path, i, line, with_paths=not _EXAMPLE.match(line))
    ]


def _in_line(path: str, line: int | None, text: str, *, with_paths: bool) -> list[Finding]:
    secrets = [
        Finding(path=path, line=line, what=what, shown=f"{found.group()[:4]}…")
        for what, pattern in _SECRETS.items()
        for found in re.finditer(pattern, text)
    ]
    paths = [
        Finding(path=path, line=line, what="a path of this machine", shown=found.group())
        for pattern in _PATHS
        for found in re.finditer(pattern, text)
        if with_paths
    ]
    return secrets + paths


def _header(content: Path | bytes) -> str:
    """The JSON at the start of a safetensors file, after its length in 8 bytes."""
    if isinstance(content, bytes):
        n = int.from_bytes(content[:8], "little")
        return content[8 : 8 + n].decode(errors="replace")
    with content.open("rb") as file:
        n = int.from_bytes(file.read(8), "little")
        return file.read(n).decode(errors="replace")


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
