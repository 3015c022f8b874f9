"""From activations to codes and to what they decode to: the sparse step and its dense reference.

Both give the same `Step`, up to rounding. `dense_step` is plain autograd over the codes of all
latents; `SparseStep` finds the active latents (`selection`) and multiplies with them alone: of the
six dense products of a step one remains, the search. Both weight gradients have a row a latent and
are written as such: the encoder's memory is a row a latent too, although its shape is
`[d_in, d_sae]`. A block of latents (the dead ones, for AuxK) may be computed densely beside the
sparse entries, so that each weight has one gradient and not two of full size to be added. Factors
are the operands as they are multiplied, maybe in bfloat16. Limit: the sparse step runs on CPU and
CUDA.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.crosscoder.sparse import selection
from tl_crosscoder.crosscoder.sparse.codes import (
    Codes,
    DenseCodes,
    Pattern,
    SparseCodes,
    sampled_dots,
    weighted_bag,
)
from tl_crosscoder.crosscoder.sparsity import Groups, Sparsity

MAX_DENSITY = 1 / 16
"""Share of active latents above which dense products are faster."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One batch, encoded and decoded."""

    codes: Codes
    decoded: list[Float[Tensor, "batch d_in"]]
    """What each range of latents decodes to, without bias; their sum is the reconstruction."""
    block_decoded: Float[Tensor, "batch d_in"] | None
    """What the dead latents decode to; None without any."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One batch, the weights, and what is to be computed with them."""

    x: Float[Tensor, "batch d_in"]
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    norms: Float[Tensor, " d_sae"]
    """n_j; no gradient is taken through the selection."""
    sparsity: Sparsity
    groups: Groups
    threshold: Float[Tensor, " d_sae"] | None
    """The threshold that the sparsity learns, if it does."""
    compute_dtype: torch.dtype | None
    """Type that x and the weights are rounded to before a product; None rounds nothing."""
    bounds: tuple[int, ...]
    """First latent of each range that is decoded apart, but of the first range."""
    block: Int[Tensor, " n_block"]
    """Dead latents."""
    block_codes: Callable[[Tensor, Tensor], Tensor]
    """Codes of the dead latents from their pre-activations and norms."""

    def rounded(self, values: Tensor) -> Tensor:
        """Values as they are multiplied, in the dtype of the master weights."""
        if self.compute_dtype is None:
            return values
        return Rounded.apply(values, self.compute_dtype)

    def factor(self, values: Tensor) -> Tensor:
        """Values as they are multiplied, in the dtype that they are rounded to; no gradient."""
        return values.detach().to(self.compute_dtype or values.dtype)


def dense_pre(request: Request) -> Float[Tensor, "batch d_sae"]:
    """Pre-activations of all latents."""
    return request.rounded(request.x) @ request.rounded(request.W_enc) + request.b_enc


def dense_codes(request: Request, pre: Float[Tensor, "batch d_sae"]) -> Tensor:
    """Codes of all latents, `[batch, d_sae]`."""
    r = request
    threshold = None if r.threshold is None else r.threshold.expand_as(pre)
    codes = r.sparsity.activate(pre, threshold)
    if not r.groups:
        return codes
    weighted = codes.detach() * r.norms.detach()
    kept = [r.sparsity.keep(weighted[:, own], k, latents=own) for own, k in r.groups]
    return codes * torch.cat(kept, dim=-1)


def dense_step(request: Request, pre: Float[Tensor, "batch d_sae"]) -> Step:
    """Autograd over `[batch, d_sae]` codes: the reference implementation of `SparseStep`."""
    r = request
    values, W_dec = dense_codes(r, pre), r.rounded(r.W_dec)
    edges = [0, *r.bounds, len(W_dec)]
    decoded = [values[:, a:b] @ W_dec[a:b] for a, b in pairwise(edges)]
    block_decoded = None
    if len(r.block):
        block_decoded = r.block_codes(pre[:, r.block], r.norms[r.block]) @ W_dec[r.block]
    return Step(codes=DenseCodes(values=values), decoded=decoded, block_decoded=block_decoded)


@dataclass
class SparseStep:
    """The fast step. Remembers where the last selections ended, which only saves time."""

    prefilter: bool | None = None
    """Whether bounds in bfloat16 go before the float32 products; None where these are fast."""
    max_density: float = MAX_DENSITY
    _guesses: dict[int, float | None] = field(default_factory=dict)

    def __call__(self, request: Request) -> Step | None:
        """The step, or None where it does not exist or codes are too dense for it to be faster."""
        r = request
        if sum(k for _, k in r.groups) > self.max_density * len(r.W_dec):
            return None
        factors = r.factor(r.x), r.factor(r.W_enc).T.contiguous()
        with torch.no_grad():
            found = self._find(r, factors)
        if found is None:
            return None
        pattern = Pattern.at(found.positions, shape=(len(r.x), len(r.W_dec)))
        pre, block_pre = Encode.apply(r.x, r.W_enc, r.b_enc, found.pre, pattern, factors, r.block)
        threshold = None if r.threshold is None else r.threshold.index_select(0, pattern.latents)
        codes = SparseCodes(pattern=pattern, values=r.sparsity.activate(pre, threshold))
        stacked, order = pattern.stacked(r.bounds)
        values = codes.values if order is None else codes.values.index_select(0, order)
        block_codes = r.block_codes(block_pre, r.norms[r.block])
        decoded, block_decoded = Decode.apply(
            values, r.W_dec, stacked, r.factor(r.W_dec), block_codes, r.block
        )
        return Step(
            codes=codes,
            decoded=list(decoded.split(len(r.x))),
            block_decoded=block_decoded if len(r.block) else None,
        )

    def _find(self, r: Request, factors: tuple[Tensor, Tensor]) -> selection.Found | None:
        """Entries with a code or a gradient."""
        fast = selection.fast_bfloat16(r.x.device) if self.prefilter is None else self.prefilter
        scores = selection.Scores(
            x=factors[0],
            W=factors[1],
            bias=r.b_enc.detach(),
            scale=r.norms.detach() if r.groups else torch.ones_like(r.b_enc),
            floor=None if r.threshold is None else r.threshold - r.sparsity.margin(),
            prefilter=fast and r.b_enc.dtype == torch.float32,
        )
        if not r.groups:
            everything = slice(0, scores.d_sae)
            density = (scores.sample(16, everything) >= 0).float().mean()
            return None if density > self.max_density else scores.reaching(0.0, everything)[0]
        found = []
        for own, k in r.groups:
            answer = r.sparsity.find(scores, own, k=k, guess=self._guesses.get(own.start))
            if answer is None:
                return None
            self._guesses[own.start] = answer[1]
            found.append(answer[0])
        if len(found) == 1:
            return found[0]
        positions, order = torch.cat([f.positions for f in found]).sort()
        return selection.Found(positions, torch.cat([f.pre for f in found])[order])


class Rounded(torch.autograd.Function):
    """Values rounded to another dtype and back; the gradient passes as if they were not."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Rounded values."""
        del ctx
        return values.to(dtype).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient as it is."""
        del ctx
        return grads[0], None


class Encode(torch.autograd.Function):
    """Pre-activations of the entries, which the search has computed, and of the block."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "batch d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        pre: Float[Tensor, " nnz"],
        pattern: Pattern,
        factors: tuple[Float[Tensor, "batch d_in"], Float[Tensor, "d_sae d_in"]],
        block: Int[Tensor, " n_block"],
    ) -> tuple[Float[Tensor, " nnz"], Float[Tensor, "batch n_block"]]:
        """See the class; `factors` are x and the rows of the encoder."""
        del x, W_enc
        x, W = factors
        ctx.save_for_backward(x, W, block)
        ctx.pattern = pattern
        rows = W[block].to(pre.dtype)
        return pre.clone(), torch.addmm(b_enc[block], x.to(pre.dtype), rows.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, W_enc and b_enc."""
        x, W, block = ctx.saved_tensors
        pattern, (grad, grad_block) = ctx.pattern, grads
        order, offsets = pattern.by_latent
        grad_W = weighted_bag(x, pattern.tokens[order], offsets, grad[order])
        grad_b = grad.new_zeros(pattern.d_sae).index_add_(0, pattern.latents, grad)
        if len(block):
            grad_W.index_add_(0, block, grad_block.T @ x.to(grad.dtype))
            grad_b.index_add_(0, block, grad_block.sum(dim=0))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = weighted_bag(W, pattern.latents, pattern.offsets, grad)
            grad_x = grad_x + grad_block @ W[block].to(grad.dtype)
        return grad_x, grad_W.T, grad_b, None, None, None, None


class Decode(torch.autograd.Function):
    """sum_j f_j d_j of the entries of each row, and of the block, without bias."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Float[Tensor, " nnz"],
        W_dec: Float[Tensor, "d_sae d_in"],
        pattern: Pattern,
        factor: Float[Tensor, "d_sae d_in"],
        block_codes: Float[Tensor, "batch n_block"],
        block: Int[Tensor, " n_block"],
    ) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, "batch d_in"]]:
        """See the class; `factor` is the decoder."""
        del W_dec
        ctx.save_for_backward(values, factor, block_codes, block)
        ctx.pattern = pattern
        decoded = weighted_bag(factor, pattern.latents, pattern.offsets, values)
        return decoded, block_codes @ factor[block].to(block_codes.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of values, W_dec and the block's codes."""
        values, factor, codes, block = ctx.saved_tensors
        pattern, (grad, grad_block) = ctx.pattern, [g.contiguous() for g in grads]
        order, offsets = pattern.by_latent
        grad_W = weighted_bag(grad, pattern.tokens[order], offsets, values[order])
        grad_values = sampled_dots(grad, factor, pattern.offsets, pattern.latents)
        grad_codes = None
        if len(block):
            grad_W.index_add_(0, block, codes.T @ grad_block)
            grad_codes = grad_block @ factor[block].to(grad.dtype).T
        return grad_values, grad_W, None, None, grad_codes, None
