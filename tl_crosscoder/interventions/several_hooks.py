"""Edits at several hooks of one forward pass, with no difference removed twice.

A dictionary over several hooks of both models says at each hook k, lowest first, what to take out:
D_k = x_k - edit_k(x), of the models as they are. Below the hook c_k = x_k - y_k of it is gone
already, y_k being what passes hook k when the lower ones are edited. What is left goes within the
span of the edit's directions, and nothing else is touched:

    x_k' = y_k - Q_k Q_k' (D_k - c_k)          Q_k: orthonormal basis of the directions at hook k

So within the span each activation is what the dictionary says the base's would be, and beside it
what the lower edits made of it. Contract: an edit of the highest hook, for scoring, trials, and
`live`. Limit: one model, whose lower layers run once more for each edit and hook; where the
directions span the whole activation, it is the edit of the highest hook alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.interventions.context import InterventionContext, SiteActivations
from tl_crosscoder.interventions.controls import SameNorm
from tl_crosscoder.interventions.edits import AddLatents, Edit, ProjectOut, orthonormal, unchanged
from tl_crosscoder.interventions.latent_edits import Mode, ablation
from tl_crosscoder.interventions.trials import Trial
from tl_crosscoder.models.hooked import HookedModel, replacing_hook, run_to_hooks, stop_layer
from tl_crosscoder.models.pair import ModelPair


@dataclass(frozen=True, eq=False, kw_only=True)
class EditsInTurn(Edit):
    """Edits of sites of one model, the lowest hook first; see the module."""

    models: ModelPair
    edits: tuple[Edit, ...]
    """Each is of latents, or projects directions out."""

    @property
    def site(self) -> int:  # type: ignore[override]
        """Site of the highest hook."""
        return self.edits[-1].site

    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos d_model"]:
        """The activation at the highest hook, all edits made."""
        new = self.edits[0](acts)
        for below, edit in pairwise(self.edits):
            y = self._above(acts, below.site, new, to=edit.site)
            # D_k - c_k = (x_k - edit_k(x)) - (x_k - y_k)
            left = y - edit(acts)
            Q = orthonormal(_directions(edit).to(y.device))
            new = y - left @ Q @ Q.T
        return new

    @torch.no_grad()
    def _above(
        self, acts: SiteActivations, site: int, new: Float[Tensor, "batch pos d_model"], *, to: int
    ) -> Float[Tensor, "batch pos d_model"]:
        """What passes the hook of one site where the activation of a lower one is replaced."""
        model: HookedModel = self.models.models[site]
        sites, tokens = self.models.model_sites, acts.text.tokens.long()
        lower = replacing_hook(sites[site].hook_name, lambda _: new)
        with model.hooks(fwd_hooks=[lower]):
            (found,) = run_to_hooks(model, [sites[to].hook_name], tokens)
        return found.to(new)


def _directions(edit: Edit) -> Float[Tensor, "n d_model"]:
    """What an edit moves the activation along."""
    plain = edit.edit if isinstance(edit, SameNorm) else edit
    if not isinstance(plain, AddLatents | ProjectOut):
        raise ValueError(
            f"{type(plain).__name__} cannot act at several hooks: what it takes out there may be "
            "gone already. Use an ablation of latents."
        )
    return plain.directions


def hook_contexts(ctx: InterventionContext) -> list[InterventionContext]:
    """Views that compare the same two models at each hook that both are read at, lowest first.

    Raises:
        ValueError: there is one such hook, a hook whose layer is not known, or a diff-SAE.
    """
    models = ctx.models
    sites = models.model_sites
    names = [sites[i].owner for i in (ctx.base, ctx.finetuned)]
    at = [{s.hook_name: s.name for s in sites if s.owner == name} for name in names]
    hooks = [hook for hook in at[0] if hook in at[1] and stop_layer(hook) is not None]
    if models.is_difference or len(hooks) < 2 or names[0] == names[1]:
        raise ValueError(
            f"both models are read at {len(hooks)} hook of a block: {', '.join(hooks)}. Edits at "
            "several need a dictionary over several; train one with --hook-name HOOK,HOOK."
        )
    hooks.sort(key=lambda hook: stop_layer(hook) or 0)
    views = [models.comparing(at[0][hook], at[1][hook]) for hook in hooks]
    return [InterventionContext.of(view, ctx.crosscoder) for view in views]


def ablation_at_every_hook(
    ctx: InterventionContext, latents: Sequence[int] | Int[Tensor, " n"], mode: Mode = "delta"
) -> Edit:
    """`ablation` at all hooks of a dictionary over several, in one forward pass.

    Raises:
        ValueError: as `ablation` and `hook_contexts` do.
    """
    contexts = hook_contexts(ctx)
    if not len(latents):
        return unchanged(contexts[-1].finetuned)
    edits = tuple(ablation(each, latents, mode) for each in contexts)
    return EditsInTurn(models=ctx.models, edits=edits)


def in_turn(models: ModelPair, trials: Sequence[Trial]) -> Trial:
    """One trial whose edits are those of some trials, a hook each, lowest first.

    The n-th controls of a kind go together.
    """

    def joined(edits: Sequence[Edit]) -> Edit:
        return EditsInTurn(models=models, edits=tuple(edits))

    top = trials[-1]
    each = {kind: zip(*(t.controls[kind] for t in trials), strict=True) for kind in top.controls}
    return Trial(
        test=top.test,
        name=f"{top.name}, {len(trials)} hooks",
        own=joined([trial.own for trial in trials]),
        controls={kind: [joined(edits) for edits in found] for kind, found in each.items()},
        n_latents=top.n_latents,
        latents=top.latents,
    )
