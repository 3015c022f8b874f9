"""Patchscope: put a direction in a model's stream and let the layers above say what it is.

Contract: directions `[n, d_model]`, each set to a multiple of the stream's norm, take the place of
the activation at the last token of prompts that repeat words; the next token is read, its
probability averaged over the prompts. Sources: Ghandeharioun et al. 2024 (arXiv 2401.06102, the
token identity prompt), Minder et al. 2025 (arXiv 2510.13900, on differences of models). Limit: a
fluent answer is no evidence alone; look at the unpatched run beside it, and at random directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
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
"""Those of Minder et al. 2025 (arXiv 2510.13900)."""


@dataclass(frozen=True, kw_only=True)
class PatchscopeToken:
    """One token that a direction makes likelier."""

    direction: int
    """Position among the directions."""
    scale: float
    """Multiple of the stream's norm."""
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
    """Whose model was run."""
    hook_name: str
    """Where the directions were put."""
    stream_norm: float
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
    stream_norm: float | None = None,
    prompts: Sequence[str] = IDENTITY_PROMPTS,
    n: int = 10,
    batch_size: int = 16,
) -> Patchscope:
    """The tokens that a model names when a direction stands in place of its activation.

    Args:
        models: whose hook the directions are put at.
        directions: of any length but zero; decoder rows, or a mean difference of activations.
        site: name of the site.
        scales: multiples of the stream's norm; a negative one asks for the opposite direction.
        stream_norm: mean norm of the activation at the hook; None measures it on the prompts,
            first tokens left out, whose norm is often a hundred times the others'.
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
        raise ValueError(f"n={n} is not 1 to {d_vocab}, or batch_size={batch_size} is below 1.")
    tokens, mask = models.to_tokens_and_mask(list(prompts))
    if mask.sum(dim=1).min() < 2:
        raise ValueError(f"prompts {list(prompts)}: each needs at least two tokens, BOS included.")
    x = models.site_activations(tokens, [at])[0]
    if stream_norm is None:
        stream_norm = x.norm(dim=-1)[:, 1:][mask[:, 1:]].mean().item()
    unit = torch.nn.functional.normalize(directions.detach().to(x), dim=-1)
    sizes = stream_norm * torch.tensor(scales).to(x)
    put = (sizes[None, :, None] * unit[:, None]).flatten(0, 1)
    hook = _Prompts(models=models, at=at, tokens=tokens, last=mask.sum(dim=1) - 1, x=x)
    before = hook.probabilities(None)[:, :d_vocab]
    rows: list[PatchscopeToken] = []
    for start in range(0, len(put), batch_size):
        after = hook.probabilities(put[start : start + batch_size])[:, :d_vocab]
        for i, p in enumerate(after, start):
            rows += _tokens(models, p, before[0], where=divmod(i, len(scales)), scales=scales, n=n)
    return Patchscope(
        rows=tuple(rows),
        site=site,
        hook_name=models.model_sites[at].hook_name,
        stream_norm=stream_norm,
        prompts=tuple(prompts),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prompts:
    """Prompts with their activations, ready to be run on from others."""

    models: ModelPair
    at: int
    tokens: Int[Tensor, "prompts pos"]
    last: Int[Tensor, " prompts"]
    x: Float[Tensor, "prompts pos d_model"]

    def probabilities(
        self, put: Float[Tensor, "variants d_model"] | None
    ) -> Float[Tensor, "variants d_vocab"]:
        """Of the next token, mean over the prompts; None is the model as it is."""
        row = torch.arange(len(self.last), device=self.last.device)
        if put is None:
            variants = self.x[None]
        else:
            variants = self.x.repeat(len(put), 1, 1, 1)
            variants[:, row, self.last] = put[:, None]
        model, hook_name = self.models.models[self.at], self.models.model_sites[self.at].hook_name
        logits = continued(model, hook_name, self.tokens, variants=variants)
        last = logits[:, row.to(logits.device), self.last.to(logits.device)]
        return last.float().softmax(dim=-1).mean(dim=1)


def _tokens(
    models: ModelPair,
    p: Float[Tensor, " d_vocab"],
    before: Float[Tensor, " d_vocab"],
    *,
    where: tuple[int, int],
    scales: Sequence[float],
    n: int,
) -> list[PatchscopeToken]:
    top = (p - before).topk(n).indices
    # Far below one token in all text; keeps the ratio finite where a probability underflows.
    tiny = 1e-30
    ratio = (p[top].clamp_min(tiny) / before[top].clamp_min(tiny)).log()
    columns = top.tolist(), p[top].tolist(), before[top].tolist(), ratio.tolist()
    return [
        PatchscopeToken(
            direction=where[0],
            scale=float(scales[where[1]]),
            rank=rank,
            token=token_text(models.tokenizer, token),
            token_id=token,
            probability=after,
            unpatched_probability=unpatched,
            log_ratio=log_ratio,
        )
        for rank, (token, after, unpatched, log_ratio) in enumerate(zip(*columns, strict=True), 1)
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
