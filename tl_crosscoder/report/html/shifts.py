"""What fine-tuning does to the probability of each token of the examples, for the report.

Contract: log p of the fine-tuned model minus that of the base, in nats, of each token after those
before it; None where a context begins. Limit: contexts of the first latents only, until a budget of
tokens is spent.
"""

from collections.abc import Iterable, Sequence

import torch

from tl_crosscoder.analysis.example_database import ExampleDatabase
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.report.html.samples import MAX_LOGITS
from tl_crosscoder.report.token_panels import next_log_probs

N_SHIFTED_TOKENS = 16_384
"""Tokens of contexts that both models are run on."""
Shifts = dict[int, list[float | None]]
"""By context, an entry a token."""


def contexts_of(
    database: ExampleDatabase, latents: Iterable[int], text: TokenizedText
) -> list[int]:
    """Contexts of the largest activations, the first latents' first, as many as are run on."""
    found: dict[int, None] = {}
    for latent in latents:
        found |= dict.fromkeys(e.context for e in database.latent(latent, kind="top"))
        if len(found) * text.context_size >= N_SHIFTED_TOKENS:
            break
    return [*found][: max(1, N_SHIFTED_TOKENS // text.context_size)]


@torch.inference_mode()
def log_probability_shifts(
    models: ModelPair, text: TokenizedText, contexts: Sequence[int], *, sites: tuple[str, str]
) -> Shifts:
    """Run both models over some contexts.

    Args:
        models: the pair.
        text: that the contexts are of.
        contexts: indices in it.
        sites: base and fine-tuned model, by the names of their sites.

    Returns:
        By context the change of every token's log-probability, in nats.
    """
    size = max(1, MAX_LOGITS // (2 * text.context_size * models.d_vocab))
    found: Shifts = {}
    for part in torch.tensor(list(contexts), dtype=torch.long).split(size):
        tokens = text.tokens[part].long()
        of_sites = [models.logits(tokens, site=site) for site in sites]
        for context, ids, *logits in zip(part.tolist(), tokens, *of_sites, strict=True):
            base, finetuned = (next_log_probs(ids, each) for each in logits)
            shift = (finetuned - base).tolist()
            found[context] = [None, *(float(f"{value:.2f}") for value in shift)]
    return found
