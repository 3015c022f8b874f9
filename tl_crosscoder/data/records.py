"""Records of the shapes that people have, as documents.

A record is a string, or a mapping that holds a text, a chat (`messages` of `role` and `content`, or
ShareGPT's `conversations` of `from` and `value`) or token ids; its values may come from NumPy or
pandas. `as_document` gives the one form that the rest of the package reads. Limit: of the parts of
a message only text is read; an image is an error.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tl_crosscoder.config.inputs import OnBadDocument

Document = Mapping[str, Any]

_CHATS = ("messages", "conversations")
_CONTENT = (*_CHATS, "input_ids")
"""Columns that hold a document, the first one that is filled; the text column comes after them."""
_BESIDE_IDS = ("attention_mask", "role_ids", "tokenizer", "n_prompt_tokens")
COLUMNS = (*_CONTENT, *_BESIDE_IDS, "source")
"""Columns that are read, with the text column."""
_NOT_READ = (
    "labels", "special_tokens_mask", "token_type_ids", "position_ids", "assistant_masks",
    "loss_mask",
)  # fmt: skip
_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "ipython": "tool", "observation": "tool",
}  # fmt: skip
"""Names of the speakers of a chat, and the role that each is."""
_OWN_ROLES = (*{*_ROLES.values()},)


@dataclass
class BadDocuments:
    """What becomes of documents that cannot be read: an error, or a count and the first reasons."""

    policy: OnBadDocument = "error"
    n: int = 0
    reasons: list[str] = field(default_factory=list)
    """The first three."""

    def add(self, error: ValueError) -> None:
        """Count a document that is left out. Raises the error where the policy is `error`."""
        if self.policy == "error":
            raise error
        self.n += 1
        if len(self.reasons) < 3:
            self.reasons.append(str(error))

    def warn(self, name: str) -> None:
        """One warning with count and reasons, where there were any; the count starts anew."""
        if self.n:
            first = "the reason" if self.n == 1 else "the first reasons"
            reasons = "; ".join(self.reasons)
            warnings.warn(
                f"{self.n:,} of the documents read of {name} were left out ({first}: {reasons}).",
                stacklevel=2,
            )
        self.n, self.reasons = 0, []


def as_document(record: Any, *, text_column: str = "text") -> Document:
    """A record as a document; the record itself where it is one already.

    A document that holds nothing is `{"text": ""}`. Tokens that an `attention_mask` of 0 leaves
    out are gone, roles have one of the names `system`, `user`, `assistant` and `tool`, and the
    content of a message is a string or None.

    Raises:
        ValueError: the reason why it is none, without its place.
    """
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, Mapping):
        raise ValueError(
            f"it is {_shown(record)}, neither a text nor an object with one; remove it"
        )
    key, content = _filled(record, text_column)
    if key in _CHATS:
        made: dict[str, Any] = {"messages": _messages(content)}
    elif key == "input_ids":
        made = _token_ids(record, content)
    elif isinstance(content, list) and any(isinstance(item, Mapping) for item in content):
        made = {"messages": _messages(content)}
    else:
        made = {"text": _text(content, f"its {key!r}")}
    source = _plain(record.get("source"))
    made |= {"source": source} if source else {}
    consumed = {*COLUMNS, *_NOT_READ, text_column}
    document = {k: v for k, v in record.items() if k not in consumed} | made
    is_same = document.keys() == record.keys() and all(v is record[k] for k, v in document.items())
    return record if is_same else document


def has_content(record: Any, text_column: str) -> bool:
    """Whether a record has a column that can hold a document, filled or not."""
    return not isinstance(record, Mapping) or any(k in record for k in (*_CONTENT, text_column))


def columns_not_read(record: Any) -> list[str]:
    """Columns of a tokenised record that look as if they should matter, and do not."""
    return [k for k in _NOT_READ if k in record] if isinstance(record, Mapping) else []


def _filled(record: Document, text_column: str) -> tuple[str, Any]:
    """The column that holds the document, and its content; an empty text where none is filled."""
    columns = (*_CONTENT, text_column)
    for key in columns:
        content = _plain(record.get(key))
        if content is not None and content not in ("", []):
            return key, content
    if not has_content(record, text_column):
        raise ValueError(
            f"it has no column {text_column!r} and no 'messages'; it has "
            f"{sorted(map(str, record))}. Name the column with text_column (--text-column)"
        )
    return "text", ""


def _plain(value: Any) -> Any:
    """The value without NumPy, torch and pandas; None for their missing values."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    is_missing = isinstance(value, float) and math.isnan(value)
    return None if is_missing or type(value).__name__ == "NAType" else value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{name} is {_shown(value)}, which is not a text; a document is one string, or a chat"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} holds half a character ({value[error.start]!r}, a lone surrogate) at "
                f"position {error.start}, which no tokenizer reads; remove it"
            ) from error
    return value


# --- chats ----------------------------------------------------------------------------------------


def _messages(chat: Any) -> Sequence[Document]:
    if isinstance(chat, str):
        try:
            chat = json.loads(chat)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its messages are a string that is not JSON ({error})") from error
    if not isinstance(chat, list | tuple):
        raise ValueError(f"its messages are {_shown(chat)}, not a list of messages")
    made = [_message(message) for message in chat]
    is_same = all(one is other for one, other in zip(made, chat, strict=True))
    return chat if is_same else made


def _message(message: Any) -> Document:
    if type(message) is dict and message.get("role") in _OWN_ROLES:  # most are, and need no look
        content = message.get("content")
        if type(content) is str and content.isascii():
            return message
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is {_shown(message)}; it must have a role and content")
    said = message.get("role") or message.get("from")
    role = _ROLES.get(str(said).lower())
    if role is None:
        raise ValueError(
            f"a message has the role {_shown(said)}, which is not known; rename it to one of "
            f"{', '.join(_ROLES)}"
        )
    content = _content(message["content"] if "content" in message else message.get("value"))
    if role == message.get("role") and content is message.get("content"):
        return message
    others = {k: v for k, v in message.items() if k not in ("from", "value")}
    return others | {"role": role, "content": content}


def _content(content: Any) -> str | None:
    """What a message says, of several parts the text of all."""
    content = _plain(content)
    if content is None:
        return None
    if not isinstance(content, list):
        return _text(content, "the content of a message")
    parts = [{"text": part} if isinstance(part, str) else part for part in content]
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ValueError(f"a part of a message is {_shown(kind)}; only text can be read")
    return "".join(_text(part.get("text"), "a part of a message") for part in parts)


# --- token ids ------------------------------------------------------------------------------------


def _token_ids(record: Document, ids: Any) -> dict[str, Any]:
    """Token ids and what belongs to them, without the tokens that a mask leaves out."""
    if not isinstance(ids, list):
        raise ValueError(f"its input_ids are {_shown(ids)}, not a list of whole numbers")
    beside = {k: _plain(record.get(k)) for k in _BESIDE_IDS}
    n_prompt = beside["n_prompt_tokens"]
    if n_prompt is not None and not (type(n_prompt) is int and 0 <= n_prompt <= len(ids)):
        raise ValueError(
            f"its n_prompt_tokens is {_shown(n_prompt)}; it must be a whole number, at most that "
            f"of its {len(ids)} input_ids"
        )
    made = {"input_ids": ids} | {k: v for k, v in beside.items() if v is not None}
    if (mask := made.pop("attention_mask", None)) is None:
        return made
    per_token = [k for k in ("input_ids", "role_ids") if k in made]
    sizes = {k: len(v) for k in per_token if isinstance(v := made[k], list)}
    is_kept = np.asarray(mask) if isinstance(mask, list) else np.zeros(0)
    if {*sizes.values()} != {is_kept.size} or is_kept.ndim != 1:
        raise ValueError(
            f"its attention_mask has {is_kept.size} values, for {sizes}: one for each token is "
            "needed"
        )
    if not np.isin(is_kept, (0, 1)).all():
        raise ValueError(
            f"its attention_mask holds {sorted({*is_kept.tolist()} - {0, 1})[:3]}; it must be 1 "
            "where a token is real and 0 where it is padding"
        )
    is_kept = is_kept.astype(bool)
    if not is_kept.all():
        for key in per_token:
            made[key] = np.asarray(made[key])[is_kept].tolist()
        if n_prompt := made.get("n_prompt_tokens"):
            made["n_prompt_tokens"] = int(is_kept[:n_prompt].sum())
    return made


def _shown(value: Any) -> str:
    """A value in an error: its beginning, and its type where that does not say it."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return shown if value is None or isinstance(value, str) else f"{type(value).__name__} {shown}"
