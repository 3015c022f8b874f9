"""Texts that a fine-tune writes from random beginnings, the most telling ones first.

    log PPL^0 - log PPL^1      mean over the written tokens of log p^1 - log p^0

Written by the fine-tuned model (perplexity difference 2026, arXiv 2605.00994), or from amplified
logits l^1 + alpha (l^1 - l^0) (contrastive decoding 2026, arXiv 2605.25902; see
`logit_amplification`). Contract: beginnings are a few consecutive tokens of a text, without a chat
template; sampling is seeded. Limit: what a model writes only when asked is not found so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from tl_crosscoder.baselines.logit_amplification import amplified_tokens, two_models
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models import tokenizer as tokenization
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.results.render import Section
from tl_crosscoder.results.tables import TableOfRows


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One text."""

    prefill: str
    written: str
    n_written: int
    """Tokens that were written."""
    log_ppl_difference: float
    """log PPL^0 - log PPL^1 of them, nats a token."""


@dataclass(frozen=True, kw_only=True)
class Generations(TableOfRows):
    """Texts, those that the base model finds least likely first."""

    ROW: ClassVar[type] = Generation
    rows: tuple[Generation, ...]
    compared: tuple[str, str]
    alpha: float
    """Of amplified logits; 0 is the fine-tuned model."""
    temperature: float
    seed: int

    def sections(self) -> list[Section]:
        """The first texts."""
        by = f"amplified logits (alpha {self.alpha:g})" if self.alpha else "the fine-tuned model"
        title = (
            f"What {by} writes from {len(self.rows)} random beginnings, by how much less likely it "
            "is in the base model"
        )
        return [Section(title=title, columns=self.columns(), n_rows=5)]


def prefills(
    text: TokenizedText, models: ModelPair, *, n: int = 50, length: int = 3, seed: int = 0
) -> list[list[int]]:
    """Ids of random beginnings: `length` consecutive tokens of a text each, after BOS if any.

    Raises:
        ValueError: no context of the text is as long.
    """
    long = (text.lengths > length).nonzero().squeeze(1)
    if not len(long) or length < 1:
        raise ValueError(f"no context of this text has more than {length} tokens to begin with.")
    generator = torch.Generator().manual_seed(seed)
    head = models.encode("", prepend_bos=True)
    found = []
    for _ in range(n):
        i = int(long[torch.randint(len(long), (), generator=generator)])
        first = 1 + int(torch.randint(int(text.lengths[i]) - length, (), generator=generator))
        found.append([*head, *text.tokens[i, first : first + length].tolist()])
    return found


@torch.no_grad()
def generations(
    models: ModelPair,
    beginnings: Sequence[list[int]],
    *,
    alpha: float = 0.0,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    seed: int = 0,
) -> Generations:
    """Write on from beginnings, and rank the texts by log PPL^0 - log PPL^1.

    Args:
        models: a pair, or more sites of two models.
        beginnings: ids, from `prefills`.
        alpha: above 0 from l^1 + alpha (l^1 - l^0).
        max_new_tokens: of each.
        temperature: 0 is greedy.
        seed: of sampling.

    Raises:
        ValueError: as `ModelPair.generate_tokens` does.
    """
    base, finetuned = two_models(models)
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    pairs = (
        amplified_tokens(models, beginnings, alpha=alpha, **how)
        if alpha
        else models.generate_tokens(beginnings, site=finetuned, **how)
    )
    rows = [
        Generation(
            prefill=tokenization.decode_continuation(models.tokenizer, [], start),
            written=tokenization.decode_continuation(models.tokenizer, start, new),
            n_written=len(new),
            log_ppl_difference=_log_ppl_difference(models, start, new),
        )
        for start, new in pairs
        if new
    ]
    rows.sort(key=lambda row: row.log_ppl_difference, reverse=True)
    return Generations(
        rows=tuple(rows),
        compared=(base, finetuned),
        alpha=alpha,
        temperature=temperature,
        seed=seed,
    )


def _log_ppl_difference(models: ModelPair, start: list[int], new: list[int]) -> float:
    base, finetuned = two_models(models)
    tokens, taken = torch.tensor([[*start, *new]]), torch.tensor(new)[:, None]
    log_p = []
    for site in (base, finetuned):
        logits = models.logits(tokens, site=site)[0, len(start) - 1 : -1].float()
        log_p.append(logits.log_softmax(dim=-1).gather(1, taken.to(logits.device)).mean().item())
    return log_p[1] - log_p[0]
