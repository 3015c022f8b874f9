"""Edits held in a model while a context is open, in evaluation and generation: `edited`, `ablated`.

Contract: each yields an `EditedModel`, whose model has the edit in every forward pass; when the
context closes, by an error too, no hook is left. Edits that ask for codes or other sites run these
models on the same ids, which are caught at the embedding, each time the hook fires; so
they need whole texts, and generation without key-value cache. Limit: unpadded or right-padded ids,
and no edit that asks for the roles of tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.data.tokens import DROP_REASONS, TokenizedText
from tl_crosscoder.interventions.base_estimate import BaseEstimate
from tl_crosscoder.interventions.context import InterventionContext, SiteActivations
from tl_crosscoder.interventions.edits import (
    AddVector,
    Edit,
    EditAtTokens,
    LocalEdit,
    ProjectOut,
    ReplaceActivation,
    Together,
)
from tl_crosscoder.interventions.latent_edits import Direction, Mode, ablation, steering
from tl_crosscoder.interventions.mitigation import Mitigation
from tl_crosscoder.models.forward import RunningIds
from tl_crosscoder.models.hooked import HookedModel, replacing_hook
from tl_crosscoder.models.pair import ModelPair, Prompts
from tl_crosscoder.models.tokenizer import own_bos_id


@dataclass(frozen=True, kw_only=True, eq=False)
class EditedModel:
    """A model with an edit in it, for as long as the context is open."""

    model: HookedModel
    """Hooks are active: `model(tokens)`, `run_with_hooks`, `run_with_cache` show the edit."""
    ctx: InterventionContext
    edit: Edit

    @property
    def site(self) -> str:
        """Name of the edited site."""
        return self.ctx.site_name(self.edit.site)

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Next-token logits of the edited model."""
        return self.ctx.models.logits(tokens, site=self.site)

    def generate(self, prompts: Prompts, **options: Any) -> str | list[str]:
        """What the edited model writes; options of `ModelPair.generate_tokens`.

        The key-value cache is used where the edit allows it, which changes speed and nothing else.
        """
        options.setdefault("use_past_kv_cache", is_local(self.edit))
        return self.ctx.models.generate(prompts, site=self.site, **options)

    def generate_tokens(
        self, prompts: Prompts, **options: Any
    ) -> list[tuple[list[int], list[int]]]:
        """Ids of what the edited model writes: (prompt, new) for each prompt."""
        options.setdefault("use_past_kv_cache", is_local(self.edit))
        return self.ctx.models.generate_tokens(prompts, site=self.site, **options)


@contextmanager
def edited(ctx: InterventionContext, edit: Edit) -> Iterator[EditedModel]:
    """Hold an edit in the model of its site.

    Meanwhile whoever runs this model sees the edit, `pair.activations` and `pair.logits` too.

    Raises:
        ValueError: the edit asks for roles of tokens. In a forward pass: one with a filled
            key-value cache, left-padded, or from embeddings, where the edit needs whole texts.
    """
    if isinstance(edit, EditAtTokens):
        raise ValueError(
            f"{type(edit).__name__} edits at chosen roles or places of a text, which a running "
            "model does not know. Use the edit without its places, or score it with score_edits."
        )
    model = ctx.models.models[edit.site]
    hook_name = ctx.models.model_sites[edit.site].hook_name
    with (
        _running(ctx, edit) as new,
        model.hooks(fwd_hooks=[replacing_hook(hook_name, new)]),
    ):
        yield EditedModel(model=model, ctx=ctx, edit=edit)


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
        estimate: of the base activation from the fine-tuned one; None runs the base model.

    Raises:
        ValueError: a dictionary or an estimate of other models, an unknown mode, latents out of
            range, or an estimate where the mode needs no base activation.
    """
    ctx = InterventionContext.of(models, crosscoder)
    if estimate is None:
        edit = ablation(ctx, latents, mode)
    else:
        edit = Mitigation.of(ctx, latents, mode=mode, estimate=estimate)
    with edited(ctx, edit) as model:
        yield model


@contextmanager
def steered(
    ctx: InterventionContext,
    direction: Direction,
    *,
    strength: float,
    norm: float,
    site: str | None = None,
    of: str | None = None,
) -> Iterator[EditedModel]:
    """A model under steering, while the context is open; arguments as `steering`.

    With `norms = activation_norms(pair, text)`:
        with steered(ctx, 17, strength=0.5, norm=norms["base"], site="base") as model:
            model.generate("Once upon a time")
    """
    edit = steering(ctx, direction, strength=strength, norm=norm, site=site, of=of)
    with edited(ctx, edit) as model:
        yield model


def is_local(edit: Edit) -> bool:
    """Whether an edit asks for the activation of its own site and for nothing else."""
    if isinstance(edit, Together):
        return all(map(is_local, edit.edits))
    if isinstance(edit, ReplaceActivation | AddVector | ProjectOut):
        takes_another = isinstance(edit, ProjectOut) and edit.replacement is not None
        return edit.stream == edit.site and not takes_another
    return isinstance(edit, LocalEdit)


@contextmanager
def _running(ctx: InterventionContext, edit: Edit) -> Iterator[Callable[[Tensor], Tensor]]:
    """Function from an activation to the edited one, while the context is open."""
    models = ctx.models
    if is_local(edit):
        yield lambda x: edit(_of_one_site(ctx, edit.site, x.to(models.device, torch.float32)))
        return
    model: Any = models.models[edit.site]
    ids = RunningIds(model, tokenizer=models.tokenizer)
    # At once: a hook before the blocks does not see the cache.
    handle = model.blocks[0].register_forward_pre_hook(lambda *_: ids.check_cache())

    def new(x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if ids.is_paused:
            return x  # in a pass that the edit asks for
        own = x.to(models.device, torch.float32)
        known = ids.of(*own.shape[:2])
        with ids.paused():
            return edit(_of_all_sites(ctx, edit.site, own, ids=known))

    try:
        yield new
    finally:
        handle.remove()
        ids.stop()


def _of_one_site(
    ctx: InterventionContext, site: int, own: Float[Tensor, "batch pos d_model"]
) -> SiteActivations:
    """Activations of which only one site is known: ids 0, other sites without width."""
    ids = torch.zeros(own.shape[:2], dtype=torch.long, device=own.device)
    nothing = own[..., :0]
    x = tuple(own if i == site else nothing for i in range(len(ctx.models.model_sites)))
    text = _as_text(ids, bos=None)
    return SiteActivations(
        index=text.context_ids, text=text, x=x, codes=None, counted=text.mask.to(own.device)
    )


def _of_all_sites(
    ctx: InterventionContext,
    site: int,
    own: Float[Tensor, "batch pos d_model"],
    *,
    ids: Int[Tensor, "batch pos"],
) -> SiteActivations:
    """Activations of all sites on these ids, and codes; one site's are at hand."""
    models = ctx.models
    others = [i for i in range(len(models.model_sites)) if i != site]
    x = dict(zip(others, models.site_activations(ids, others), strict=True)) | {site: own}
    parts = tuple(x[i] for i in range(len(models.model_sites)))
    text = _as_text(ids, bos=own_bos_id(models.tokenizer))
    return ctx.encoded(parts, index=text.context_ids, text=text)


def _as_text(ids: Int[Tensor, "batch pos"], *, bos: int | None) -> TokenizedText:
    """Running ids as contexts, without codes where training has none by default (`Masks`)."""
    ids = ids.cpu()
    dropped = torch.zeros(ids.shape, dtype=torch.uint8)
    dropped[:, 0] = DROP_REASONS.index("first")
    if bos is not None:
        dropped[ids == bos] = DROP_REASONS.index("bos")
    unknown = torch.zeros_like(dropped)
    return TokenizedText(
        tokens=ids,
        dropped=dropped,
        source_ids=unknown,
        role_ids=unknown,
        sources=("running",),
        context_ids=torch.arange(len(ids)),
    )
