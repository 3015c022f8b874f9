"""What a repository on the hub holds now, as far as publishing into it needs to know.

Contract: only reads. A repository that is not there, or that this account may not see, has no
files. Limit: a hub that does not answer is no error here; `unread` says why, and pushing refuses.

What a publisher should know before sending, and may send all the same.

Contract: sentences, each with the next step. Limit: what must not be sent is in `publish_checks`.

Publish a dictionary on the Hugging Face Hub: what would go, and then to send it.

    plan = plan_publication("runs/gemma", "org/crosscoders", licence="mit")
    print(plan.refusals); push(plan)

Contract: `plan_publication` reads the repository and sends nothing; `push` sends all of a plan in
one commit, or nothing of it. What is refused (a secret, a path of this machine, no licence, an id
that is taken) is in the plan. Limit: one dictionary a commit; the main branch.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_crosscoder.crosscoder.crosscoder import CFG_NAME
from tl_crosscoder.hub import card
from tl_crosscoder.hub import published_run as publish_files
from tl_crosscoder.hub.card import Summary, concat_card, hub_models, is_ours
from tl_crosscoder.hub.published_run import (
    ANALYSIS_NAMES,
    SAELENS_FOLDER,
    PublishedFile,
    PublishedRun,
    findings,
)
from tl_crosscoder.models.hub_errors import first_line
from tl_crosscoder.models.pretrained import embedded_run
from tl_crosscoder.train.checkpoint import RECORD_NAME

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete


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


def run_warnings(run: PublishedRun, repository: Repository) -> Iterator[str]:
    """What the card will lack, and how to get it."""
    if repository.unread is not None:
        yield (
            f"the repository could not be read, so it is shown as if it were new: "
            f"{repository.unread}"
        )
    missing = {
        "measures": ("`tl-crosscoder analyze --fresh`", run.measurement is None),
        "KL recovery": ("`tl-crosscoder patch`", run.patching is None),
        "interventions": ("`tl-crosscoder ablate` and `steer`", not run.causal_tests),
    }
    if run.record is None:
        yield f"there is no {RECORD_NAME}: nobody can tell how the dictionary was made."
        if run.measurement is None:  # the verbs want a run
            yield (
                "the card has no measures: measure it in Python first, "
                "tl_crosscoder.measure(models, crosscoder, text).save(folder)."
            )
        return
    for what, (how, is_missing) in missing.items():
        if is_missing:
            yield f"the card has no {what}: run {how} first."


def model_warnings(run: PublishedRun) -> Iterator[str]:
    """Models that others cannot load, or that may be other ones by then."""
    for site in run.read_sites:
        name = site.adapter or site.model_name
        if Path(name).exists():
            yield (
                f"site {site.name} names the folder {name!r}: nobody else has it. Say what others "
                f"load with --rename {name}=owner/name."
            )
        elif site.revision is None and name in hub_models(run):
            yield (
                f"no revision of {name} is recorded (site {site.name}): if it changes on the hub, "
                "the dictionary no longer fits."
            )


CARD_NAME = "README.md"
_LOGIN = (
    "Log in with `hf auth login`, with a token that may write, or set HF_TOKEN; the token is never "
    "given on the command line."
)


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What would be sent, and what keeps it from being sent."""

    repo: str
    id: str
    files: tuple[PublishedFile, ...]
    """With their paths in the repository."""
    deleted: tuple[str, ...]
    """Files of an earlier dictionary of this id that this one does not have."""
    repository: Repository
    """As it is now."""
    private: bool
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]

    def text(self, path: str) -> str:
        """The content of a text file that would go, such as `README.md`."""
        (file,) = (f for f in self.files if f.path == path)
        content = file.content
        return (content if isinstance(content, bytes) else content.read_bytes()).decode()

    @property
    def n_bytes(self) -> int:
        """Of all files."""
        return sum(f.n_bytes for f in self.files)


def plan_publication(
    dictionary: str | Path,
    repo: str,
    *,
    licence: str | None,
    id: str | None = None,
    private: bool = False,
    overwrite: bool = False,
    with_examples: bool = False,
    renamed: Mapping[str, str] | None = None,
) -> Publication:
    """Everything that publishing would do; nothing is sent.

    Args:
        dictionary: folder of a run, or at least of a dictionary; or an embedded one's name.
        repo: `owner/name`; need not exist.
        licence: an identifier of the hub, such as `mit` or `gemma`: of the dictionary, which the
            licence of the models may decide.
        id: folder in the repository; None is the name of the run's folder.
        private: make a new repository that only its owner sees.
        overwrite: replace a dictionary of that id.
        with_examples: also tokens in context, which are text of the dataset.
        renamed: models and texts by what they are called here, as others find them.

    Raises:
        FileNotFoundError, ValueError: no dictionary, a damaged one, or names that cannot be.
    """
    folder = (embedded_run(dictionary) or Path(dictionary)).resolve()
    id = folder.name if id is None else id
    _check_names(repo, id)
    run = PublishedRun(folder=folder, renamed=dict(renamed or {}), with_examples=with_examples)
    repository = read_repository(repo)
    own = [*publish_files.dictionary_files(run)]
    text = card.dictionary_card(run, id=id, repo=repo, licence=licence)
    concatenation = concat_card(run.sites, run.cfg["d_sae"])
    for name, content in ((CARD_NAME, text), (f"{SAELENS_FOLDER}/{CARD_NAME}", concatenation)):
        own.append(PublishedFile(path=name, content=content.encode()))
    files = [PublishedFile(path=f"{id}/{f.path}", content=f.content) for f in own]
    summary = card.Summary.of(id, run.cfg, record=run.record, analysis=run.analysis)
    repository_text = _repository_card(run, summary, repository, licence=licence)
    files.append(PublishedFile(path=CARD_NAME, content=repository_text.encode()))
    there = [p for p in repository.files if p.startswith(f"{id}/")]
    return Publication(
        repo=repo,
        id=id,
        files=tuple(sorted(files, key=lambda f: f.path)),
        deleted=tuple(sorted(set(there) - {f.path for f in files})) if overwrite else (),
        repository=repository,
        private=private,
        refusals=(
            *_licence_refusals(licence, repository),
            *_place_refusals(repository, there, private=private, overwrite=overwrite),
            # Not in the repository's card: ours in it is in these, the rest is there already.
            *(str(f) for file in files[:-1] for f in findings(file.path, file.content)),
        ),
        warnings=(*run_warnings(run, repository), *model_warnings(run)),
    )


def _check_names(repo: str, id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is no name of a repository: {first_line(error)}") from error
    if "/" not in repo:
        raise ValueError(f"{repo!r} names no owner: give owner/name.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", id):
        raise ValueError(
            f"the id {id!r} is no name of a folder: letters, digits, `.`, `_` and `-`. Name the "
            "dictionary with id (--id)."
        )


def _repository_card(
    run: PublishedRun, summary: card.Summary, repository: Repository, *, licence: str | None
) -> str:
    others = [s for s in repository.summaries if s.id != summary.id]
    metadata: dict[str, Any] = {"license": licence} if licence else {}
    metadata |= {"library_name": "saelens", "tags": card.TAGS}
    if models := card.hub_models(run):
        metadata["base_model"] = models
    return card.repository_card(
        repository.name,
        sorted([*others, summary], key=lambda s: s.id),
        metadata=metadata,
        existing=repository.card,
    )


def _licence_refusals(licence: str | None, repository: Repository) -> Iterator[str]:
    if not licence:
        yield (
            "there is no licence: give one (--license), an identifier of the hub such as mit, "
            "apache-2.0 or gemma. The licence of the models may decide it."
        )
    elif repository.licence not in (None, licence):
        yield (
            f"{repository.name} is under the licence {repository.licence!r}, not {licence!r}: a "
            "repository has one. Give that one, or another repository."
        )


def _place_refusals(
    repository: Repository, there: list[str], *, private: bool, overwrite: bool
) -> Iterator[str]:
    if there and not overwrite:
        folder = there[0].partition("/")[0]
        yield (
            f"{repository.name} has a dictionary {folder!r} already. Choose another id (--id), or "
            "replace it (--overwrite)."
        )
    if private and repository.is_private is False:
        yield f"{repository.name} is public: --private is for a new repository."


def push(publication: Publication) -> str:
    """Send a plan, in one commit; the address of the commit.

    Raises:
        ValueError: something in the plan is refused, nobody is logged in, the account may not write
            there, the repository has changed since the plan was made, or the hub did not answer.
    """
    from huggingface_hub import HfApi

    check_login()
    if publication.refusals:
        said = (f"({i}) {r}" for i, r in enumerate(publication.refusals, start=1))
        raise ValueError(f"nothing was sent: {' '.join(said)}")
    if publication.repository.unread is not None:
        raise ValueError(
            f"nothing was sent: {publication.repo} could not be read: "
            f"{publication.repository.unread}"
        )
    api, repo = HfApi(), publication.repo
    with _explained(repo):
        api.create_repo(repo, private=publication.private or None, exist_ok=True)
        return api.create_commit(
            repo,
            _operations(publication),
            commit_message=f"Publish {publication.id}",
            parent_commit=publication.repository.head,
        ).commit_url


def _operations(
    publication: Publication,
) -> "list[CommitOperationAdd | CommitOperationDelete]":
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    deleted = [CommitOperationDelete(path_in_repo=p) for p in publication.deleted]
    added = [
        CommitOperationAdd(path_in_repo=f.path, path_or_fileobj=f.content)
        for f in publication.files
    ]
    return [*deleted, *added]


def check_login() -> None:
    """ValueError where no token is found or the hub knows none like it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(f"nobody is logged in to the hub here. {_LOGIN}") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ValueError(f"the hub does not know the token that is set here. {_LOGIN}") from (
                error
            )
        raise ValueError(f"the hub did not say who is logged in: {first_line(error)}") from error
    except (HTTPError, OSError) as error:
        raise ValueError(f"the hub did not answer: {first_line(error)} Nothing was sent.") from (
            error
        )


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """ValueError for whatever keeps the hub from taking a commit."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # An upload in a thread fails with a RuntimeError raised from what went wrong.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        said = " ".join(str(cause).split())
        if status in (401, 403):
            said = f"the account that is logged in may not write to it ({said}) {_LOGIN}"
        elif status == 412:
            said = "somebody has pushed to it since it was read. Publish again."
        raise ValueError(f"{repo}: nothing was published: {said}") from error
