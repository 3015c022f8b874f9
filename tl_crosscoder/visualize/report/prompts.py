"""Prompts from held-out text: what a chat begins with, or the first tokens of a text.

Contract: what is shown of each prompt, and its ids. Limit: only the beginning of a chat, up to the
first answer.
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from tl_crosscoder.activations.documents import Document
from tl_crosscoder.activations.roles import encode_documents
from tl_crosscoder.run_folder import RunFolder

N_CANDIDATES = 24
"""Prompts that are taken."""
_LONGEST = 12
"""Tokens of a document that is no chat."""


def held_out_prompts(
    run: RunFolder, text: str | None = None, *, max_new_tokens: int
) -> list[tuple[str, list[int]]]:
    """The first different prompts, of chats where there are any.

    Args:
        run: of the models.
        text: None is the run's held-out text.
        max_new_tokens: room to leave in the models' context.

    Raises:
        FileNotFoundError: the run keeps no held-out text and none is named.
        ValueError: no document begins with a prompt that leaves the room.
    """
    room = run.models.n_ctx - max_new_tokens
    found: dict[str, list[int]] = {}
    for shown, ids in _beginnings(run.documents(text), run.models.tokenizer):
        if len(ids) <= room:
            found.setdefault(shown, ids)
        if len(found) == N_CANDIDATES:
            break
    if not found:
        raise ValueError(
            f"the text has no document that begins with a prompt of at most {room} tokens. Give "
            "prompts (--prompts), or make the report without samples (--no-samples)."
        )
    return [*found.items()]


def _beginnings(documents: Sequence[Document], tokenizer: Any) -> Iterator[tuple[str, list[int]]]:
    chats = [d["messages"] for d in documents if "messages" in d]
    for messages in chats:
        asked = [*takewhile(lambda m: m["role"] != "assistant", messages)]
        if asked:
            document: Document = {"messages": asked}
            (encoded,) = encode_documents([document], tokenizer, add_generation_prompt=True)
            yield _shown(asked), encoded.ids.tolist()
    for document in documents if not chats else ():
        (encoded,) = encode_documents([document], tokenizer)
        ids = encoded.ids[:_LONGEST].tolist()
        if ids:
            yield tokenizer.decode(ids, skip_special_tokens=True), ids


def _shown(messages: Sequence[dict[str, str]]) -> str:
    """A user's turn as it is; more turns with their roles."""
    if [m["role"] for m in messages] == ["user"]:
        return messages[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)
