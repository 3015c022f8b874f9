"""The tokens on which each latent is most active, with their context.

`TopTokens` are the first few examples of every latent, `[n, d_sae]`, in memory; all of them, with
quantile samples, are in the `ExampleDatabase`. Limit: contexts are looked up in the tokenised text,
which has to be at hand.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.activations.text import TokenizedText
from tl_crosscoder.analysis.example_collector import KINDS, CollectedExamples


@dataclass(frozen=True, kw_only=True)
class TopTokens:
    """The n most active tokens of every latent, best first."""

    values: Float[Tensor, "n d_sae"]
    """Codes; 0 where a latent was active on fewer than n tokens."""
    positions: Int[Tensor, "n d_sae"]
    """Index into the flattened `[contexts, pos]` of the text; -1 where the value is 0."""

    @classmethod
    def of(cls, collected: CollectedExamples, *, n: int) -> "TopTokens":
        """The first n of each latent from what a pass collected."""
        values = torch.zeros(n, collected.d_sae)
        positions = torch.full((n, collected.d_sae), -1)
        is_top = (collected.kinds == KINDS.index("top")) & (collected.ranks < n)
        at = collected.ranks[is_top].long(), collected.latents[is_top].long()
        values[at] = collected.values[is_top]
        positions[at] = collected.positions[is_top].long()
        return cls(values=values, positions=positions)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One token in context."""

    before: str
    token: str
    after: str
    value: float
    """The latent's code at the token."""
    source: str
    """Where the text comes from."""


def examples(
    top: TopTokens,
    latent: int,
    text: TokenizedText,
    tokenizer: Any,
    *,
    n_before: int = 12,
    n_after: int = 6,
) -> list[Example]:
    """The stored tokens of a latent as text, best first; context ends at the context's borders."""
    found = []
    for value, position in zip(
        top.values[:, latent].tolist(), top.positions[:, latent].tolist(), strict=True
    ):
        if position < 0:
            break
        context, at = divmod(position, text.context_size)
        start = max(0, at - n_before)
        ids = text.tokens[context, start : at + 1 + n_after].tolist()
        before, token, after = _decode_parts(tokenizer, ids, at - start)
        found.append(
            Example(
                before=before,
                token=token,
                after=after,
                value=value,
                source=text.sources[int(text.source_ids[context, at])],
            )
        )
    return found


def _decode_parts(tokenizer: Any, ids: list[int], at: int) -> tuple[str, str, str]:
    """Text before, of and after one token; together the text of all.

    Decoded alone, a part loses the space before its first word in the tokenizers of Llama 2 and
    its kin, so parts are differences of prefixes. Where a character is split between tokens
    there is no such difference, and the part stands alone.
    """
    ends = (at, at + 1, len(ids))
    before, through, whole = (tokenizer.decode(ids[:end]) for end in ends)
    token = through[len(before) :] if through.startswith(before) else tokenizer.decode([ids[at]])
    after = whole[len(through) :] if whole.startswith(through) else tokenizer.decode(ids[at + 1 :])
    return before, token, after
