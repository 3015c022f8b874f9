"""Run edited models over a text and score what they predict.

Contract: `score_edits` gives sums a context, `[edits, kinds, contexts]`, of KL and cross-entropy in
nats, and counts; they add up and are divided once. All edits of a model share one pass of the
layers below their hooks. Limit: logits of `MAX_LOGITS` entries at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.context import InterventionContext, SiteActivations
from tl_crosscoder.interventions.edits import Edit, Places, TokenFilter
from tl_crosscoder.models.forward import Continuation
from tl_crosscoder.models.hooked import device_of, stop_layer
from tl_crosscoder.progress import progress

MAX_LOGITS = 2**25
"""Entries of logits at a time; 128 MiB in float32."""
MAX_TOKENS_ON_CPU = 4096
"""Tokens of a pass that edits share on a CPU: its caches hold no more, and longer passes are slower
than several."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EditScores:
    """Sums over the predicted tokens of each context."""

    kl: Float[Tensor, "n_edits n_kinds n_contexts"]
    """KL(reference || edited), nats, float64."""
    ce: Float[Tensor, "n_edits n_kinds n_contexts"]
    """-log p of the token that follows, nats, float64."""
    counts: Float[Tensor, "n_kinds n_contexts"]
    """Predicted tokens of each kind."""


@torch.no_grad()
def score_edits(
    ctx: InterventionContext,
    text: TokenizedText,
    edits: Sequence[Edit],
    *,
    reference: Edit,
    kinds: Mapping[str, Places],
    batch_size: int = 32,
    seen: Callable[[SiteActivations], None] | None = None,
    description: str | None = None,
) -> EditScores:
    """KL to what a reference predicts, and cross-entropy, of every edit.

    Args:
        ctx: models and dictionary.
        text: contexts; packed or not.
        edits: of any sites.
        reference: whose predictions are compared with, such as the fine-tuned model as it is.
        kinds: which predicted tokens are summed: a prediction belongs to the token it is about.
        batch_size: contexts a forward pass.
        seen: called with the activations of each batch.
        description: of a progress bar; None shows none.

    Raises:
        ValueError: a context has no token of the first kind.
    """
    every = torch.stack([predicted(places, text) for places in kinds.values()])
    _check_predictions(next(iter(kinds)), every[0])
    shape = (len(edits), len(kinds), len(text))
    kl, ce = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    bar = progress_bar(text, edits, description)
    for acts in ctx.batches(text, batch_size=batch_size):
        if seen is not None:
            seen(acts)
        n_pos = acts.text.tokens.shape[1]
        own = every[:, acts.index, : n_pos - 1]
        any_kind = own.any(dim=0)
        targets = acts.text.tokens[:, 1:][any_kind].long()[:, None]
        ((_, logits),) = edited_logits(ctx, acts, [reference])
        log_p = log_probs_at(logits, any_kind)
        for i, logits in edited_logits(ctx, acts, edits):
            log_q = log_probs_at(logits, any_kind)
            cross_entropy = -log_q.gather(-1, targets.to(log_q.device)).squeeze(-1)
            divergence = kl_divergence(log_p, log_q)
            for sums, each in ((kl, divergence), (ce, cross_entropy)):
                dense = torch.zeros(any_kind.shape, dtype=torch.float64)
                dense[any_kind] = each.double().cpu()
                sums[i][:, acts.index] = (dense * own).sum(dim=-1)
            bar.update(len(acts.index))
    bar.close()
    return EditScores(kl=kl, ce=ce, counts=every.sum(dim=-1).double())


def progress_bar(text: TokenizedText, edits: Sequence[Edit], description: str | None) -> Any:
    """A bar that ends when every context has passed under every edit."""
    n = len(text) * len(edits)
    return progress(total=n, desc=description, unit="pass", show=description is not None)


def edited_logits(
    ctx: InterventionContext, acts: SiteActivations, edits: Sequence[Edit]
) -> Iterator[tuple[int, Float[Tensor, "batch pos d_vocab"]]]:
    """The number of each edit and the logits that follow from it, those of one site in order."""
    models, tokens = ctx.models, acts.text.tokens.long()

    def hook_name(i: int) -> str:
        return models.model_sites[edits[i].site].hook_name

    # By name: a model that stands for two, as in a null pair, runs for each of them alone, so that
    # equal models predict the same to the last bit.
    by_owner: dict[str, list[int]] = {}
    for i, edit in enumerate(edits):
        by_owner.setdefault(models.model_sites[edit.site].owner, []).append(i)
    for own in by_owner.values():
        model = models.models[edits[own[0]].site]
        own.sort(key=lambda i: stop_layer(hook_name(i)) or 0)
        goes_on = Continuation(model, tokens)
        room = MAX_LOGITS // (tokens.numel() * model.cfg.d_vocab)
        if device_of(model).type == "cpu":
            room = min(room, MAX_TOKENS_ON_CPU // tokens.numel())
        room = max(1, room)
        for start in range(0, len(own), room):
            chosen = own[start : start + room]
            logits = goes_on([(hook_name(i), edits[i](acts)) for i in chosen])
            yield from zip(chosen, logits[..., : models.d_vocab], strict=True)


def predicted(places: Places, text: TokenizedText) -> Bool[Tensor, "contexts pos_less_one"]:
    """Positions whose next token is in these places."""
    return places.mask(text.role_ids, text.dropped)[:, 1:]


def _check_predictions(kind: str, mask: Bool[Tensor, "contexts pos_less_one"]) -> None:
    """Refuse contexts without a token of a kind. Raises ValueError."""
    without = (~mask.any(dim=1)).nonzero().squeeze(1).tolist()
    if without:
        raise ValueError(
            f"{len(without)} of {len(mask)} contexts have no token of the kind {kind!r} to predict "
            f"(the first is context {without[0]}). Give whole chats that end with an assistant's "
            "message, unpacked (pack=False), in contexts long enough to hold it; or measure on "
            "every token."
        )


def kinds_of(text: TokenizedText) -> dict[str, TokenFilter]:
    """Every token; where the text has chats, what the assistant says, and how each answer begins.

    The first 9 tokens of an answer, as in Minder et al. 2025. Of chats beside plain text, both.
    """
    counts = text.role_counts
    if "assistant" not in counts:
        return {"all": TokenFilter()}
    name, roles = "response", ("assistant",)
    if "text" in counts:
        name, roles = "response and text", ("assistant", "text")
    return {name: TokenFilter(roles=roles), "first 9": TokenFilter(roles=roles, first=9)}


def with_predictions(text: TokenizedText, kinds: Mapping[str, TokenFilter]) -> TokenizedText:
    """The contexts that have a token of the first kind to predict."""
    mask = predicted(next(iter(kinds.values())), text)
    return text[mask.any(dim=1).nonzero().squeeze(1)]


def log_probs_at(
    logits: Float[Tensor, "batch pos d_vocab"], chosen: Bool[Tensor, "batch pos_less_one"]
) -> Float[Tensor, "n d_vocab"]:
    """Log-probabilities of the tokens that follow chosen positions, float32."""
    return logits[:, :-1][chosen.to(logits.device)].float().log_softmax(dim=-1)


def kl_divergence(
    log_p: Float[Tensor, "n d_vocab"], log_q: Float[Tensor, "n d_vocab"]
) -> Float[Tensor, " n"]:
    """KL(p || q) in nats, on the device of p."""
    return (log_p.exp() * (log_p - log_q.to(log_p.device))).sum(dim=-1)
