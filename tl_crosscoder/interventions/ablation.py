"""Ablation of latents: the fine-tuned model without what some latents add to it.

    delta:    x^1 - sum_{j in S} f_j (d_j^1 - d_j^0)     what the fine-tune added, the default
    zero:     x^1 - sum_{j in S} f_j d_j^1               all that the latents write
    project:  x^1 - Q Q' x^1                             Q spans the d_j^1; at every token, no codes

`delta` takes back the patch of Minder et al. 2025. Contract: `ablation` is an edit `[batch, pos,
d_model]` for scoring; `ablated` holds it in the model while a context is open, generation included.
Tokens without codes (BOS, first position) stay as they are under `delta` and `zero`. Limit: one
hook point.

What an ablation loses when the base stream is estimated: measured against the exact one.

Contract: `measure_estimate` gives a row a latent (does the estimate find the tokens it is active
on?) and, of all together, the relative error of the shift, and KL in nats a predicted token of the
estimated ablation to the exact one beside the KL of the ablation itself. Limit: use text that the
estimate was not fitted on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.data.tokens import DROP_REASONS, TokenizedText
from tl_crosscoder.interventions.base_estimate import BaseEstimate, EstimateLoss, LatentAgreement
from tl_crosscoder.interventions.context import InterventionContext, SiteActivations
from tl_crosscoder.interventions.edits import AddLatents, Edit, ProjectOut, only
from tl_crosscoder.interventions.live import EditedModel, edited
from tl_crosscoder.interventions.mitigation import (
    Mitigated,
    Mitigation,
    Mode,
    ablated_directions,
    check_mode,
)
from tl_crosscoder.interventions.running import edited_logits, unchanged
from tl_crosscoder.models.pair import ModelPair


def ablation(
    ctx: InterventionContext, latents: Sequence[int] | Int[Tensor, " n"], mode: Mode = "delta"
) -> Edit:
    """The fine-tuned stream without some latents; the stream itself without any.

    Raises:
        ValueError: an unknown mode, or latents out of range.
    """
    check_mode(mode)
    ids, site = ctx.latents(latents), ctx.finetuned
    if not len(ids):
        return unchanged(site)
    rows = ablated_directions(ctx, ids, mode)
    if mode == "project":
        return ProjectOut(site=site, stream=site, directions=rows)
    return AddLatents(site=site, stream=site, latents=ids, directions=rows, sign=-1.0)


@contextmanager
def ablated(
    models: ModelPair,
    crosscoder: Crosscoder,
    latents: Sequence[int] | Int[Tensor, " n"],
    *,
    mode: Mode = "delta",
    estimate: BaseEstimate | None = None,
) -> Iterator[EditedModel]:
    """The fine-tuned model without some latents, while the context is open.

        with ablated(pair, crosscoder, [3, 17]) as model:
            model.generate("Once upon a time")
            model.logits(tokens)

    Codes are of both models on the same tokens, so each forward pass costs one of the base model to
    its hook, and generation runs without key-value cache. With an `estimate` only the fine-tuned
    model runs, and the cache is used; what that loses is told by `measure_estimate`.

    Args:
        models: a pair, or more sites; of a diff-SAE, its difference.
        crosscoder: trained on them.
        latents: which to take out.
        mode: see the module.
        estimate: of the base stream from the fine-tuned one; None runs the base model.

    Raises:
        ValueError: a dictionary or an estimate of other models, an unknown mode, latents out of
            range, or an estimate where the mode needs no base stream.
    """
    ctx = InterventionContext.of(models, crosscoder)
    if estimate is None:
        edit = ablation(ctx, latents, mode)
    else:
        mitigation = Mitigation.of(ctx, latents, mode=mode, estimate=estimate)
        edit = Mitigated(site=ctx.finetuned, mitigation=mitigation)
    with edited(ctx, edit) as model:
        yield model


@torch.no_grad()
def measure_estimate(
    ctx: InterventionContext,
    estimate: BaseEstimate,
    text: TokenizedText,
    *,
    latents: Sequence[int] | Int[Tensor, " n"],
    mode: Mode = "delta",
    batch_size: int = 32,
) -> EstimateLoss:
    """Compare the estimated ablation with the exact one, on held-out text.

    Args:
        ctx: models and dictionary.
        estimate: of the base stream.
        text: held out from the fit.
        latents: which are taken out.
        mode: `delta` or `zero`.
        batch_size: contexts a forward pass.

    Raises:
        ValueError: as `Mitigation.of`, no latents, or no text.
    """
    ids = ctx.latents(latents)
    if not len(ids):
        raise ValueError("there are no latents: name those that are to be taken out.")
    mitigation = Mitigation.of(ctx, ids, mode=mode, estimate=estimate)
    edits = [
        ablation(ctx, ids, mode),
        Mitigated(site=ctx.finetuned, mitigation=mitigation),
        unchanged(ctx.finetuned),
    ]
    sums = _Sums(ablated_directions(ctx, ids, mode).double())
    kl, n_predicted = torch.zeros(2, dtype=torch.float64), 0
    for acts in ctx.batches(text, batch_size=batch_size):
        assert acts.codes is not None
        is_token = (acts.text.dropped != DROP_REASONS.index("padding")).to(ids.device)
        exact = only(acts.codes, ids).to_dense()[is_token.flatten()]
        sums.add(exact, mitigation.codes(acts.x[ctx.finetuned])[is_token])
        kl += _kl_to_first(ctx, acts, edits, predicted=is_token[:, 1:])
        n_predicted += int(is_token[:, 1:].sum())
    quality = estimate.quality(ctx.models, text, batch_size=batch_size)
    return EstimateLoss(
        rows=sums.agreement(ids.tolist()),
        mode=mode,
        base_fve=quality.fve[ctx.site_name(ctx.base)],
        difference_fve=quality.difference_fve,
        shift_error=sums.error / sums.size if sums.size > 0 else float("nan"),
        kl=kl[0].item() / n_predicted,
        kl_of_ablation=kl[1].item() / n_predicted,
        n_tokens=sums.n_tokens,
    )


class _Sums:
    """Tokens of each latent, and squared lengths of shifts, over exact and estimated codes."""

    def __init__(self, directions: Float[Tensor, "n d_model"]) -> None:
        self.directions = directions
        self.counts = torch.zeros(3, len(directions), dtype=torch.long)
        self.error, self.size, self.n_tokens = 0.0, 0.0, 0

    def add(self, exact: Float[Tensor, "tokens n"], estimated: Float[Tensor, "tokens n"]) -> None:
        own, guessed = exact > 0, estimated > 0
        self.counts += torch.stack([own, guessed, own & guessed]).sum(dim=1).cpu()
        self.error += ((exact - estimated).double() @ self.directions).square().sum().item()
        self.size += (exact.double() @ self.directions).square().sum().item()
        self.n_tokens += len(exact)

    def agreement(self, latents: Sequence[int]) -> tuple[LatentAgreement, ...]:
        columns = zip(latents, *self.counts.tolist(), strict=True)
        return tuple(_agreement(*row) for row in columns)


def _kl_to_first(
    ctx: InterventionContext,
    acts: SiteActivations,
    edits: Sequence[Edit],
    *,
    predicted: Bool[Tensor, "batch pos_less_one"],
) -> Float[Tensor, " n_others"]:
    """Sums of KL(first edit || each of the others) over predicted tokens, float64."""
    first, sums = None, []
    for _, logits in edited_logits(ctx, acts, edits):
        log_p = logits[:, :-1][predicted.to(logits.device)].float().log_softmax(dim=-1)
        if first is None:
            first = log_p
        else:
            sums.append((first.exp() * (first - log_p)).sum(dtype=torch.float64).cpu())
    return torch.stack(sums)


def _agreement(latent: int, n_exact: int, n_estimated: int, n_both: int) -> LatentAgreement:
    either = n_exact + n_estimated - n_both
    return LatentAgreement(
        latent=latent,
        n_exact=n_exact,
        n_estimated=n_estimated,
        n_both=n_both,
        agreement=n_both / either if either else float("nan"),
    )
