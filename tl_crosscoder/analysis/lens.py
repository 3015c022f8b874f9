"""Logit lens: the direct effect of a direction on the next token, by final norm and unembedding.

Contract: directions `[n, d_model]` become logits `[n, d_vocab]`, linear in the direction and
centred over the vocabulary: the final norm's learned scale is applied; its division by the RMS of
the residual stream is not, nor a soft cap. A unit of code at a token whose last residual stream has
RMS r adds these logits / r. Source: nostalgebraist 2020 (logit lens), Elhage et al. 2021 (direct
effect). Limit: later layers are left out, see `patchscope` for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.site_views import check_source, checked_latents
from tl_crosscoder.models.hooked import HookedModel
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.tokenizer import token_text
from tl_crosscoder.results.tables import TableOfRows

_CHUNK = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Readout:
    """The linear part of a model's final norm and unembedding."""

    scale: Float[Tensor, " d_model"]
    """Learned scale of the norm; ones where it was folded."""
    is_centring: bool
    """The norm subtracts the mean over d_model first (LayerNorm)."""
    W_U: Float[Tensor, "d_model d_vocab"]
    """Unembedding, of the tokens that the tokenizer has."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: HookedModel, *, d_vocab: int | None = None) -> "Readout":
        """Read norm and unembedding off a model of either kind.

        Args:
            model: any whose last residual stream goes through `ln_final`, or no norm, and `W_U`.
            d_vocab: tokens to read; some models have more columns of `W_U` than tokens.

        Raises:
            ValueError: the model has no such end, or its final norm is of an unknown form.
        """
        parts: Any = model
        has_norm = model.cfg.normalization_type is not None
        needed = ("ln_final", "W_U") if has_norm else ("W_U",)
        missing = [name for name in needed if not hasattr(parts, name)]
        if missing:
            raise ValueError(
                f"the model {model.cfg.model_name!r} has no {' and no '.join(missing)}, so nothing "
                "has a direct effect on its logits: give a decoder-only language model."
            )
        W_U = parts.W_U.detach()
        norm = parts.ln_final if has_norm else torch.nn.Identity()
        scale, is_centring = _linear_part(norm, W_U[:, 0])
        return cls(scale=scale, is_centring=is_centring, W_U=W_U[:, :d_vocab].float())

    @torch.no_grad()
    def logits(self, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """Direct effect of each direction, centred over the vocabulary.

        Raises ValueError for directions of another width: the hook is not on the residual stream.
        """
        if directions.shape[1] != len(self.scale):
            raise ValueError(
                f"directions of width {directions.shape[1]} cannot be unembedded by a model of "
                f"d_model={len(self.scale)}: take a hook on the residual stream, such as "
                "'blocks.0.hook_resid_post'."
            )
        d = directions.detach().to(self.W_U)
        if self.is_centring:
            d = d - d.mean(dim=-1, keepdim=True)
        logits = (d * self.scale) @ self.W_U
        return logits - logits.mean(dim=-1, keepdim=True)


def _linear_part(norm: Any, like: Float[Tensor, " d_model"]) -> tuple[Tensor, bool]:
    """Learned scale of a norm, and whether it centres, by what it does to a few vectors.

    Weights alone do not say: Gemma's scale is 1 + w, a folded norm has none, and the two kinds of
    model keep them in other places. Every norm maps v of mean zero to scale * v / rms(v) + bias,
    whatever the length of v; where there is no norm, lengths stay.
    """
    signs = torch.ones_like(like)
    signs[1::2] = -1
    # Long enough to drown the norm's epsilon, and exact in bfloat16.
    v = 1024 * (signs - signs.mean())
    zero, ones, once, twice = norm(
        torch.stack([torch.zeros_like(v), torch.ones_like(v), v, 2 * v])[None]
    )[0].float()
    once, twice, v = once - zero, twice - zero, v.float()
    is_norm = torch.allclose(twice, once, rtol=1e-2)
    if not is_norm and not torch.allclose(twice, 2 * once, rtol=1e-2):
        raise ValueError(
            f"the final norm {type(norm).__name__} is neither a layer norm nor an RMS norm: twice "
            "the vector gives neither the same nor twice as much. Its logit effect is not defined."
        )
    scale = once / v * (v.square().mean().sqrt() if is_norm else 1)
    return scale, bool((ones - zero).abs().max() < 1e-3 * scale.abs().max())


@dataclass(frozen=True, kw_only=True)
class LogitEffect:
    """One token among those that a direction promotes or suppresses most."""

    latent: int
    """Latent, or the position of a given direction."""
    direction: str
    """The site that the decoder row writes to, or `difference`."""
    is_promoted: bool
    """False is suppressed."""
    rank: int
    """1 is the most promoted, or the most suppressed."""
    token: str
    token_id: int
    logit: float
    """Centred over the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class LogitEffects(TableOfRows):
    """Tokens by latent and direction."""

    ROW: ClassVar[type] = LogitEffect
    d_vocab: int
    """Tokens that the logits are centred over."""


def logit_effect(
    models: ModelPair,
    crosscoder: Crosscoder,
    latents: Sequence[int] | Int[Tensor, " n"],
    *,
    n: int = 10,
) -> LogitEffects:
    """Tokens that latents promote and suppress most, directly.

    Each latent in three directions: d^0 read by the base model, d^1 by the fine-tuned one, and
    `difference`, d^1 - d^0 read by the fine-tuned one. A diff-SAE has the last alone.

    Args:
        models: those the dictionary was trained on; of a diff-SAE, their difference.
        crosscoder: the dictionary.
        latents: which.
        n: tokens of each kind.

    Raises:
        ValueError: a dictionary of other models, a latent out of range, an unknown site, or a hook
            that is not on the residual stream.
    """
    check_source(models, crosscoder)
    ids = checked_latents(latents, crosscoder)
    if not isinstance(models, ModelPair):
        raise ValueError("this is a cache, without models: load those it was made with.")
    i, j = models.check_one_width()
    if models.is_difference:
        directions = {(j, "difference"): crosscoder.decoder(0)[ids]}
    else:
        base, finetuned = (crosscoder.decoder(at)[ids] for at in (i, j))
        names = models.compared_names
        directions = {(i, names[0]): base, (j, names[1]): finetuned}
        directions[j, "difference"] = finetuned - base
    rows: list[LogitEffect] = []
    for (at, name), d in directions.items():
        rows += _effects(models, at, d, name=name, latents=ids.tolist(), n=n)
    return LogitEffects(rows=tuple(rows), d_vocab=n_tokens(models))


def direction_logits(
    models: ModelPair,
    directions: Float[Tensor, "n d_model"],
    *,
    site: str = "finetuned",
    n: int = 10,
) -> LogitEffects:
    """Tokens that any directions, such as a mean difference, promote and suppress in one model.

    Raises ValueError for an unknown site or another width.
    """
    at = models.site_index(site)
    latents = list(range(len(directions)))
    rows = _effects(models, at, directions, name=site, latents=latents, n=n)
    return LogitEffects(rows=tuple(rows), d_vocab=n_tokens(models))


def n_tokens(models: ModelPair) -> int:
    """Number of ids that are tokens: models may have more logits than the tokenizer has tokens."""
    return min(models.d_vocab, len(models.tokenizer))


def _effects(
    models: ModelPair,
    at: int,
    directions: Float[Tensor, "n d_model"],
    *,
    name: str,
    latents: list[int],
    n: int,
) -> list[LogitEffect]:
    """Rows of the directions that one model reads."""
    d_vocab = n_tokens(models)
    if not 1 <= n <= d_vocab:
        raise ValueError(f"n={n} tokens of each kind must be in [1, {d_vocab}].")
    readout = Readout.of(models.models[at], d_vocab=d_vocab)
    rows = []
    for part, d in zip(torch.tensor(latents).split(_CHUNK), directions.split(_CHUNK), strict=True):
        logits = readout.logits(d)
        for is_promoted in (True, False):
            top = logits.topk(n, dim=-1, largest=is_promoted)
            columns = (part.tolist(), top.values.tolist(), top.indices.tolist())
            for latent, values, tokens in zip(*columns, strict=True):
                rows += [
                    LogitEffect(
                        latent=latent,
                        direction=name,
                        is_promoted=is_promoted,
                        rank=rank,
                        token=token_text(models.tokenizer, token),
                        token_id=token,
                        logit=value,
                    )
                    for rank, (value, token) in enumerate(zip(values, tokens, strict=True), 1)
                ]
    return rows
