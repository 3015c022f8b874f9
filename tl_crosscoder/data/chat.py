"""Documents to token ids, with the role of each token: a speaker of the chat, or the template.

`encode_documents` gives `ids [n]` and `role_ids [n]` (indices into `ROLES`) for each document; ids
begin with exactly one BOS where the tokenizer has one. Limit: roles are found by where the template
puts each message; where a template rewrites a message beyond trimming it, the whole rewritten span
gets the role of the message.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from jinja2 import TemplateError

from tl_crosscoder.data.documents import Document, source_of
from tl_crosscoder.models.tokenizer import own_bos_id, tokenizer_sha256

ROLES = ("text", "system", "user", "assistant", "tool", "template")
"""What a token is part of; `text` is any document that is not a chat."""
_TEXT, _TEMPLATE = 0, ROLES.index("template")
_TOGETHER = 256


@dataclass(frozen=True)
class EncodedDocument:
    """One document as tokens."""

    ids: np.ndarray
    """`[n]`, int32."""
    role_ids: np.ndarray
    """`[n]`, uint8: index into `ROLES`."""
    document: Document


def encode_documents(
    documents: Sequence[Document], tokenizer: Any, *, add_generation_prompt: bool = False
) -> list[EncodedDocument]:
    """Token ids and roles of documents, with one call of the tokenizer for all of them.

    Chats go through the tokenizer's template; `add_generation_prompt` ends them with what the
    template puts before an answer.

    Raises:
        ValueError: chats without a template or against its rules, ids that the tokenizer does not
            have, or ids of another tokenizer.
    """
    rendered = {
        i: _rendered(document, tokenizer, add_generation_prompt=add_generation_prompt)
        for i, document in enumerate(documents)
        if "input_ids" not in document
    }
    tokenized = dict(zip(rendered, _tokenized([*rendered.values()], tokenizer), strict=True))
    bos, encoded = own_bos_id(tokenizer), []
    for i, document in enumerate(documents):
        ids, roles = tokenized[i] if i in tokenized else _given_ids(document, tokenizer)
        # Many templates write BOS themselves, and the tokenizer would add a second one.
        if bos is not None and (not len(ids) or ids[0] != bos):
            is_chat = "messages" in document
            ids, roles = (
                np.insert(ids, 0, bos),
                np.insert(roles, 0, _TEMPLATE if is_chat else _TEXT),
            )
        encoded.append(EncodedDocument(ids, roles, document))
    return encoded


def encode_stream(
    documents: Iterable[Document], tokenizer: Any, *, add_generation_prompt: bool = False
) -> Iterator[EncodedDocument]:
    """`encode_documents` of any iterable, read as it is needed, some hundred at a time."""
    stream = iter(documents)
    while batch := list(islice(stream, _TOGETHER)):
        yield from encode_documents(batch, tokenizer, add_generation_prompt=add_generation_prompt)


def _tokenized(
    texts: Sequence[tuple[str, np.ndarray | None]], tokenizer: Any
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and roles of each text, from the roles of its characters (None: all are `text`)."""
    if not texts:
        return []
    has_chats = any(roles is not None for _, roles in texts)
    if has_chats and not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell which characters each token covers, and so "
            "not which message of a chat it belongs to. Load the tokenizer with use_fast=True, or "
            "give the chats as plain text under 'text'."
        )
    found = tokenizer(
        [text for text, _ in texts],
        add_special_tokens=False,
        return_offsets_mapping=has_chats,
        return_attention_mask=False,
        verbose=False,
    )
    tokenized = []
    for row, (_, roles) in enumerate(texts):
        ids = np.asarray(found["input_ids"][row], dtype=np.int32)
        if roles is None:
            tokenized.append((ids, np.full(len(ids), _TEXT, dtype=np.uint8)))
        else:
            tokenized.append((ids, _token_roles(found["offset_mapping"][row], roles)))
    return tokenized


def _token_roles(offsets: Sequence[tuple[int, int]], roles: np.ndarray) -> np.ndarray:
    """Roles of tokens: a token with any character of a message belongs to that message.

    Tokens cross borders (most begin with the space before their word), so the last character
    decides, or the first one where the last is the template's.
    """
    if len(offsets) == 0:
        return np.zeros(0, dtype=np.uint8)
    starts, ends = np.asarray(offsets).T
    padded = np.append(roles, _TEMPLATE).astype(np.uint8)
    last = np.where(ends > starts, padded[np.maximum(ends - 1, 0)], _TEMPLATE)
    first = np.where(ends > starts, padded[starts], _TEMPLATE)
    return np.where(last == _TEMPLATE, first, last).astype(np.uint8)


def _given_ids(document: Document, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
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
    return ids.astype(np.int32), roles


def _rendered(
    document: Document, tokenizer: Any, *, add_generation_prompt: bool
) -> tuple[str, np.ndarray | None]:
    """A document as the text that is tokenised, and for a chat the role of every character."""
    if "messages" not in document:
        return document["text"], None
    if not tokenizer.chat_template:
        raise ValueError(
            f"the text of {source_of(document)!r} holds chats ('messages'), but the tokenizer has "
            "no chat template. Set tokenizer.chat_template, or give the chats as plain text under "
            "'text'."
        )
    messages = list(document["messages"])
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template refuses a chat of {source_of(document)!r} "
            f"({error}; its roles are {[m.get('role') for m in messages]}). Remove or merge "
            "these turns."
        ) from error
    return text, _character_roles(messages, text, tokenizer)


def _character_roles(messages: Sequence[Document], text: str, tokenizer: Any) -> np.ndarray:
    """Role of every character of a rendered chat.

    A search for the messages in the text fails where a message repeats words of the template
    ("user"). So the chat is rendered a second time with a private-use mark in place of each
    message: what stands between the marks is the template's.
    """
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    marked = tokenizer.apply_chat_template(
        [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)], tokenize=False
    )
    pieces = re.split("\ue000(\\d+)\ue001", marked)
    roles = np.full(len(text), _TEMPLATE, dtype=np.uint8)
    at = len(pieces[0])
    for index, following in zip(pieces[1::2], pieces[2::2], strict=True):
        message = messages[int(index)]
        role = message.get("role") if message.get("role") in ROLES else "system"
        end = _end_of(str(message.get("content") or ""), text, at, following)
        roles[at:end] = ROLES.index(role)
        at = end + len(following)
    return roles


def _end_of(content: str, text: str, at: int, following: str) -> int:
    """End of a message at `at`: after it verbatim, after it trimmed, or else before `following`."""
    for written in (content, content.strip()):
        if text.startswith(written + following, at):
            return at + len(written)
    end = text.find(following, at) if following else len(text)
    return len(text) if end < 0 else end
