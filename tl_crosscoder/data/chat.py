"""Documents to token ids, with the role of each token: a speaker of the chat, or the template.

`encode_documents` gives `ids [n]` and `role_ids [n]` (indices into `ROLES`) for each document; ids
begin with exactly one BOS where the tokenizer has one. Roles are found by where the template puts
each message, verified for every chat: one that cannot be aligned is an error. Limits: where a
template rewrites a message beyond trimming it, the whole rewritten span gets the role of the
message; calls of tools that it prints are the template's.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
from jinja2 import TemplateError

from tl_crosscoder.data.documents import source_of
from tl_crosscoder.data.records import BadDocuments, Document, as_document
from tl_crosscoder.models.tokenizer import own_bos_id, tokenizer_sha256

ROLES = ("text", "system", "user", "assistant", "tool", "template")
"""What a token is part of; `text` is any document that is not a chat."""
_TEXT, _TEMPLATE = 0, ROLES.index("template")
_TOGETHER = 256
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a template raises: it is a program, and messages may hold anything beside their content."""
_MARK = "\ue000{}\ue001"
"""Stands for a message: of private-use characters, which no template writes."""


@dataclass(frozen=True)
class EncodedDocument:
    """One document as tokens."""

    ids: np.ndarray
    """`[n]`, int32."""
    role_ids: np.ndarray
    """`[n]`, uint8: index into `ROLES`."""
    document: Document


def encode_documents(
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    add_generation_prompt: bool = False,
    bad: BadDocuments | None = None,
) -> list[EncodedDocument]:
    """Token ids and roles of documents, with one call of the tokenizer for all of them.

    Chats go through the tokenizer's template; `add_generation_prompt` ends them with what the
    template puts before an answer. Documents that `bad` skips are left out.

    Raises:
        ValueError: chats without a template, against its rules, or whose messages are not found in
            what it prints; ids that the tokenizer does not have, or ids of another tokenizer.
    """
    bad = bad or BadDocuments()
    good, rendered = [], {}
    given: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for i, document in enumerate(documents):
        try:
            document = _checked(document)
            if "input_ids" in document:
                given[i] = _given_ids(document, tokenizer)
            else:
                rendered[i] = _rendered(document, tokenizer, add_generation_prompt)
        except ValueError as error:
            bad.add(error)
        else:
            good.append((i, document))
    tokenized = _tokenized([*rendered.values()], tokenizer)
    made = given | dict(zip(rendered, tokenized, strict=True))
    bos = own_bos_id(tokenizer)
    return [EncodedDocument(*_with_bos(*made[i], document, bos), document) for i, document in good]


def encode_stream(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    add_generation_prompt: bool = False,
    bad: BadDocuments | None = None,
) -> Iterator[EncodedDocument]:
    """`encode_documents` of any iterable, read as it is needed, some hundred at a time."""
    stream = iter(documents)
    while batch := list(islice(stream, _TOGETHER)):
        yield from encode_documents(
            batch, tokenizer, add_generation_prompt=add_generation_prompt, bad=bad
        )


def _checked(document: Document) -> Document:
    try:
        return as_document(document)
    except ValueError as error:
        raise ValueError(
            f"a document of {source_of(document)!r} cannot be read: {error}."
        ) from error


def _with_bos(
    ids: np.ndarray, roles: np.ndarray, document: Document, bos: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and roles with BOS; many templates write it, and the tokenizer would add a second one."""
    if bos is None or (len(ids) and ids[0] == bos):
        return ids, roles
    role = _TEMPLATE if "messages" in document else _TEXT
    return np.insert(ids, 0, bos), np.insert(roles, 0, role)


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
    if not len(document["input_ids"]):
        return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.uint8)
    ids = _whole_numbers(document, "input_ids")
    if ids.min() < 0 or ids.max() >= len(tokenizer):
        raise ValueError(
            f"a document of {source_of(document)!r} holds token ids from {ids.min()} to "
            f"{ids.max()}, but the tokenizer knows 0 to {len(tokenizer) - 1}. Make the ids with "
            "the tokenizer of these models."
        )
    if not document.get("role_ids"):
        return ids.astype(np.int32), np.full(len(ids), _TEXT, dtype=np.uint8)
    roles = _whole_numbers(document, "role_ids")
    if len(roles) != len(ids) or roles.min() < 0 or roles.max() >= len(ROLES):
        raise ValueError(
            f"a document of {source_of(document)!r} has {len(ids)} input_ids and {len(roles)} "
            f"role_ids up to {roles.max()}: one for each token is needed, below {len(ROLES)}."
        )
    return ids.astype(np.int32), roles.astype(np.uint8)


def _whole_numbers(document: Document, name: str) -> np.ndarray:
    try:
        values = np.asarray(document[name])
    except ValueError:  # lists of unequal length
        values = np.zeros((0, 0))
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(
            f"the {name} of a document of {source_of(document)!r} are not a flat list of whole "
            f"numbers: {repr(document[name])[:60]}. Give one list for each document."
        )
    return values.astype(np.int64)


def _rendered(
    document: Document, tokenizer: Any, add_generation_prompt: bool
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

    def render(messages: Sequence[Document]) -> str:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    try:
        text = render(messages)
    except _REFUSALS as error:
        raise ValueError(
            f"the tokenizer's chat template refuses a chat of {source_of(document)!r} "
            f"({error}; its roles are {[m.get('role') for m in messages]}). Remove or merge "
            "these turns."
        ) from error
    roles = np.full(len(text), _TEMPLATE, dtype=np.uint8)
    for i, start, end in _spans(messages, text, render, source_of(document)):
        roles[start:end] = ROLES.index(messages[i]["role"])
    return text, roles


# --- where the messages are -----------------------------------------------------------------------

_Span = tuple[int, int, int]
"""Index of a message, and where it begins and ends in the rendered chat."""


def _spans(
    messages: Sequence[Document], text: str, render: Callable[..., str], source: str
) -> list[_Span]:
    """Where each message is in a rendered chat; ValueError where that cannot be told.

    A search for the messages in the text fails where a message repeats words of the template
    ("user"). So the chat is rendered again with a mark in place of the messages: what stands
    between the marks is the template's. Both renderings have to agree to their last character.
    """
    spoken = [i for i, message in enumerate(messages) if message.get("content")]
    try:
        spans = _aligned(messages, spoken, text, render)
        spans = _varied(messages, spoken, text, render) if spans is None else spans
    except _REFUSALS:  # of a mark where it took the message
        spans = None
    if spans is None:
        raise ValueError(
            f"the tokenizer's chat template prints a chat of {source!r} in a way that does not "
            f"tell where its messages are (the first is {messages[0].get('content')!r:.60}). Give "
            "it as plain text under 'text', or as input_ids with role_ids."
        )
    return spans


def _aligned(
    messages: Sequence[Document], spoken: Sequence[int], text: str, render: Callable[..., str]
) -> list[_Span] | None:
    """Spans by one rendering with all messages marked; None where it is not that of the text."""
    marked = [dict(message) for message in messages]
    for i in spoken:
        marked[i]["content"] = _MARK.format(i)
    before, *pieces = re.split(_MARK.format(r"(\d+)"), render(marked))
    if len({*pieces[::2]}) < len(pieces[::2]) or not text.startswith(before):
        return None
    spans, at = [], len(before)
    for index, following in zip(pieces[::2], pieces[1::2], strict=True):
        end = _end_of(messages[int(index)]["content"], text, at, following)
        if end is None:
            return None
        spans.append((int(index), at, end))
        at = end + len(following)
    return spans if at == len(text) else None


def _end_of(content: str, text: str, at: int, following: str) -> int | None:
    """End of a message at `at`: after it verbatim, after it trimmed, or after a part of it."""
    for written in (content, content.strip()):
        if text.startswith(written + following, at):
            return at + len(written)
    end = text.find(following, at) if following else len(text)
    return end if end >= 0 and text[at:end] in content else None


def _varied(
    messages: Sequence[Document], spoken: Sequence[int], text: str, render: Callable[..., str]
) -> list[_Span] | None:
    """Spans by what changes with each message alone, at one rendering each.

    Right also where the template's own words depend on a message, such as on its thoughts. None
    where a message is printed twice, or where two messages change one place.
    """
    spans, codes = [], _codes(text)
    for i in spoken:
        mark = _MARK.format(i)
        one = [*messages[:i], {**messages[i], "content": mark}, *messages[i + 1 :]]
        marked = render(one)
        if marked == text:  # this message is not printed
            continue
        if marked.count(mark) != 1:
            return None
        other = _codes(marked)
        start = _n_equal(codes, other)
        spans.append((i, start, len(text) - _n_equal(codes[start:][::-1], other[start:][::-1])))
    ordered = sorted((start, end) for _, start, end in spans)
    overlaps = any(end > start for (_, end), (start, _) in pairwise(ordered))
    return None if overlaps else spans


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)


def _n_equal(one: np.ndarray, other: np.ndarray) -> int:
    """Number of equal values at the beginning of two arrays."""
    n = min(len(one), len(other))
    differs = one[:n] != other[:n]
    return int(differs.argmax()) if differs.any() else n
