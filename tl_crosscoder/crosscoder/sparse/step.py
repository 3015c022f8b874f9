"""From activations to codes and to what they decode to: the sparse step and its dense reference.

Both give the same `Step`, up to rounding. `dense_step` is plain autograd over the codes of all
latents; `SparseStep` finds the active latents (`selection`) and multiplies with them alone
(`products`). Limit: the sparse one runs on CPU and CUDA.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.crosscoder.sparse import products, selection
from tl_crosscoder.crosscoder.sparse.codes import Codes, DenseCodes, Pattern, SparseCodes
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
        return products.Rounded.apply(values, self.compute_dtype)

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
    return codes * torch.cat([r.sparsity.keep(weighted[:, own], k) for own, k in r.groups], dim=-1)


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
        pre, block_pre = products.Encode.apply(
            r.x, r.W_enc, r.b_enc, found.pre, pattern, factors, r.block
        )
        threshold = None if r.threshold is None else r.threshold.index_select(0, pattern.latents)
        codes = SparseCodes(pattern=pattern, values=r.sparsity.activate(pre, threshold))
        stacked, order = pattern.stacked(r.bounds)
        values = codes.values if order is None else codes.values.index_select(0, order)
        block_codes = r.block_codes(block_pre, r.norms[r.block])
        decoded, block_decoded = products.Decode.apply(
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
