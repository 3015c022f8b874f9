"""Diff Mining: the tokens that a fine-tune raises on text that has nothing to do with it.

    share of token v = share of positions at which d_v is among the k largest of d = l^1 - l^0

with l^m the next-token logits of the two models on the same text (Diff Mining 2026, arXiv
2608.26462). Contract: one pass over a text, counts by token; needs no dictionary and no hook.
Limit: single tokens, without the grouping of the paper into topics.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from tl_crosscoder.baselines.logit_amplification import two_models
from tl_crosscoder.data.harvest import batches_of
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.tokenizer import token_text
from tl_crosscoder.results.render import Section
from tl_crosscoder.results.tables import TableOfRows

N_LARGEST = 100


@dataclass(frozen=True, kw_only=True)
class MinedToken:
    """A token that the fine-tune raises."""

    token: str
    token_id: int
    mined_share: float
    """Share of positions at which it is among the tokens that are raised most."""
    mined_rise: float
    """Mean of l^1 - l^0 at these positions."""


@dataclass(frozen=True, kw_only=True)
class DiffMining(TableOfRows):
    """Tokens by share, largest first."""

    ROW: ClassVar[type] = MinedToken
    rows: tuple[MinedToken, ...]
    compared: tuple[str, str]
    n_largest: int
    """Tokens that count at each position."""
    n_tokens: int
    """Positions."""

    def sections(self) -> list[Section]:
        """Tokens with their shares."""
        title = (
            f"Diff Mining: tokens among the {self.n_largest} that the fine-tune raises most, at "
            f"{self.n_tokens:,} positions of neutral text"
        )
        return [Section(title=title, columns=self.columns(), n_rows=10)]


@torch.no_grad()
def diff_mining(
    models: ModelPair,
    text: TokenizedText,
    *,
    n: int = 50,
    n_largest: int | None = None,
    batch_size: int = 8,
) -> DiffMining:
    """Run both models over a text and count which tokens the fine-tune raises most.

    Args:
        models: a pair, or more sites of two models.
        text: that has nothing to do with the fine-tune.
        n: tokens that are kept.
        n_largest: tokens that count at each position; None is 100, as in the paper, or a twentieth
            of a vocabulary of less than 2,000.
        batch_size: contexts a forward pass.

    Raises:
        ValueError: no two models, or no text.
    """
    base, finetuned = two_models(models)
    k = n_largest or min(N_LARGEST, max(1, models.d_vocab // 20))
    if not len(text) or not 1 <= k <= models.d_vocab:
        raise ValueError(
            f"{len(text)} contexts and n_largest={n_largest}: give one context or more, and 1 to "
            f"{models.d_vocab} tokens."
        )
    counts, rises = (torch.zeros(models.d_vocab, dtype=torch.float64) for _ in range(2))
    for _, part in batches_of(text, batch_size):
        at = torch.arange(part.tokens.shape[1]) < part.lengths[:, None]
        new, old = (models.logits(part.tokens, site=site) for site in (finetuned, base))
        new, old = (each[at.to(each.device)].float() for each in (new, old))
        largest = (new - old.to(new)).topk(k)
        tokens = largest.indices.flatten().cpu()
        counts += torch.bincount(tokens, minlength=models.d_vocab)
        rises.index_add_(0, tokens, largest.values.flatten().double().cpu())
    n_tokens = int(text.lengths.sum())
    chosen = [i for i in counts.argsort(descending=True, stable=True)[:n].tolist() if counts[i]]
    return DiffMining(
        rows=tuple(
            MinedToken(
                token=token_text(models.tokenizer, i),
                token_id=i,
                mined_share=counts[i].item() / n_tokens,
                mined_rise=(rises[i] / counts[i]).item(),
            )
            for i in chosen
        ),
        compared=(base, finetuned),
        n_largest=k,
        n_tokens=n_tokens,
    )
