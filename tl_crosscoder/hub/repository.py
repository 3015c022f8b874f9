"""A repository on the hub: what it holds now, and a commit into it.

Reading never fails for a hub that does not answer: `unread` has the reason, and publishing refuses.
A repository that is missing, or that this account may not see, has no files. Limit: the main
branch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_crosscoder.crosscoder.config import ARCHITECTURE
from tl_crosscoder.files import ANALYSIS_NAMES, CFG_NAME, RECORD_NAME
from tl_crosscoder.hub.registry import Entry
from tl_crosscoder.hub.secrets import Content
from tl_crosscoder.models.hub_errors import whole_reason

CARD_NAME = "README.md"
_LOGIN = (
    "Log in with `hf auth login`, with a token that may write, or set HF_TOKEN; the token is never "
    "given on the command line."
)


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository on the hub as it is now, perhaps one that is yet to be made."""

    name: str
    head: str | None = None
    """Its commit; None where there is no repository, or none that this account may see."""
    is_private: bool | None = None
    files: tuple[str, ...] = ()
    card: str | None = None
    licence: str | None = None
    entries: tuple[Entry, ...] = ()
    """Our dictionaries in it."""
    unread: str | None = None
    """Why it could not be read, if it could not: it is planned for as if it were new."""

    def commit(
        self, files: Mapping[str, Content], *, deleted: Sequence[str], message: str, private: bool
    ) -> str:
        """Write and delete files in one commit on this state; the address of the commit.

        Raises ValueError for whatever keeps the hub from taking it.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
        from huggingface_hub.errors import HTTPError

        operations = [
            *(CommitOperationDelete(path_in_repo=path) for path in deleted),
            *(CommitOperationAdd(path, content) for path, content in files.items()),
        ]
        try:
            HfApi().create_repo(self.name, private=private or None, exist_ok=True)
            return (
                HfApi()
                .create_commit(
                    self.name, operations, commit_message=message, parent_commit=self.head
                )
                .commit_url
            )
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self.name}: nothing was published: {_why(error)}") from error


def read_repository(repo: str) -> Repository:
    """The state of the main branch of a repository."""
    from huggingface_hub import HfApi, ModelCard, hf_hub_download
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

    def text(name: str) -> str | None:
        if name not in names:
            return None
        return Path(hf_hub_download(repo, name, revision=info.sha)).read_text(encoding="utf-8")

    def content(name: str) -> dict[str, Any] | None:
        return None if (found := text(name)) is None else json.loads(found)

    try:
        info = HfApi().model_info(repo)
        names = tuple(sorted(s.rfilename for s in info.siblings or []))
        readme, entries = text(CARD_NAME), []
        for folder in [n.removesuffix(f"/{CFG_NAME}") for n in names if n.endswith(f"/{CFG_NAME}")]:
            cfg, record, analysis = (
                content(f"{folder}/{name}") for name in (CFG_NAME, RECORD_NAME, ANALYSIS_NAMES[0])
            )
            if cfg is not None and cfg.get("architecture") == ARCHITECTURE:
                of = {"cfg": cfg, "record": record, "analysis": analysis}
                entries.append(Entry.from_files(repo, folder, **of))
    except RepositoryNotFoundError:
        return Repository(name=repo)
    except (HTTPError, OSError) as error:
        return Repository(name=repo, unread=whole_reason(error))
    parsed = None if readme is None else ModelCard(readme, ignore_metadata_errors=True)
    return Repository(
        name=repo,
        head=info.sha,
        is_private=info.private,
        files=names,
        card=readme,
        licence=None if parsed is None else parsed.data.to_dict().get("license"),
        entries=tuple(entries),
    )


def _why(error: Exception) -> str:
    """Why the hub did not take a commit."""
    from huggingface_hub.errors import HfHubHTTPError

    # An upload in a thread fails with a RuntimeError raised from what went wrong.
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    reason = " ".join(str(cause).split())
    if status in (401, 403):
        return f"the account that is logged in may not write to it ({reason}) {_LOGIN}"
    if status == 412:
        return "somebody has pushed to it since it was read. Publish again."
    return reason


def check_login() -> None:
    """Raise ValueError where no token is found or the hub does not know it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(f"nobody is logged in to the hub here. {_LOGIN}") from error
    except (HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            reason = f"the hub does not know the token that is set here. {_LOGIN}"
        else:
            reason = f"the hub did not answer: {whole_reason(error)} Nothing was sent."
        raise ValueError(reason) from error
