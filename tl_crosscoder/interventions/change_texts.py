"""Texts of a change: where predictions move most, and how each model goes on from there.

Contract: plain texts and tokens of some passages, those in which most is carried first. Limit: the
first `N_LOOKED` of them; continuations are greedy, a sentence or `N_NEW` tokens at most.
"""

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.behaviour import Predictions
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import ReplaceActivation, unchanged
from tl_crosscoder.interventions.running import (
    edited_logits,
    kl_divergence,
    log_probs_at,
    predicted,
)
from tl_crosscoder.models.tokenizer import token_text

N_LOOKED, N_TOKENS, N_SHOWN, N_NEW = 16, 6, 4, 12
"""Passages that are looked at, tokens that are named, passages that are shown, new tokens."""
N_PLACES = 6
"""Places that are tried for one at which the models go on differently."""
MUCH, A_LOT = 1 / 3, 1.0
"""Of the most that a prediction of a passage moves; nats."""
LONGEST = 70
"""Characters of a text that are shown."""
_SENTENCE = re.compile(r"^\s*\S.*?([.!?…。！？][\"'”’»)\]]*(?=\s|$)|\n)", re.DOTALL)  # noqa: RUF001
Place = tuple[float, int, int]
"""Nats, passage and position."""


@torch.no_grad()
def texts_of(
    ctx: InterventionContext, predictions: Predictions, nats: Float[Tensor, " n_passages"]
) -> dict[str, Any]:
    """The fields of a `Change` that are texts.

    Args:
        ctx: models and dictionary.
        predictions: of passages, those in which most is carried first.
        nats: carried in each.
    """
    text, tokenizer = predictions.text[:N_LOOKED], ctx.models.tokenizer
    mask = predicted(predictions.places, predictions.text)[:N_LOOKED]
    site = ctx.finetuned
    edits = [ReplaceActivation(site=site, stream=ctx.base), unchanged(site)]
    moved = torch.zeros(ctx.models.d_vocab, dtype=torch.float64)
    places: list[Place] = []
    for acts in ctx.batches(text, batch_size=N_LOOKED) if len(text) else ():
        own = mask[acts.index, : acts.text.tokens.shape[1] - 1]
        log_q, log_p = (log_probs_at(each, own) for _, each in edited_logits(ctx, acts, edits))
        weights = nats[acts.index[own.nonzero()[:, 0]]].to(log_p)[:, None]
        moved += (weights * (log_p.exp() - log_q.exp())).double().sum(dim=0).cpu()
        kl = torch.zeros(own.shape)
        kl[own] = kl_divergence(log_p, log_q).float().cpu()
        most = kl.amax(dim=1)
        # The first place of a passage that moves much: the whole sentence is seen.
        bound = (MUCH * most).clamp(max=A_LOT)
        first = (kl >= bound[:, None]).int().argmax(dim=1) + 1
        places += zip(most.tolist(), acts.index.tolist(), first.tolist(), strict=True)
    up, down = moved.topk(N_TOKENS), (-moved).topk(N_TOKENS)
    return {
        **_example(ctx, text, sorted(places, reverse=True)[:N_PLACES]),
        **{
            name: tuple(token_text(tokenizer, t) for t in top.indices[top.values > 0].tolist())
            for name, top in {"raised": up, "lowered": down}.items()
        },
        "passages": tuple(
            written(text, i, int(text.lengths[i]), tokenizer)
            for i in range(min(N_SHOWN, len(text)))
        ),
    }


def _example(ctx: InterventionContext, text: TokenizedText, places: list[Place]) -> dict[str, str]:
    """What both models write at the first of these places where it differs."""
    found: dict[str, str] = {"before": "", "base_text": "", "finetuned_text": ""}
    for _, passage, position in places:
        room = min(N_NEW, ctx.models.n_ctx - position)
        if room < 1:
            continue
        prompt = text.tokens[passage, :position].tolist()
        base, finetuned = (
            _first_sentence(ctx.models.generate([prompt], site=ctx.site_name(site),
                                                max_new_tokens=room)[0])
            for site in (ctx.base, ctx.finetuned)
        )  # fmt: skip
        before = written(text, passage, position, ctx.models.tokenizer)
        found = {"before": before, "base_text": base, "finetuned_text": finetuned}
        if base != finetuned:
            break
    return found


def written(text: TokenizedText, context: int, end: int, tokenizer: Any) -> str:
    """The last two messages before a position, or the end of a plain text, without the template."""
    roles, ids = text.role_ids[context, :end].tolist(), text.tokens[context, :end].tolist()
    runs: list[list[int]] = []
    before = None
    for role, token in zip(roles, ids, strict=True):
        if role != before:
            runs.append([])
            before = role
        runs[-1] += [token] if role != ROLES.index("template") else []
    messages = (tokenizer.decode(run, skip_special_tokens=True) for run in runs if run)
    whole = " / ".join([" ".join(m.split()) for m in messages if m.strip()][-2:])
    return whole if len(whole) <= LONGEST else f"…{whole[-LONGEST:].lstrip()}"


def _first_sentence(text: str) -> str:
    found = _SENTENCE.match(text)
    short = " ".join((found.group() if found else text).split())
    return short if found or not short else f"{short}…"
