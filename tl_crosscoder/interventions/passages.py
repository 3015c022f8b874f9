"""Passages: predicted tokens sentence by sentence, each with the tokens that lead to it.

One context may hold several things that changed: a hint, and after it a guess that is denied. What
latents carry is therefore summed by passage. A passage ends with a predicted token that ends a
sentence, or with the last of a run of predicted tokens (an answer, a document); what is predicted
right after a token counts for the passage of the predicted token, so a question belongs to the
answer. Contract: every context has one passage or more, and every position belongs to one. Limit:
sentences are known by the marks at the end of a token's text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_crosscoder.data.tokens import DROP_REASONS, TokenizedText
from tl_crosscoder.interventions.edits import TokenMask
from tl_crosscoder.models.tokenizer import token_text

ENDS_SENTENCE = re.compile(r"(\n|[.!?…。！？][\"'”’»)\]]*)\s*$")  # noqa: RUF001


@dataclass(frozen=True, eq=False, kw_only=True)
class Passages:
    """The passages of some contexts, in their order."""

    spans: Int[Tensor, "n_passages 3"]
    """Context, and the first and the last position plus one of what is predicted."""
    numbers: Int[Tensor, "contexts pos"]
    """Which passage a position belongs to, as an index into `spans`."""


def passages_of(
    predicted: Bool[Tensor, "contexts pos_less_one"], ends: Bool[Tensor, "contexts pos"]
) -> Passages:
    """Cut predictions into passages.

    Args:
        predicted: positions whose next token is predicted.
        ends: tokens that end a sentence, see `sentence_ends`.
    """
    is_predicted = torch.nn.functional.pad(predicted, (1, 0))
    goes_on = torch.nn.functional.pad(is_predicted[:, 1:], (0, 1))
    last = is_predicted & (ends | ~goes_on)
    counts = last.sum(dim=1).clamp(min=1)
    before = counts.cumsum(dim=0) - counts
    # A context without predictions has one passage, which is empty.
    numbers = torch.minimum(last.long().cumsum(dim=1), counts[:, None] - 1) + before[:, None]
    contexts = torch.repeat_interleave(torch.arange(len(counts)), counts)
    spans = torch.zeros(len(contexts), 3, dtype=torch.long)
    spans[:, 0] = contexts
    at, stop = last.nonzero().unbind(dim=1)
    own = numbers[at, (stop - 1).clamp(min=0)]
    spans[own, 2] = stop + 1
    n_pos = ends.shape[1]
    # A token is predicted from the position before it.
    first = torch.full((len(contexts),), n_pos)
    rows, places = is_predicted.nonzero().unbind(dim=1)
    first.scatter_reduce_(0, numbers[rows, places - 1], places, reduce="amin")
    spans[:, 1] = torch.minimum(first, spans[:, 2])
    return Passages(spans=spans, numbers=numbers)


def sentence_ends(tokens: Int[Tensor, "contexts pos"], tokenizer: Any) -> Bool[Tensor, "..."]:
    """Tokens whose text ends a sentence, `[contexts, pos]`."""
    ids, inverse = tokens.unique(return_inverse=True)
    texts = (token_text(tokenizer, int(i)) for i in ids)
    return torch.tensor([ENDS_SENTENCE.search(t) is not None for t in texts])[inverse]


def passage_text(
    text: TokenizedText, spans: Int[Tensor, "n_passages 3"] | Sequence[Sequence[int]]
) -> tuple[TokenizedText, TokenMask]:
    """Passages as contexts that end where they do, and which of their tokens are predicted."""
    spans = torch.as_tensor(spans, dtype=torch.long)
    own, at = text[spans[:, 0]], torch.arange(text.context_size)
    padding = torch.full_like(own.dropped, DROP_REASONS.index("padding"))
    is_after = at >= spans[:, 2:]
    cut = replace(own, dropped=torch.where(is_after, padding, own.dropped))
    return cut, TokenMask(chosen=~is_after & (at >= spans[:, 1:2]))
