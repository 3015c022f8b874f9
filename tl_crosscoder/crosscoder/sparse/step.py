"""From activations to codes and to what they decode to: the dense step and the sparse one.

Both give the same `Step`, up to rounding. The dense one is plain autograd over the codes of all
latents; the sparse one finds the active latents (`selection`) and multiplies only with them
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
from tl_crosscoder.crosscoder.sparsity import BatchTopK, JumpReLU, Sparsity, TopK

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
    """One batch, the weights, and what is asked of them."""

    x: Float[Tensor, "batch d_in"]
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    norms: Float[Tensor, " d_sae"]
    """n_j; no gradient is taken through the selection."""
    sparsity: Sparsity
    groups: list[tuple[slice, float]]
    """Latents that compete with one another, and their k."""
    threshold: Float[Tensor, " d_sae"] | None = None
    """theta of a JumpReLU."""
    compute_dtype: torch.dtype | None = None
    """What x and the weights are rounded to before they are multiplied; None is not at all."""
    bounds: tuple[int, ...] = ()
    """Where ranges of latents that are decoded apart begin, but the first one."""
    block: Int[Tensor, " n_block"]
    """Dead latents."""
    block_codes: Callable[[Tensor, Tensor], Tensor]
    """Codes of the dead latents from their pre-activations and norms."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.W_dec)

    def rounded(self, values: Tensor) -> Tensor:
        """Values as they are multiplied, in the dtype of the master weights."""
        if self.compute_dtype is None:
            return values
        return products.rounded(values, self.compute_dtype)

    def factor(self, values: Tensor) -> Tensor:
        """Values as they are multiplied, in the dtype that they are rounded to; no gradient."""
        return values.detach().to(self.compute_dtype or values.dtype)


def dense_pre(request: Request) -> Float[Tensor, "batch d_sae"]:
    """Pre-activations of all latents."""
    return request.rounded(request.x) @ request.rounded(request.W_enc) + request.b_enc


def dense_step(request: Request, pre: Float[Tensor, "batch d_sae"]) -> Step:
    """Autograd over `[batch, d_sae]` codes: the slow twin of `SparseStep`."""
    r = request
    values, W_dec = dense_codes(r, pre), r.rounded(r.W_dec)
    edges = [0, *r.bounds, r.d_sae]
    decoded = [values[:, a:b] @ W_dec[a:b] for a, b in pairwise(edges)]
    block_decoded = None
    if len(r.block):
        block_decoded = r.block_codes(pre[:, r.block], r.norms[r.block]) @ W_dec[r.block]
    return Step(codes=DenseCodes(values=values), decoded=decoded, block_decoded=block_decoded)


def dense_codes(request: Request, pre: Float[Tensor, "batch d_sae"]) -> Tensor:
    """The codes of all latents, `[batch, d_sae]`."""
    r = request
    if isinstance(r.sparsity, JumpReLU):
        assert r.threshold is not None
        return r.sparsity.codes(pre, r.threshold.expand_as(pre))
    positive = pre.relu()
    if not isinstance(r.sparsity, (TopK, BatchTopK)):
        return positive
    weighted = positive.detach() * r.norms.detach()
    kept = torch.cat([r.sparsity.keep(weighted[:, part], k) for part, k in r.groups], dim=-1)
    return positive * kept


@dataclass
class SparseStep:
    """The fast step. Remembers where the last selections ended, which only saves time."""

    prefilter: bool | None = None
    """Whether bounds in bfloat16 go before the float32 products; None where these are fast."""
    max_density: float = MAX_DENSITY
    _guesses: dict[int, float] = field(default_factory=dict)

    def __call__(self, request: Request) -> Step | None:
        """The step, or None where codes are too dense for it to be the faster one."""
        r = request
        if sum(k for _, k in r.groups) > self.max_density * r.d_sae:
            return None
        factors = r.factor(r.x), r.factor(r.W_enc).T.contiguous()
        with torch.no_grad():
            found = self._find(r, factors)
        if found is None:
            return None
        pattern = Pattern.at(found.positions, shape=(len(r.x), r.d_sae))
        pre, block_pre = products.encode(
            r.x,
            r.W_enc,
            r.b_enc,
            pattern=pattern,
            pre=found.pre,
            factors=factors,
            block=r.block,
        )
        codes = SparseCodes(pattern=pattern, values=self._values(r, pre, pattern))
        stacked, order = pattern.stacked(r.bounds)
        values = codes.values if order is None else codes.values.index_select(0, order)
        decoded, block_decoded = products.decode(
            values,
            r.W_dec,
            pattern=stacked,
            factor=r.factor(r.W_dec),
            block_codes=r.block_codes(block_pre, r.norms[r.block]),
            block=r.block,
        )
        return Step(
            codes=codes,
            decoded=list(decoded.split(len(r.x))),
            block_decoded=block_decoded if len(r.block) else None,
        )

    def _values(self, r: Request, pre: Tensor, pattern: Pattern) -> Tensor:
        if isinstance(r.sparsity, JumpReLU):
            assert r.threshold is not None
            return r.sparsity.codes(pre, r.threshold.index_select(0, pattern.latents))
        return pre.relu()

    def _find(self, r: Request, factors: tuple[Tensor, Tensor]) -> selection.Found | None:
        scores = self._scores(r, factors)
        if not r.groups:
            everything = slice(0, r.d_sae)
            density = (scores.sample(16, everything) >= 0).float().mean()
            if density > self.max_density:
                return None
            return scores.reaching(0.0, everything)[0]
        found = []
        for part, k in r.groups:
            if isinstance(r.sparsity, TopK):
                found.append(selection.token_topk(scores, round(k), part))
                continue
            chosen, self._guesses[part.start] = selection.batch_topk(
                scores, round(k * len(r.x)), part, guess=self._guesses.get(part.start)
            )
            found.append(chosen)
        if len(found) == 1:
            return found[0]
        positions, order = torch.cat([f.positions for f in found]).sort()
        return selection.Found(positions, torch.cat([f.pre for f in found])[order])

    def _scores(self, r: Request, factors: tuple[Tensor, Tensor]) -> selection.Scores:
        """f_j n_j where latents are selected; otherwise u_j, above the lowest that matters."""
        floor = None
        if isinstance(r.sparsity, JumpReLU):
            assert r.threshold is not None
            floor = r.threshold - r.sparsity.bandwidth / 2
        prefilter = self.prefilter
        if prefilter is None:
            prefilter = selection.fast_bfloat16(r.x.device)
        return selection.Scores(
            x=factors[0],
            W=factors[1],
            bias=r.b_enc.detach(),
            scale=r.norms.detach() if r.groups else torch.ones_like(r.b_enc),
            floor=floor,
            prefilter=prefilter and r.b_enc.dtype == torch.float32,
        )
