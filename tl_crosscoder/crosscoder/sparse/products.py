"""Encode and decode with gradients, where only a few latents are active.

Of the six dense products of a step one remains, the search for the active latents. Both weight
gradients have a row a latent and are written as such: the encoder's memory is a row a latent too,
although its shape is `[d_in, d_sae]`. A block of latents (the dead ones, for AuxK) may be computed
densely beside the sparse entries, so that each weight has one gradient and not two of full size to
be added. Factors are the operands as they are multiplied, maybe in bfloat16.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.crosscoder.sparse.codes import Pattern
from tl_crosscoder.crosscoder.sparse.kernels import sampled_dots, weighted_bag


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
