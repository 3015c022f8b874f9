"""Tokens of a text with activations of latents and predictions of models, in a notebook or saved.

Contract: models and text in, `TokensHtml` out, which shows itself in Jupyter and saves as a page;
text is a string, a chat or another document, or contexts of a `TokenizedText`, each of which has
its own panels. Values are latent activations, norms of what a latent writes, or nats. Limit: a
panel holds all tokens of its context, so choose contexts (`text[:2]`) rather than show a thousand.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.example_database import ExampleDatabase
from tl_crosscoder.baselines.logit_amplification import two_models
from tl_crosscoder.crosscoder.crosscoder import Crosscoder, sparse_codes
from tl_crosscoder.crosscoder.site_views import check_source, checked_latents
from tl_crosscoder.data.documents import Document
from tl_crosscoder.data.harvest import harvest
from tl_crosscoder.data.tokens import TokenizedText, tokenize
from tl_crosscoder.interventions.live import EditedModel
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.report.circuits import TokenPanel, TokensHtml
from tl_crosscoder.report.token_panels import (
    colored_tokens,
    colored_tokens_multi,
    next_log_probs,
    text_tokens,
    token_log_probs,
    token_namer,
)

Text = str | Document | TokenizedText
_LEAST_BOUND = 1.0
"""Nats with full colour at least, so that equal models do not look different."""


@torch.no_grad()
def latent_tokens(
    models: ActivationSource,
    crosscoder: Crosscoder,
    text: Text,
    latents: int | Sequence[int] | Int[Tensor, " n"],
    *,
    by_site: bool = False,
) -> TokensHtml:
    """Codes of one latent, or of several to choose from, at each token.

    Args:
        models: those the dictionary was trained on; of a diff-SAE, their difference.
        crosscoder: the dictionary.
        text: see the module. Masked tokens (BOS, first position) have code 0.
        latents: indices in the dictionary.
        by_site: show f_j ||d_j^m||, the norm of what a latent writes to each site, in place of the
            code f_j.

    Raises:
        ValueError: a dictionary of other models, a latent out of range, or text that is too long.
    """
    check_source(models, crosscoder)
    ids = checked_latents([latents] if isinstance(latents, int) else latents, crosscoder)
    labels, weights = [f"latent {j}" for j in ids.tolist()], crosscoder.W_dec.new_ones(len(ids), 1)
    if by_site:
        labels = [f"{label}, {site.name}" for label in labels for site in crosscoder.sites]
        rows = [crosscoder.decoder(i)[ids] for i in range(crosscoder.n_sites)]
        weights = torch.stack([row.norm(dim=-1) for row in rows], dim=-1)
    panels = []
    for heading, context in _contexts(models, text):
        codes = _codes(models, crosscoder, context, ids)
        values = (codes[:, :, None] * weights).flatten(1).cpu()
        tokens = text_tokens(models.tokenizer, context.tokens[0].tolist())
        if len(labels) == 1:
            panels.append(colored_tokens(tokens, values[:, 0], heading=labels[0] + heading))
        else:
            heading = heading.removeprefix(", ")
            panels.append(colored_tokens_multi(tokens, values, labels, heading=heading))
    return TokensHtml(panels=tuple(panels))


def example_tokens(
    database: ExampleDatabase, latent: int, *, n: int = 8, kind: str | None = None
) -> TokensHtml:
    """Stored examples of a latent, all on one scale; neither models nor tokenizer are needed.

    Args:
        database: of a run, `examples.sqlite`.
        latent: which; one that was never active has no examples, and no panels.
        n: how many examples.
        kind: only this of `KINDS`.

    Raises:
        ValueError: a latent or a kind that does not exist, or an n below 0.
    """
    stored = database.latent(latent, kind=kind, n=n)
    bound = max((value for example in stored for value in example.activations), default=None)
    panels = [
        colored_tokens(
            example.tokens,
            example.activations,
            heading=f"latent {latent}: {example.value:.2f} ({example.source}, {example.role})",
            bound=bound,
        )
        for example in stored
    ]
    return TokensHtml(panels=tuple(panels))


def compared_tokens(models: ModelPair, text: Text) -> TokensHtml:
    """Log-probability of each token by both models, and the fine-tuned one minus the base one.

    Args:
        models: a pair, or more sites.
        text: see the module.

    Raises:
        ValueError: no two models, an unknown site, or text that is too short or too long.
    """
    base, finetuned = two_models(models)
    panels = []
    for heading, context in _contexts(models, text):
        logits = [models.logits(context.tokens, site=site)[0] for site in (base, finetuned)]
        labels = f"{finetuned} - {base}", base, finetuned
        panels.append(_change(models, context, logits, labels=labels, heading=heading))
    return TokensHtml(panels=tuple(panels))


def edited_tokens(
    models: ModelPair, text: Text, edit: AbstractContextManager[EditedModel]
) -> TokensHtml:
    """Log-probability of each token before and after an intervention, and the change.

        edited_tokens(pair, "I cannot tell you", ablated(pair, crosscoder, [3, 17]))

    Args:
        models: what the edit was made for.
        text: see the module.
        edit: what `ablated`, `steered` or `edited` give, not yet entered.

    Raises:
        ValueError: text that is too short or too long, or an edit that a running model cannot have.
    """
    contexts = list(_contexts(models, text))
    with edit as model:
        after = [model.logits(context.tokens)[0] for _, context in contexts]
    panels = []
    for (heading, context), edited_logits in zip(contexts, after, strict=True):
        logits = models.logits(context.tokens, site=model.site)[0], edited_logits
        labels = "after - before", "before", "after"
        panels.append(_change(models, context, logits, labels=labels, heading=heading))
    return TokensHtml(panels=tuple(panels))


def next_tokens(models: ModelPair, text: Text, *, k: int = 10) -> TokensHtml:
    """Each token by its log-probability, and the k likeliest where the pointer is, by both models.

    Args:
        models: a pair, or more sites.
        text: see the module.
        k: how many of the likeliest tokens.

    Raises:
        ValueError: no two models, a k out of range, or text that is too short or too long.
    """
    sites = two_models(models)
    name, panels = token_namer(models.tokenizer), []
    for heading, context in _contexts(models, text):
        ids = context.tokens[0]
        tokens = text_tokens(models.tokenizer, ids.tolist())
        for site in sites:
            logits = models.logits(context.tokens, site=site)[0]
            how = {"to_string": name, "k": k, "heading": site + heading}
            panels.append(token_log_probs(tokens, ids, logits, **how))
    return TokensHtml(panels=tuple(panels), is_side_by_side=True)


def _change(
    models: ModelPair,
    context: TokenizedText,
    logits: Sequence[Float[Tensor, "pos d_vocab"]],
    *,
    labels: Sequence[str],
    heading: str,
) -> TokenPanel:
    """Panel of two models on the same tokens: first how they differ, then each of them."""
    ids = context.tokens[0]
    one, other = (next_log_probs(ids, each) for each in logits)
    change = other - one
    return colored_tokens_multi(
        text_tokens(models.tokenizer, ids.tolist())[1:],
        torch.stack([change, one, other], dim=-1),
        labels,
        heading="log-probability of each token" + heading,
        bound=max(change.abs().max().item(), _LEAST_BOUND),
    )


def _codes(
    models: ActivationSource,
    crosscoder: Crosscoder,
    context: TokenizedText,
    latents: Int[Tensor, " n"],
) -> Float[Tensor, "pos n"]:
    """Codes of some latents at every token of one context, 0 at masked tokens."""
    (part,) = harvest(models, context)
    codes = sparse_codes(crosscoder, part.rows)
    counted = codes.values.new_zeros(codes.batch, len(latents))
    for i, latent in enumerate(latents.tolist()):
        is_own = codes.pattern.latents == latent
        counted[codes.pattern.tokens[is_own].long(), i] = codes.values[is_own]
    every = counted.new_zeros(context.context_size, len(latents))
    every[part.text.mask[0].to(every.device)] = counted
    return every


def _contexts(models: ActivationSource, text: Text) -> Iterator[tuple[str, TokenizedText]]:
    """Contexts one at a time, without padding, each with the end of its heading."""
    if not isinstance(text, TokenizedText):
        document = {"text": text} if isinstance(text, str) else text
        # One more than fits, so that what is too long is seen.
        size = models.n_ctx + 1
        made = tokenize([document], models.tokenizer, context_size=size, pack=False)
        if int(made.lengths[0]) > models.n_ctx:
            raise ValueError(
                f"the text is longer than the models' context of {models.n_ctx} tokens: shorten "
                "it, or give contexts of tokenize(..., context_size=...)."
            )
        yield "", made.cut(int(made.lengths[0]))
        return
    if not len(text):
        raise ValueError("there are no contexts: the text is empty.")
    for i, length in enumerate(text.lengths.tolist()):
        name = f", context {int(text.context_ids[i])}" if len(text) > 1 else ""
        yield name, text[i].cut(length)
