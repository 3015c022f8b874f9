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

from microworld.tokenizer import BOS_ID, PAD_ID
from microworld.world import Document

IGNORED_LABEL = -100


def document_tokens(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> list[list[int]]:
    """Token ids of each document, with its BOS and its end token."""
    texts = [
        cast(
            str,
            tokenizer.apply_chat_template(
                cast(list[dict[str, str]], document["messages"]), tokenize=False
            ),
        )
        if "messages" in document
        else f"{tokenizer.bos_token}{document['text']}{tokenizer.eos_token}"
        for document in documents
    ]
    return cast(list[list[int]], tokenizer(texts, add_special_tokens=False)["input_ids"])


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
