"""Documents to rows of token ids, for training the organisms.

Whole documents are packed into rows of `n_ctx` tokens: every row begins with a BOS, no document is
cut, and the rest of the row is padding that the loss ignores.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_crosscoder.organisms.tokenizer import BOS_ID, PAD_ID
from tl_crosscoder.organisms.world import Document, Message

IGNORED_LABEL = -100


def chat_string(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """A conversation in the tokenizer's chat template, BOS and special tokens included."""
    text = tokenizer.apply_chat_template(
        [{"role": message["role"], "content": message["content"]} for message in messages],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    return cast(str, text)


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts that already carry their special tokens."""
    return cast(list[list[int]], tokenizer(texts, add_special_tokens=False)["input_ids"])


def document_tokens(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> list[list[int]]:
    """Token ids of each document, with its BOS and its end token."""
    texts = [
        chat_string(tokenizer, document["messages"])
        if "messages" in document
        else f"{tokenizer.bos_token}{document['text']}{tokenizer.eos_token}"
        for document in documents
    ]
    return token_ids(tokenizer, texts)


def pack(token_lists: Iterable[Sequence[int]], *, n_ctx: int) -> Int[Tensor, "row pos"]:
    """Fill rows of `n_ctx` with whole documents in order; the rest of a row is padding.

    Raises:
        ValueError: if a document is longer than a row.
    """
    rows: list[list[int]] = [[]]
    for tokens in token_lists:
        if len(tokens) > n_ctx:
            raise ValueError(f"a document of {len(tokens)} tokens does not fit in n_ctx = {n_ctx}")
        if len(rows[-1]) + len(tokens) > n_ctx:
            rows.append([])
        rows[-1].extend(tokens)
    return torch.tensor([row + [PAD_ID] * (n_ctx - len(row)) for row in rows])


def labels(tokens: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """What each position should be predicted as; padding and a next document's BOS are ignored."""
    is_ignored = (tokens == PAD_ID) | (tokens == BOS_ID)
    return tokens.masked_fill(is_ignored, IGNORED_LABEL)
