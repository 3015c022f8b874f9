"""Changes: the few things that a fine-tune changed, with their contexts, predictions and latents.

What latents carry in each context (`Attribution.of_contexts`, what carries the change positive) is
factorised, A ≈ W H with W, H >= 0 (non-negative matrix factorisation, multiplicative updates of
Lee and Seung 2001): a row of H is a change's latents, a column of W its contexts. Every entry of A
is shared out over changes as W H is, so that shares add up to what the latents carry. Their number
is the largest at which seeds and halves of the contexts find the same rows of H again, none of
which is another's double or below `LEAST_SHARE`; it may be 0.
Limit: a change is found by which latents carry it together; two that share them all are one.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.interventions.attribution_result import Attribution, measured_text
from tl_crosscoder.interventions.behaviour import Predictions
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.running import kl_divergence, log_probs_at, predicted
from tl_crosscoder.models.forward import continued
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.tokenizer import token_text
from tl_crosscoder.results.render import Section
from tl_crosscoder.results.tables import TableOfRows

MOST = 8
"""Changes that are looked for at most."""
AGREEMENT = 0.9
"""Cosine that rows of H have to reach between seeds, and between halves of the contexts."""
LEAST_SHARE = 0.02
"""Of what latents carry, for the smallest change."""
N_LATENTS = 300
"""First latents of the ranking that are grouped."""
N_STARTS, N_UPDATES, TINY = 12, 150, 1e-12
N_CONTEXTS, N_TOKENS = 16, 6
"""Contexts of a change whose predictions are looked at, and tokens that are named."""
Factors = tuple[Float[Tensor, "n_contexts n"], Float[Tensor, "n n_latents"]]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing that changed."""

    place: int
    share: float
    """Share of the whole change, over all contexts."""
    agreement: float
    """Cosine of its latents with those that are found again, the least over seeds and halves."""
    before: str
    """Text before the prediction that moves most in its strongest context."""
    base_token: str
    """Likeliest token there with the base's activation at the hook."""
    finetuned_token: str
    raised: tuple[str, ...]
    """Tokens that the fine-tune makes likelier in its contexts, most first."""
    lowered: tuple[str, ...]
    latents: tuple[int, ...]
    """Latents that carry it, most first."""
    attributions: tuple[float, ...]
    """Nats of each of them in this change."""
    contexts: tuple[int, ...]
    """Its strongest contexts, by place in the text."""


@dataclass(frozen=True, kw_only=True)
class Changes(TableOfRows):
    """The changes, largest first; none where nothing is found again."""

    ROW: ClassVar[type] = Change
    rows: tuple[Change, ...]
    agreements: tuple[float, ...]
    """Least agreement with 1, 2, ... changes."""
    effect: str
    compared: tuple[str, str]
    hook_name: str

    def lines(self) -> list[str]:
        """A line each, texts first."""
        if not self.rows:
            return ["No change is found again over seeds and halves of the text."]
        return [
            f"{c.place}  {c.share:.0%} of the change  after {c.before!r}: {c.base_token!r} -> "
            f"{c.finetuned_token!r}   latents {', '.join(map(str, c.latents[:3]))}"
            for c in self.rows
        ]

    def sections(self) -> list[Section]:
        """The lines, and the tokens that each raises and lowers."""
        notes = [
            note
            for line, c in zip(self.lines(), self.rows or (None,), strict=True)
            for note in (line, *(() if c is None else (_moved(c),)))
        ]
        title = f"What changed in {self.effect}: {len(self.rows)} changes"
        return [Section(title=title, notes=notes)]


def _moved(change: Change) -> str:
    raised, lowered = (", ".join(map(repr, t)) for t in (change.raised, change.lowered))
    return f"     raises {raised}; lowers {lowered}"


def find_changes(
    models: ModelPair,
    crosscoder: Crosscoder,
    predictions: Predictions,
    found: Attribution,
    *,
    most: int = MOST,
    seed: int = 0,
) -> Changes:
    """Group what latents carry into changes, and look at what is predicted in each.

    Args:
        models: those of the attribution.
        crosscoder: trained on them.
        predictions: those that were explained.
        found: their attribution.
        most: changes that are looked for at most.
        seed: of the factorisations.

    Raises:
        ValueError: an attribution of other predictions.
    """
    text = predictions.text
    about = measured_text(text, n_predicted=found.text.n_predicted, part=found.text.part)
    if (about.sha256, predictions.name) != (found.text.sha256, found.effect):
        raise ValueError(
            f"the attribution is of {found.effect} on another text than {predictions.name}: give "
            "the predictions that it was computed on."
        )
    chosen = torch.tensor(found.ranking(N_LATENTS), dtype=torch.long)
    A = found.of_contexts(chosen) * (1.0 if found.change >= 0 else -1.0)
    factors, agreements = _chosen(A.clamp(min=0), most=most, seed=seed)
    ctx = InterventionContext.of(models, crosscoder)
    rows = []
    if factors is not None:
        parts = _parts(A, *factors)
        order = parts.sum(dim=(1, 2)).argsort(descending=True).tolist()
        worst = _found_again(A.clamp(min=0), factors[1], seed=seed)
        rows = [
            _change(ctx, predictions, found, parts[c], chosen, place, worst[c].item())
            for place, c in enumerate(order, 1)
        ]
    return Changes(
        rows=tuple(rows),
        agreements=tuple(agreements),
        effect=found.effect,
        compared=found.compared,
        hook_name=found.hook_name,
    )


# --- factors --------------------------------------------------------------------------------------


def factorised(A: Float[Tensor, "n_contexts n_latents"], n: int, *, seed: int = 0) -> Factors:
    """W and H of the least squared error among a few starts, rows of H of length 1.

    Source: Lee and Seung 2001. From a single start they often end with one part of two changes and
    two parts of another.
    """
    generator = torch.Generator().manual_seed(seed)
    A, starts = A.double() / A.max().clamp(min=1e-30), N_STARTS if n > 1 else 1
    W, H = (
        torch.rand((starts, *shape), generator=generator, dtype=torch.float64) + 0.1
        for shape in ((len(A), n), (n, A.shape[1]))
    )
    for _ in range(N_UPDATES):
        # Not to 0, nor to numbers so small that a CPU is slow with them.
        H = (H * (W.mT @ A) / (W.mT @ W @ H).clamp(min=TINY)).clamp(min=TINY)
        W = (W * (A @ H.mT) / (W @ (H @ H.mT)).clamp(min=TINY)).clamp(min=TINY)
    best = int((A - W @ H).square().sum(dim=(1, 2)).argmin())
    lengths = H[best].norm(dim=1)
    return W[best] * lengths, H[best] / lengths[:, None]


def matched(
    H: Float[Tensor, "n n_latents"], other: Float[Tensor, "n n_latents"]
) -> Float[Tensor, " n"]:
    """Cosine of each row with a row of its own of the others, the best pairs first."""
    unit, other = (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12) for rows in (H, other))
    cosines = unit @ other.T
    found = torch.zeros(len(H), dtype=H.dtype)
    for _ in range(len(H)):
        i, j = divmod(int(cosines.argmax()), len(H))
        found[i] = cosines[i, j]
        cosines[i], cosines[:, j] = -1, -1
    return found


def _found_again(
    A: Float[Tensor, "n_contexts n_latents"], H: Float[Tensor, "n n_latents"], *, seed: int
) -> Float[Tensor, " n"]:
    """Least agreement of each row with another seed's and with those of either half."""
    others = [A, A[::2], A[1::2]]
    each = [matched(H, factorised(o, len(H), seed=seed + 1)[1]) for o in others if len(o)]
    return torch.stack(each).amin(dim=0)


def _chosen(
    A: Float[Tensor, "n_contexts n_latents"], *, most: int, seed: int
) -> tuple[Factors | None, list[float]]:
    """Factors of the largest number at which all rows are found again, and each agreement."""
    best, agreements = None, []
    for n in range(1, min(most, *A.shape) + 1) if len(A) > 1 and bool(A.any()) else ():
        factors = factorised(A, n, seed=seed)
        agreements.append(_found_again(A, factors[1], seed=seed).min().item())
        shares = _parts(A, *factors).sum(dim=(1, 2)) / A.sum()
        overlaps = (factors[1] @ factors[1].T).fill_diagonal_(0)
        are_apart = shares.min() >= LEAST_SHARE and overlaps.max() < AGREEMENT
        if agreements[-1] >= AGREEMENT and are_apart:
            best = factors
    return best, agreements


def _parts(
    A: Float[Tensor, "n_contexts n_latents"],
    W: Float[Tensor, "n_contexts n"],
    H: Float[Tensor, "n n_latents"],
) -> Float[Tensor, "n n_contexts n_latents"]:
    """What of each entry belongs to each change; parts add up to A."""
    each = W.T[:, :, None] * H[:, None, :]
    total = each.sum(dim=0)
    even = torch.full_like(each, 1 / len(H))
    return A * torch.where(total > 0, each / total.clamp(min=1e-30), even)


# --- what is predicted ----------------------------------------------------------------------------


def _change(
    ctx: InterventionContext,
    predictions: Predictions,
    found: Attribution,
    part: Float[Tensor, "n_contexts n_latents"],
    chosen: Int[Tensor, " n_latents"],
    place: int,
    agreement: float,
) -> Change:
    by_context, by_latent = part.sum(dim=1), part.sum(dim=0)
    contexts = by_context.argsort(descending=True)[:N_CONTEXTS]
    contexts = contexts[by_context[contexts] > 0]
    latents = by_latent.argsort(descending=True)[:10]
    latents = latents[by_latent[latents] > 0]
    return Change(
        place=place,
        share=by_context.sum().item() / abs(found.change),
        agreement=agreement,
        **_predicted(ctx, predictions, contexts, by_context[contexts]),
        latents=tuple(chosen[latents].tolist()),
        attributions=tuple(by_latent[latents].tolist()),
        contexts=tuple(contexts.tolist()),
    )


@torch.no_grad()
def _predicted(
    ctx: InterventionContext,
    predictions: Predictions,
    contexts: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
) -> dict[str, Any]:
    """Tokens that are raised and lowered in some contexts, and the place that moves most."""
    models, tokenizer, site = ctx.models, ctx.models.tokenizer, ctx.finetuned
    text = predictions.text[contexts]
    mask = predicted(predictions.places, text)
    moved = torch.zeros(models.d_vocab, dtype=torch.float64)
    largest, where = -1.0, dict.fromkeys(("before", "base_token", "finetuned_token"), "")
    for i in range(len(text)):
        one = text[i].cut(int(text.lengths[i]))
        own = mask[i : i + 1, : one.context_size - 1]
        if not bool(own.any()):
            continue
        acts = ctx.acts(torch.tensor([i]), one)
        variants = torch.stack([acts.x[ctx.base], acts.x[site]])
        hook_name = models.model_sites[site].hook_name
        logits = continued(models.models[site], hook_name, one.tokens.long(), variants=variants)
        log_q, log_p = (log_probs_at(each[..., : models.d_vocab], own) for each in logits)
        moved += weights[i] * (log_p.exp() - log_q.exp()).double().sum(dim=0).cpu()
        kl = weights[i] * kl_divergence(log_p, log_q)
        if kl.max().item() > largest:
            at = int(kl.argmax())
            position = int(own[0].nonzero()[at]) + 1
            ids = one.tokens[0, :position].tolist()
            largest = kl.max().item()
            before, after = (token_text(tokenizer, int(p[at].argmax())) for p in (log_q, log_p))
            where = {"before": tokenizer.decode(ids)[-60:]}
            where |= {"base_token": before, "finetuned_token": after}
    up, down = moved.topk(N_TOKENS).indices, (-moved).topk(N_TOKENS).indices
    return {
        **where,
        "raised": tuple(token_text(tokenizer, t) for t in up[moved[up] > 0].tolist()),
        "lowered": tuple(token_text(tokenizer, t) for t in down[moved[down] < 0].tolist()),
    }
