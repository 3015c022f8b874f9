"""Publish a dictionary on the Hugging Face Hub: show what would be sent, and then send it.

    plan = plan_publication("runs/gemma", "org/crosscoders", licence="mit")
    print(plan.refusals); push(plan)

`plan_publication` reads the repository and sends nothing; `push` sends all of a plan in one commit,
or nothing. What is refused (a secret, a path of this machine, no licence, an id that is taken) is
in the plan. Limits: one dictionary a commit; the main branch.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_crosscoder.files import RECORD_NAME, user_path
from tl_crosscoder.hub import card
from tl_crosscoder.hub.published_run import SAELENS_FOLDER, PublishedRun
from tl_crosscoder.hub.repository import CARD_NAME, Repository, check_login, read_repository
from tl_crosscoder.hub.secrets import Content, findings
from tl_crosscoder.models.hub_errors import whole_reason
from tl_crosscoder.models.pretrained import embedded_run


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What would be sent, and what keeps it from being sent."""

    repo: str
    id: str
    files: dict[str, Content]
    """Content by its path in the repository."""
    deleted: tuple[str, ...]
    """Files of an earlier dictionary of this id that this one does not have."""
    repository: Repository
    private: bool
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]

    def text(self, path: str) -> str:
        """Content of a text file that would be sent, such as `README.md`."""
        content = self.files[path]
        return (content if isinstance(content, bytes) else content.read_bytes()).decode()

    def sizes(self) -> dict[str, int]:
        """Bytes of each file by its path."""
        return {
            path: len(content) if isinstance(content, bytes) else content.stat().st_size
            for path, content in self.files.items()
        }


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
    folder = (embedded_run(dictionary) or user_path(dictionary)).resolve()
    id = folder.name if id is None else id
    _check_names(repo, id)
    run = PublishedRun.read(folder, renamed=renamed, with_examples=with_examples)
    repository = read_repository(repo)
    cards = {
        CARD_NAME: card.dictionary_card(run, id=id, repo=repo, licence=licence),
        f"{SAELENS_FOLDER}/{CARD_NAME}": card.export_card("concat", run.sites, run.cfg["d_sae"]),
    }
    own = {**run.files(), **{name: text.encode() for name, text in cards.items()}}
    files = {f"{id}/{path}": content for path, content in own.items()}
    there = [path for path in repository.files if path.startswith(f"{id}/")]
    # The repository's card is not searched: ours in it is in these, the rest is there already.
    found = [f for path, content in files.items() for f in findings(path, content)]
    files[CARD_NAME] = _repository_card(run, id, repository, licence=licence).encode()
    return Publication(
        repo=repo,
        id=id,
        files=dict(sorted(files.items())),
        deleted=tuple(sorted(set(there) - files.keys())) if overwrite else (),
        repository=repository,
        private=private,
        refusals=(
            *_licence_refusals(licence, repository),
            *_place_refusals(repository, there, private=private, overwrite=overwrite),
            *found,
        ),
        warnings=(*_run_warnings(run, repository), *_model_warnings(run)),
    )


def _check_names(repo: str, id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} cannot name a repository: {whole_reason(error)}") from error
    if "/" not in repo:
        raise ValueError(f"{repo!r} names no owner: give owner/name.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", id):
        raise ValueError(
            f"the id {id!r} cannot name a folder: use letters, digits, `.`, `_` and `-`. Name the "
            "dictionary with id (--id)."
        )


def _repository_card(
    run: PublishedRun, id: str, repository: Repository, *, licence: str | None
) -> str:
    entries = [e for e in repository.entries if e.id != id]
    entries.append(card.entry_of(run, id=id, repo=repository.name))
    metadata: dict[str, Any] = {"license": licence} if licence else {}
    metadata |= {"library_name": "saelens", "tags": card.TAGS}
    if models := card.hub_models(run):
        metadata["base_model"] = models
    return card.repository_card(
        repository.name,
        sorted(entries, key=lambda e: e.id),
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
        yield (
            f"{repository.name} has a dictionary {there[0].partition('/')[0]!r} already. Choose "
            "another id (--id), or replace it (--overwrite)."
        )
    if private and repository.is_private is False:
        yield f"{repository.name} is public: --private is for a new repository."


def _run_warnings(run: PublishedRun, repository: Repository) -> Iterator[str]:
    """What the card will lack, and how to get it."""
    if repository.unread is not None:
        yield (
            "the repository could not be read, so it is shown as if it were new: "
            f"{repository.unread}"
        )
    if run.record is None:
        yield f"there is no {RECORD_NAME}: nobody can tell how the dictionary was made."
        if run.measurement is None:  # the verbs want a run
            yield (
                "the card has no measures: measure it in Python first, "
                "tl_crosscoder.measure(models, crosscoder, text).save(folder)."
            )
        return
    missing = {
        "measures": ("`tl-crosscoder analyze --fresh`", run.measurement is None),
        "KL recovery": ("`tl-crosscoder patch`", run.patching is None),
        "interventions": ("`tl-crosscoder ablate` and `steer`", not run.causal_tests),
    }
    for what, (how, is_missing) in missing.items():
        if is_missing:
            yield f"the card has no {what}: run {how} first."


def _model_warnings(run: PublishedRun) -> Iterator[str]:
    """Models that others cannot load, or that may be other ones by then."""
    for site in run.read_sites:
        name = site.label
        if user_path(name).exists():
            yield (
                f"site {site.name} names the folder {name!r}: nobody else has it. Give what others "
                f"load with --rename {name}=owner/name."
            )
        elif site.revision is None and name in card.hub_models(run):
            yield (
                f"no revision of {name} is recorded (site {site.name}): if it changes on the hub, "
                "the dictionary no longer fits."
            )


def push(publication: Publication) -> str:
    """Send a plan, in one commit; the address of the commit.

    Raises:
        ValueError: something in the plan is refused, nobody is logged in, the account may not write
            there, the repository has changed since the plan was made, or the hub did not answer.
    """
    check_login()
    repo, unread = publication.repo, publication.repository.unread
    if publication.refusals:
        reasons = (f"({i}) {r}" for i, r in enumerate(publication.refusals, start=1))
        raise ValueError(f"nothing was sent: {' '.join(reasons)}")
    if unread is not None:
        raise ValueError(f"nothing was sent: {repo} could not be read: {unread}")
    return publication.repository.commit(
        publication.files,
        deleted=publication.deleted,
        message=f"Publish {publication.id}",
        private=publication.private,
    )
