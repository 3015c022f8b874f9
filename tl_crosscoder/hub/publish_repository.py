"""What a repository on the hub holds now, as far as publishing into it needs to know.

Contract: only reads. A repository that is not there, or that this account may not see, has no
files. Limit: a hub that does not answer is no error here; `unread` says why, and pushing refuses.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_crosscoder.crosscoder.crosscoder import CFG_NAME
from tl_crosscoder.hub.card import Summary, is_ours
from tl_crosscoder.hub.publish_files import ANALYSIS_NAMES
from tl_crosscoder.hub_errors import first_line
from tl_crosscoder.train.record import RECORD_NAME


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository, perhaps one that is yet to be made."""

    name: str
    head: str | None = None
    """Its commit; None where there is no repository."""
    is_private: bool | None = None
    files: tuple[str, ...] = ()
    card: str | None = None
    licence: str | None = None
    summaries: tuple[Summary, ...] = ()
    """Our dictionaries in it."""
    unread: str | None = None
    """Why it could not be read, if it could not."""


def read_repository(repo: str) -> Repository:
    """The state of its main branch."""
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

    try:
        info = HfApi().model_info(repo)
        files = tuple(sorted(s.rfilename for s in info.siblings or []))
        read = _Files(repo, info.sha or "main", files)
        text = read.text("README.md")
        summaries = tuple(s for folder in _folders(files) if (s := read.summary(folder)))
    except RepositoryNotFoundError:
        return Repository(name=repo)
    except (HTTPError, OSError) as error:
        return Repository(name=repo, unread=first_line(error))
    front = {} if text is None else ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    return Repository(
        name=repo,
        head=info.sha,
        is_private=info.private,
        files=files,
        card=text,
        licence=front.get("license"),
        summaries=summaries,
    )


def _folders(files: Sequence[str]) -> list[str]:
    return [f.removesuffix(f"/{CFG_NAME}") for f in files if f.endswith(f"/{CFG_NAME}")]


@dataclass(frozen=True)
class _Files:
    """Small files of a repository, in the hub's cache."""

    repo: str
    revision: str
    names: Sequence[str]

    def text(self, name: str) -> str | None:
        from huggingface_hub import hf_hub_download

        if name not in self.names:
            return None
        path = hf_hub_download(self.repo, name, revision=self.revision)
        return Path(path).read_text(encoding="utf-8")

    def summary(self, folder: str) -> Summary | None:
        """None where the folder holds no dictionary of ours."""
        cfg, record, analysis = (
            self._json(f"{folder}/{name}") for name in (CFG_NAME, RECORD_NAME, ANALYSIS_NAMES[0])
        )
        if cfg is None or not is_ours(cfg):
            return None
        return Summary.of(folder, cfg, record=record, analysis=analysis)

    def _json(self, name: str) -> dict[str, Any] | None:
        text = self.text(name)
        return None if text is None else json.loads(text)
