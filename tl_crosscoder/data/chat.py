"""Documents to token ids, with the role of each token: who says it, or the chat template.

Contract: `encode_documents` gives for each document its ids, beginning with exactly one BOS where
the tokenizer has one, and as many role ids, which index `ROLES`. Limit: roles are found by where
the template puts what was said; of a template that rewrites a message beyond trimming it, all of
that message's span counts as its role.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from tl_crosscoder.data.documents import Document, source_of
from tl_crosscoder.models.tokenizer import own_bos_id, tokenizer_sha256

ROLES = ("text", "system", "user", "assistant", "tool", "template")
"""What a token is part of; `text` is any document that is no chat."""
_TEXT, _TEMPLATE = 0, ROLES.index("template")


@dataclass(frozen=True)
class Encoded:
    """One document as tokens."""

    ids: np.ndarray
    """`[n]`, int32."""
    role_ids: np.ndarray
    """`[n]`, uint8: index into `ROLES`."""
    source: str


def encode_documents(
    documents: Sequence[Document], tokenizer: Any, *, add_generation_prompt: bool = False
) -> list[Encoded]:
    """Token ids and roles of some documents, all through the tokenizer at once.

    Chats go through the tokenizer's template, with what it puts before an answer at the end if
    `add_generation_prompt`.

    Raises:
        ValueError: chats without a template or against its rules, ids that the tokenizer does not
            have, or ids of another tokenizer.
    """
    out: list[Encoded | None] = [None] * len(documents)
    texts: list[tuple[int, str, np.ndarray | None]] = []
    for i, document in enumerate(documents):
        if "input_ids" in document:
            out[i] = _given_ids(document, tokenizer)
        elif "messages" in document:
            text = _rendered(document, tokenizer, add_generation_prompt=add_generation_prompt)
            texts.append((i, text, _character_roles(document["messages"], text, tokenizer)))
        else:
            texts.append((i, document["text"], None))
    for (i, _, roles), encoded in zip(texts, _encode(texts, tokenizer), strict=True):
        ids, token_roles = _with_bos(*encoded, tokenizer, is_chat=roles is not None)
        out[i] = Encoded(ids, token_roles, source_of(documents[i]))
    return [e for e in out if e is not None]


def _encode(
    texts: Sequence[tuple[int, str, np.ndarray | None]], tokenizer: Any
) -> list[tuple[np.ndarray, np.ndarray]]:
    if not texts:
        return []
    has_chats = any(roles is not None for _, _, roles in texts)
    if has_chats and not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters a token is made of, and so "
            "not whose a chat's tokens are. Load the tokenizer with use_fast=True, or give the "
            "chats as plain text under 'text'."
        )
    found = tokenizer(
        [text for _, text, _ in texts],
        add_special_tokens=False,
        return_offsets_mapping=has_chats,
        return_attention_mask=False,
        verbose=False,
    )
    encoded = []
    for row, (_, _, roles) in enumerate(texts):
        ids = np.asarray(found["input_ids"][row], dtype=np.int32)
        if roles is None:
            encoded.append((ids, np.full(len(ids), _TEXT, dtype=np.uint8)))
        else:
            encoded.append((ids, _token_roles(found["offset_mapping"][row], roles)))
    return encoded


def _token_roles(offsets: Sequence[tuple[int, int]], roles: np.ndarray) -> np.ndarray:
    """A token that holds any of a message belongs to it: by its last character, else its first."""
    if len(offsets) == 0:
        return np.zeros(0, dtype=np.uint8)
    starts, ends = np.asarray(offsets).T
    padded = np.append(roles, _TEMPLATE).astype(np.uint8)
    last = np.where(ends > starts, padded[np.maximum(ends - 1, 0)], _TEMPLATE)
    first = np.where(ends > starts, padded[starts], _TEMPLATE)
    return np.where(last == _TEMPLATE, first, last).astype(np.uint8)


def _with_bos(
    ids: np.ndarray, roles: np.ndarray, tokenizer: Any, *, is_chat: bool
) -> tuple[np.ndarray, np.ndarray]:
    bos = own_bos_id(tokenizer)
    if bos is None or (len(ids) and ids[0] == bos):
        return ids, roles
    role = _TEMPLATE if is_chat else _TEXT
    return np.insert(ids, 0, bos), np.insert(roles, 0, role)


def _given_ids(document: Document, tokenizer: Any) -> Encoded:
    made_with = document.get("tokenizer")
    if made_with and made_with != tokenizer_sha256(tokenizer):
        raise ValueError(
            f"a document of {source_of(document)!r} holds ids of another tokenizer than that of "
            "these models. Make it again with them (for contrastive pairs: `tl-crosscoder "
            "contrastive`)."
        )
    ids = np.asarray(document["input_ids"], dtype=np.int64)
    if ids.min() < 0 or ids.max() >= len(tokenizer):
        raise ValueError(
            f"a document of {source_of(document)!r} holds token ids from {ids.min()} to "
            f"{ids.max()}, but the tokenizer knows 0 to {len(tokenizer) - 1}. Make the ids with "
            "the tokenizer of these models."
        )
    roles = np.asarray(document.get("role_ids") or [_TEXT] * len(ids), dtype=np.uint8)
    if len(roles) != len(ids) or roles.max() >= len(ROLES):
        raise ValueError(
            f"a document of {source_of(document)!r} has {len(ids)} input_ids and {len(roles)} "
            f"role_ids up to {roles.max()}: one for each token is needed, below {len(ROLES)}."
        )
    return Encoded(
        *_with_bos(ids.astype(np.int32), roles, tokenizer, is_chat=False), source_of(document)
    )


# --- chat templates -------------------------------------------------------------------------------


def _rendered(document: Document, tokenizer: Any, *, add_generation_prompt: bool = False) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            f"the text of {source_of(document)!r} holds chats ('messages'), but the tokenizer has "
            "no chat template. Set tokenizer.chat_template, or give the chats as plain text under "
            "'text'."
        )
    messages = list(document["messages"])
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template refuses a chat of {source_of(document)!r} "
            f"({error}; its roles are {[m.get('role') for m in messages]}). Remove or merge "
            "these turns."
        ) from error


def _character_roles(messages: Sequence[Document], text: str, tokenizer: Any) -> np.ndarray:
    """The role of every character of a rendered chat.

    The chat is rendered once more with a mark in place of each message, which tells the template's
    own pieces from what was said, also where a message is a word of the template ("user").
    """
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    marked = tokenizer.apply_chat_template(
        [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)], tokenize=False
    )
    pieces = re.split("\ue000(\\d+)\ue001", marked)
    roles = np.full(len(text), _TEMPLATE, dtype=np.uint8)
    at = len(pieces[0])
    for said, following in zip(pieces[1::2], pieces[2::2], strict=True):
        message = messages[int(said)]
        end = _end_of(str(message.get("content") or ""), text, at, following)
        roles[at:end] = _role_id(message)
        at = end + len(following)
    return roles


def _end_of(content: str, text: str, at: int, following: str) -> int:
    """Where what was said ends: after it as it stands, after it trimmed, or before what follows."""
    for said in (content, content.strip()):
        if text.startswith(said + following, at):
            return at + len(said)
    end = text.find(following, at) if following else len(text)
    return len(text) if end < 0 else end


def _role_id(message: Document) -> int:
    role = message.get("role")
    return ROLES.index(role) if role in ROLES else ROLES.index("system")
