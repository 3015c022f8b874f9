"""What to do when the hub does not give a model: one paragraph for each way it can refuse.

Contract: inside `explained`, what transformers, peft and huggingface_hub raise becomes a ValueError
that names the repository, the cause and the next step. Limit: gated, not found, no such revision,
offline and unreachable are told apart; anything else is quoted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_LONGEST = 1_000


@contextmanager
def explained(name: str | Path, revision: str | None) -> Iterator[None]:
    """Raise ValueError for whatever keeps this model or adapter from loading."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, ValueError, HTTPError, ImportError, SafetensorError) as error:
        # transformers and peft raise the first three for what the hub refuses (a broken connection
        # is the third), the fourth for a library that the weights need; the last is a truncated
        # weights file.
        raise ValueError(_explanation(error, str(name), revision)) from error


def _explanation(error: BaseException, name: str, revision: str | None) -> str:
    from huggingface_hub import errors, get_token

    no_answer = errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HTTPError
    for cause in _chain(error):
        # A gated repository is also one that is not found, in the hub's class tree.
        if isinstance(cause, errors.GatedRepoError):
            return _gated(cause, name)
        if isinstance(cause, errors.RevisionNotFoundError):
            return (
                f"'{name}' has no revision '{revision}': it is no branch, tag or commit there. "
                f"Choose one from {_page(name)}/commits/main."
            )
        if isinstance(cause, errors.RepositoryNotFoundError):
            token = "no token is set" if get_token() is None else "the token that was sent may not"
            return (
                f"'{name}' is not on the hub, or is private. Check the spelling (owner/name); a "
                "private one needs `hf auth login` as an account that may read it "
                f"({token})."
            )
        if isinstance(cause, errors.RemoteEntryNotFoundError):
            break  # the repository is there, without a file that a model has
        if isinstance(cause, no_answer):
            return _not_cached(error, name, revision)
    return (
        f"'{name}'{_at(revision)} could not be loaded: {whole_reason(error)} Check that the name "
        "or folder, and the revision, are those of a model or adapter for transformers."
    )


def _gated(error: BaseException, name: str) -> str:
    response = getattr(error, "response", None)
    who = {
        401: "no valid token was sent",
        403: "the account of the token that was sent has no access yet",
    }.get(getattr(response, "status_code", 0), "this account has no access yet")
    return (
        f"'{name}' is gated: {who}. Accept its licence on {_page(name)}, wait for the approval "
        "where its authors give it by hand, and log in here with `hf auth login`."
    )


def _not_cached(error: BaseException, name: str, revision: str | None) -> str:
    from huggingface_hub import constants, is_offline_mode

    *_, root = _chain(error)
    why = (
        "HF_HUB_OFFLINE forbids fetching it"
        if is_offline_mode()
        else f"{constants.ENDPOINT} did not give it ({whole_reason(root).removesuffix('.')})"
    )
    options = "" if revision is None else f" --revision {revision}"
    return (
        f"'{name}'{_at(revision)} is not in the hub's cache, and {why}. Check the spelling; fetch "
        f"it once with `hf download {name}{options}` where there is a network, or give a folder."
    )


def _page(name: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at revision '{revision}'"


def whole_reason(error: BaseException) -> str:
    """What an error says, as one sentence: often the last line holds the reason."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return text.rstrip(".:") + "."
