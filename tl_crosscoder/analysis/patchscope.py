"""Patchscope: put a direction in place of an activation, and read what the layers above name.

Contract: directions `[n, d_model]`, each set to a multiple of the activation's norm, replace the
activation at the last token of prompts that repeat words; the next token is read, its probability
averaged over the prompts. Sources: Ghandeharioun et al. 2024 (arXiv 2401.06102, the token identity
prompt), Minder et al. 2025 (arXiv 2510.13900, on differences of models). Limit: a fluent answer is
no evidence alone; look at the unpatched run beside it, and at random directions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.analysis.lens import n_tokens
from tl_crosscoder.models.forward import continued
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.tokenizer import token_text
from tl_crosscoder.results.tables import TableOfRows

IDENTITY_PROMPTS = (
    "man -> man\n1135 -> 1135\nhello -> hello\n?",
    "bear -> bear\n42 -> 42\nblue -> blue\n?",
    "921 -> 921\ntarget -> target\nanna -> anna\n?",
)
"""From Minder et al. 2025 (arXiv 2510.13900)."""


@dataclass(frozen=True, kw_only=True)
class PatchscopeToken:
    """One token that a direction makes likelier."""

    direction: int
    """Position among the directions."""
    scale: float
    """Multiple of the activation's norm."""
    rank: int
    """1 is the token whose probability grew most."""
    token: str
    token_id: int
    probability: float
    """Mean over the prompts, patched."""
    unpatched_probability: float
    """Mean over the prompts, as the model is."""
    log_ratio: float
    """Natural logarithm of the first over the second."""


@dataclass(frozen=True, kw_only=True)
class Patchscope(TableOfRows):
    """Tokens by direction and scale, most gained probability first."""

    ROW: ClassVar[type] = PatchscopeToken
    site: str
    """Site whose model was run."""
    hook_name: str
    """Hook point at which the directions were put."""
    activation_norm: float
    """Scale 1 is this norm."""
    prompts: tuple[str, ...]
    """The direction replaced the activation at their last token."""


@torch.no_grad()
def patchscope(
    models: ModelPair,
    directions: Float[Tensor, "n d_model"],
    *,
    site: str = "finetuned",
    scales: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    activation_norm: float | None = None,
    prompts: Sequence[str] = IDENTITY_PROMPTS,
    n: int = 10,
    batch_size: int = 16,
) -> Patchscope:
    """Tokens that a model names when a direction stands in place of its activation.

    Args:
        models: models at sites.
        directions: of any length but zero; decoder rows, or a mean difference of activations.
        site: name of the site.
        scales: multiples of the activation's norm; a negative one asks for the opposite direction.
        activation_norm: mean norm at the hook; None measures it on the prompts without their first
            tokens, whose norm is often a hundred times the others'.
        prompts: that end where the direction is put.
        n: tokens for each direction and scale.
        batch_size: directions times scales in one forward pass; logits of `[batch_size, prompts,
            pos, d_vocab]` are held.

    Raises:
        ValueError: an unknown site, another width, a zero direction, no scale or prompt, or
            numbers out of range.
    """
    at = models.site_index(site)
    d_vocab = n_tokens(models)
    _check(directions, scales, prompts, d_model=models.model_sites[at].d_model)
    if not 1 <= n <= d_vocab or batch_size < 1:
        raise ValueError(f"n={n} must be in [1, {d_vocab}], batch_size={batch_size} 1 or more.")
    tokens, mask = models.to_tokens_and_mask(list(prompts))
    if mask.sum(dim=1).min() < 2:
        raise ValueError(f"prompts {list(prompts)}: each needs at least two tokens, BOS included.")
    (x,) = models.site_activations(tokens, [at])
    if activation_norm is None:
        activation_norm = x.norm(dim=-1)[:, 1:][mask[:, 1:]].mean().item()
    unit = torch.nn.functional.normalize(directions.detach().to(x), dim=-1)
    sizes = activation_norm * torch.tensor(scales).to(x)
    patches = einsum(unit, sizes, "n d_model, scales -> n scales d_model")
    patches = rearrange(patches, "n scales d_model -> (n scales) d_model")
    model, hook_name, last = models.models[at], models.model_sites[at].hook_name, mask.sum(1) - 1

    def next_token(variants: Float[Tensor, "variants prompts pos d_model"]) -> Tensor:
        """Probabilities `[variants, d_vocab]`, mean over the prompts."""
        logits = continued(model, hook_name, tokens, variants=variants)
        at_last = logits[:, torch.arange(len(last)), last.to(logits.device)]
        return at_last.float().softmax(dim=-1).mean(dim=1)[:, :d_vocab]

    (before,) = next_token(x[None])
    rows: list[PatchscopeToken] = []
    for start in range(0, len(patches), batch_size):
        part = patches[start : start + batch_size]
        variants = repeat(x, "prompts pos d -> variants prompts pos d", variants=len(part)).clone()
        variants[:, torch.arange(len(last)), last] = part[:, None]
        for i, after in enumerate(next_token(variants), start):
            direction, scale = divmod(i, len(scales))
            where = {"direction": direction, "scale": float(scales[scale])}
            rows += _tokens(models, before, after, n=n, where=where)
    return Patchscope(
        rows=tuple(rows),
        site=site,
        hook_name=hook_name,
        activation_norm=activation_norm,
        prompts=tuple(prompts),
    )


def _tokens(
    models: ModelPair,
    before: Float[Tensor, " d_vocab"],
    after: Float[Tensor, " d_vocab"],
    *,
    n: int,
    where: Mapping[str, Any],
) -> list[PatchscopeToken]:
    """Rows of the n tokens that gain most probability."""
    top = (after - before).topk(n).indices
    # Far below one token in all text; keeps the ratio finite where a probability underflows.
    tiny = 1e-30
    ratio = (after[top].clamp_min(tiny) / before[top].clamp_min(tiny)).log()
    columns = top.tolist(), after[top].tolist(), before[top].tolist(), ratio.tolist()
    return [
        PatchscopeToken(
            rank=rank,
            token=token_text(models.tokenizer, token),
            token_id=token,
            probability=patched,
            unpatched_probability=unpatched,
            log_ratio=log_ratio,
            **where,
        )
        for rank, (token, patched, unpatched, log_ratio) in enumerate(zip(*columns, strict=True), 1)
    ]


def _check(
    directions: Float[Tensor, "n _"],
    scales: Sequence[float],
    prompts: Sequence[str],
    *,
    d_model: int,
) -> None:
    if directions.shape[1] != d_model:
        raise ValueError(
            f"directions of width {directions.shape[1]} do not fit the hook, which is {d_model} "
            "wide: take decoder rows of this site."
        )
    zero = (~(directions.norm(dim=-1) > 0)).nonzero().flatten().tolist()
    if zero or not len(directions) or not len(scales) or not len(prompts):
        raise ValueError(
            f"{len(directions)} directions ({zero} of them zero or NaN), {len(scales)} scales, "
            f"{len(prompts)} prompts: give at least one of each, and directions with a length."
        )
