"""`Mitigation`: an ablation that needs the fine-tuned stream alone, and its export.

    p = x^1 M W_enc + c W_enc + b_enc        M and c: all sites from x^1, see `BaseEstimate`
    f = relu(p) 1[p > threshold]             x^1 - sum_{j in S} f_j v_j

so that estimate and encoder of the chosen latents are one matrix `[d_model, n]`, which
`export_mitigation` writes with a hook for plain TransformerLens. Limit: exact for `project`, which
needs no codes; else as good as the estimate: see `measure_estimate`. Codes are estimated at all
tokens but position 0 of a pass of several positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.data.tokens import DROP_REASONS, TokenizedText
from tl_crosscoder.interventions import standalone_hook
from tl_crosscoder.interventions.base_estimate import BaseEstimate, EstimateLoss, LatentAgreement
from tl_crosscoder.interventions.context import InterventionContext, SiteActivations
from tl_crosscoder.interventions.edits import Edit, LocalEdit, only, orthonormal, unchanged
from tl_crosscoder.interventions.latent_edits import Mode, ablated_directions, ablation, check_mode
from tl_crosscoder.interventions.running import edited_logits, kl_divergence, log_probs_at
from tl_crosscoder.results.tables import without_nan

TENSORS_NAME, FACTS_NAME, HOOK_NAME = "mitigation.safetensors", "mitigation.json", "hook.py"


@dataclass(frozen=True, eq=False, kw_only=True)
class Mitigation(LocalEdit):
    """Ablation of some latents of one model as tensors, for where only this model is at hand."""

    site: int
    mode: Mode
    latents: Int[Tensor, " n"]
    tensors: Mapping[str, Tensor]
    """`basis` [d_model, rank] of `project`; else `encoder` [d_model, n], `bias` and `threshold`
    [n], `directions` [n, d_model]."""

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        ctx: InterventionContext,
        latents: Sequence[int] | Int[Tensor, " n"],
        *,
        mode: Mode = "delta",
        estimate: BaseEstimate | None,
    ) -> "Mitigation":
        """Fold the estimate into the encoder of the latents.

        Raises:
            ValueError: an unknown mode, latents out of range, an estimate of other sites, or one
                that is missing or of no use to the mode.
        """
        check_mode(mode)
        ids = ctx.latents(latents)
        _check_estimate(ctx, mode, estimate)
        rows = ablated_directions(ctx, ids, mode)
        if estimate is None:
            tensors = {"basis": orthonormal(rows) if len(ids) else rows.T}
        else:
            tensors = {"directions": rows, **_folded(ctx, ids, estimate)}
        own = {name: t.detach().float().contiguous() for name, t in tensors.items()}
        return cls(site=ctx.finetuned, mode=mode, latents=ids, tensors=own)

    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos d_model"]:
        """The activation of the site without the latents."""
        return standalone_hook.mitigated(acts.x[self.site], self.tensors)

    def codes(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos n"]:
        """Estimated codes of the latents; `project` has none."""
        own = {name: tensor.to(x.device) for name, tensor in self.tensors.items()}
        return standalone_hook.codes(x.float(), own)


def export_mitigation(
    folder: str | Path,
    ctx: InterventionContext,
    latents: Sequence[int] | Int[Tensor, " n"],
    *,
    mode: Mode = "delta",
    estimate: BaseEstimate | None = None,
    loss: EstimateLoss | None = None,
) -> Path:
    """Write a folder with `hook.py`, `mitigation.safetensors` and `mitigation.json`.

        from hook import load
        model.run_with_hooks(tokens, fwd_hooks=[load("folder")])

    works where this package is not installed, in both kinds of TransformerLens model.

    Args:
        folder: new or empty.
        ctx: models and dictionary.
        latents: which are ablated.
        mode: see `ablation`.
        estimate: of the base activation; None for `project`, which needs none.
        loss: what `measure_estimate` found, recorded with it.

    Raises:
        ValueError: as `Mitigation.of`, a folder that is not empty, or a loss of something else.
    """
    folder = files.new_folder(folder)
    mitigation = Mitigation.of(ctx, latents, mode=mode, estimate=estimate)
    measured = loss and (loss.mode, [row.latent for row in loss.rows])
    ours = mode, mitigation.latents.tolist()
    if measured is not None and measured != ours:
        raise ValueError(
            f"the loss was measured for {measured}, but the mitigation is {ours}: measure it for "
            "the same mode and latents (measure_estimate)."
        )
    files.write_tensors(folder / TENSORS_NAME, mitigation.tensors)
    source = Path(standalone_hook.__file__).read_text(encoding="utf-8")
    files.write_text(folder / HOOK_NAME, source)
    # Last: a folder is known by it.
    files.write_json(folder / FACTS_NAME, without_nan(_facts(ctx, mitigation, estimate, loss)))
    return folder


def _check_estimate(ctx: InterventionContext, mode: Mode, estimate: BaseEstimate | None) -> None:
    if mode == "project" and estimate is not None:
        raise ValueError(
            "project takes directions out without codes, so an estimate of the base activation is "
            "of no use to it: leave it out."
        )
    if mode != "project" and estimate is None:
        raise ValueError(
            f"{mode} needs codes, and these need the base activation: give an estimate "
            "(BaseEstimate.fit), or choose mode='project'."
        )
    if estimate is None:
        return
    estimate.check_sites(ctx.models.model_sites)
    theirs, ours = (estimate.base, estimate.finetuned), (ctx.base, ctx.finetuned)
    if theirs != ours:
        names = [tuple(ctx.site_name(i) for i in pair) for pair in (theirs, ours)]
        raise ValueError(
            f"the estimate is for (base, finetuned) = {names[0]}, but {names[1]} are compared. Fit "
            "another with this order (comparing)."
        )


def _folded(
    ctx: InterventionContext, ids: Int[Tensor, " n"], estimate: BaseEstimate
) -> dict[str, Tensor]:
    """Encoder, bias and threshold for x^1 alone."""
    crosscoder = ctx.dictionary
    weight, bias = (t.to(crosscoder.W_enc) for t in estimate.matrix())
    if ctx.models.is_difference:
        widths = [site.d_model for site in estimate.sites]
        weights, biases = weight.split(widths, dim=1), bias.split(widths)
        weight = weights[ctx.finetuned] - weights[ctx.base]
        bias = biases[ctx.finetuned] - biases[ctx.base]
    if crosscoder.cfg.apply_b_dec_to_input:
        bias = bias - crosscoder.b_dec
    W_enc = crosscoder.W_enc[:, ids].double()
    return {
        "encoder": weight.double() @ W_enc,
        "bias": bias.double() @ W_enc + crosscoder.b_enc[ids],
        "threshold": crosscoder.threshold[ids],
    }


def _facts(
    ctx: InterventionContext,
    mitigation: Mitigation,
    estimate: BaseEstimate | None,
    loss: EstimateLoss | None,
) -> dict[str, Any]:
    models = ctx.models
    return {
        "made_with": f"tl_crosscoder {version('tl-crosscoder')}",
        "model": models.model_sites[ctx.finetuned].to_dict(),
        "compared_with": models.model_sites[ctx.base].to_dict(),
        "hook_name": models.model_sites[ctx.finetuned].hook_name,
        "d_model": models.model_sites[ctx.finetuned].d_model,
        "weight_processing": models.weight_processing,
        "mode": mitigation.mode,
        "latents": mitigation.latents.tolist(),
        "estimate": None
        if estimate is None
        else {"ridge": estimate.ridge, "n_tokens": estimate.n_tokens},
        "loss": None if loss is None else loss.about() | {"latents": loss.columns()},
    }


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
        estimate: of the base activation.
        text: held out from the fit.
        latents: which are ablated.
        mode: `delta` or `zero`.
        batch_size: contexts a forward pass.

    Raises:
        ValueError: as `Mitigation.of`, no latents, or no text.
    """
    ids = ctx.latents(latents)
    if not len(ids):
        raise ValueError("there are no latents: name those to ablate.")
    mitigation = Mitigation.of(ctx, ids, mode=mode, estimate=estimate)
    edits = [ablation(ctx, ids, mode), mitigation, unchanged(ctx.finetuned)]
    v = ablated_directions(ctx, ids, mode).double()
    counts, n_tokens = torch.zeros(3, len(ids), dtype=torch.long), 0
    shifts, kl, n_predicted = [0.0, 0.0], torch.zeros(2, dtype=torch.float64), 0
    for acts in ctx.batches(text, batch_size=batch_size):
        assert acts.codes is not None
        is_token = (acts.text.dropped != DROP_REASONS.index("padding")).to(ids.device)
        exact = only(acts.codes, ids).to_dense()[is_token.flatten()]
        guessed = mitigation.codes(acts.x[ctx.finetuned])[is_token]
        is_exact, is_guessed = exact > 0, guessed > 0
        counts += torch.stack([is_exact, is_guessed, is_exact & is_guessed]).sum(dim=1).cpu()
        for i, codes in enumerate((exact - guessed, exact)):
            shifts[i] += (codes.double() @ v).square().sum().item()
        kl += _kl_to_first(ctx, acts, edits, predicted=is_token[:, 1:])
        n_tokens, n_predicted = n_tokens + len(exact), n_predicted + int(is_token[:, 1:].sum())
    quality = estimate.quality(ctx.models, text, batch_size=batch_size)
    each = zip(ids.tolist(), *counts.tolist(), strict=True)
    return EstimateLoss(
        rows=tuple(LatentAgreement.of(*of_latent) for of_latent in each),
        mode=mode,
        base_fve=quality.fve[ctx.site_name(ctx.base)],
        difference_fve=quality.difference_fve,
        shift_error=shifts[0] / shifts[1] if shifts[1] > 0 else float("nan"),
        kl=kl[0].item() / n_predicted,
        kl_of_ablation=kl[1].item() / n_predicted,
        n_tokens=n_tokens,
    )


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
        log_p = log_probs_at(logits, predicted)
        if first is None:
            first = log_p
        else:
            sums.append(kl_divergence(first, log_p).sum(dtype=torch.float64).cpu())
    return torch.stack(sums)
