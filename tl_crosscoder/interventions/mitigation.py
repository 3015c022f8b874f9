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
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.interventions import standalone_hook
from tl_crosscoder.interventions.base_estimate import BaseEstimate, EstimateLoss
from tl_crosscoder.interventions.context import InterventionContext, SiteActivations
from tl_crosscoder.interventions.edits import orthonormal
from tl_crosscoder.interventions.live import LocalEdit
from tl_crosscoder.results.tables import without_nan

Mode = Literal["delta", "zero", "project"]
TENSORS_NAME, FACTS_NAME, HOOK_NAME = "mitigation.safetensors", "mitigation.json", "hook.py"


@dataclass(frozen=True, eq=False, kw_only=True)
class Mitigation:
    """What takes some latents out of one model's stream, as tensors."""

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
        return cls(mode=mode, latents=ids, tensors=own)

    def __call__(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The stream without the latents."""
        return standalone_hook.mitigated(x, self.tensors)

    def codes(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos n"]:
        """Estimated codes of the latents; `project` has none."""
        own = {name: tensor.to(x.device) for name, tensor in self.tensors.items()}
        return standalone_hook.codes(x.float(), own)


@dataclass(frozen=True, eq=False, kw_only=True)
class Mitigated(LocalEdit):
    """A stream under a mitigation, as it will be where only this model is at hand."""

    site: int
    mitigation: Mitigation

    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos d_model"]:
        """Without the latents."""
        return self.mitigation(acts.x[self.site])


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
        latents: which are taken out.
        mode: see `ablation`.
        estimate: of the base stream; None for `project`, which needs none.
        loss: what `measure_estimate` found, recorded with it.

    Raises:
        ValueError: as `Mitigation.of`, a folder that is not empty, or a loss of something else.
    """
    folder = files.new_folder(folder)
    mitigation = Mitigation.of(ctx, latents, mode=mode, estimate=estimate)
    if loss is not None:
        _check_loss(mitigation, loss)
    files.write_tensors(folder / TENSORS_NAME, mitigation.tensors)
    source = Path(standalone_hook.__file__).read_text(encoding="utf-8")
    files.write_text(folder / HOOK_NAME, source)
    # Last: a folder is known by it.
    files.write_json(folder / FACTS_NAME, without_nan(_facts(ctx, mitigation, estimate, loss)))
    return folder


def check_mode(mode: str) -> None:
    """Raise ValueError for an unknown mode."""
    if mode not in get_args(Mode):
        raise ValueError(f"the mode of ablation is {mode!r}; it is one of {get_args(Mode)}.")


def ablated_directions(
    ctx: InterventionContext, ids: Int[Tensor, " n"], mode: Mode
) -> Float[Tensor, "n d_model"]:
    """What a unit of each latent takes out of the stream; the directions projected out."""
    return (ctx.difference if mode == "delta" else ctx.decoder(ctx.finetuned))[ids]


def _check_estimate(ctx: InterventionContext, mode: Mode, estimate: BaseEstimate | None) -> None:
    if (estimate is None) != (mode == "project"):
        raise ValueError(
            "project takes directions out without codes, so an estimate of the base stream is of "
            "no use to it: leave it out."
            if estimate is not None
            else f"{mode} needs codes, and these need the base stream: give an estimate "
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


def _check_loss(mitigation: Mitigation, loss: EstimateLoss) -> None:
    measured = loss.mode, [row.latent for row in loss.rows]
    ours = mitigation.mode, mitigation.latents.tolist()
    if measured != ours:
        raise ValueError(
            f"the loss was measured for {measured}, but the mitigation is {ours}: measure it for "
            "the same mode and latents (measure_estimate)."
        )


def _folded(
    ctx: InterventionContext, ids: Int[Tensor, " n"], estimate: BaseEstimate
) -> dict[str, Tensor]:
    """Encoder, bias and threshold for x^1 alone."""
    crosscoder = ctx.dictionary
    weight, bias = (t.to(crosscoder.W_enc) for t in estimate.matrix())
    if ctx.is_of_difference:
        ends = torch.tensor([s.d_model for s in estimate.sites]).cumsum(0).tolist()
        parts = {
            i: slice(ends[i] - estimate.sites[i].d_model, ends[i])
            for i in (ctx.base, ctx.finetuned)
        }
        one, other = parts[ctx.finetuned], parts[ctx.base]
        weight, bias = weight[:, one] - weight[:, other], bias[one] - bias[other]
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
        "d_model": ctx.d_model,
        "weight_processing": models.weight_processing,
        "mode": mitigation.mode,
        "latents": mitigation.latents.tolist(),
        "estimate": None
        if estimate is None
        else {"ridge": estimate.ridge, "n_tokens": estimate.n_tokens},
        "loss": None if loss is None else loss.about() | {"latents": loss.columns()},
    }
