"""Which latents are active, found without ever holding the codes of all of them.

    score_ij = (<x_i, w_j> + b_j - floor_j) s_j

An exact search must know every entry that reaches a limit. It need not know the others, so a few
tokens at a time are scored, and only the entries that reach the limit are kept. Where the machine
multiplies bfloat16 much faster than float32 (AMX, tensor cores), upper bounds of the scores are
computed in bfloat16 and the float32 product is taken on the entries whose bound reaches the limit:
the same result, with the dense arithmetic in bfloat16. Limit: scales are positive.

With x+ = [x, 1] and w+ = s [w, b - floor], and r(.) what bfloat16 makes of them,

    |r(x+) r(w+) - x+ w+| <= |r(x+) - x+| |w+| + |r(x+)| |r(w+) - w+| + rounding of the sum

where every norm is known; the right-hand side is two more columns of the same product.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.crosscoder.sparse.codes import (
    GROUP,
    Pattern,
    at_least,
    group_maxima,
    sampled_dots,
)

TINY = torch.finfo(torch.float32).tiny
CHUNK = 512
"""Tokens scored at a time."""
SLACK = 1.3
"""The next batch's limit is where this one would have kept so many times its share."""
UP = 1 + 2**-7
"""Rounding to bfloat16 after this factor never rounds below the value."""


class Found(NamedTuple):
    """Entries by flat position in `[batch, d_sae]`, sorted, with their pre-activations."""

    positions: Int[Tensor, " nnz"]
    pre: Float[Tensor, " nnz"]


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 run several times as fast as those of float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


@dataclass(eq=False, kw_only=True)
class Scores:
    """The scores of one batch; see the module for what they are."""

    x: Float[Tensor, "batch d_in"]
    W: Float[Tensor, "d_sae d_in"]
    """The encoder, a row a latent."""
    bias: Float[Tensor, " d_sae"]
    scale: Float[Tensor, " d_sae"]
    floor: Float[Tensor, " d_sae"] | None = None
    prefilter: bool = False

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.W)

    @cached_property
    def _bounds(self) -> tuple[Float[Tensor, "batch d_up"], Float[Tensor, "d_sae d_up"]]:
        """bfloat16 factors of the upper bounds; the last columns carry the error."""
        d_in = self.x.shape[-1]
        ones = torch.ones_like(self.bias[:1]).expand(len(self.x))
        left, x_norm, x_error = _rounded(self.x, ones, None)
        shift = self.bias if self.floor is None else self.bias - self.floor
        right, w_norm, w_error = _rounded(self.W, shift, self.scale)
        left[:, d_in + 1] = x_error * UP
        left[:, d_in + 2] = (x_norm + x_error) * UP
        right[:, d_in + 1] = w_norm * UP
        right[:, d_in + 2] = (w_error + (d_in + 4) * 2**-23 * w_norm) * UP
        return left, right

    def _chunks(self, part: slice) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """First token, scores (or their upper bounds) and, where exact, pre-activations."""
        for start in range(0, len(self.x), CHUNK):
            rows = slice(start, start + CHUNK)
            if self.prefilter:
                left, right = self._bounds
                yield start, _summed_in_float32(left[rows], right[part].T), None
            else:
                pre = self.pre(rows, part)
                yield start, self.scored(pre, part), pre

    def pre(self, rows: slice | Tensor, part: slice) -> Float[Tensor, "rows n_latents"]:
        """Exact pre-activations of some tokens."""
        kind = self.bias.dtype
        return torch.addmm(self.bias[part], self.x[rows].to(kind), self.W[part].to(kind).T)

    def scored(self, pre: Tensor, part: slice) -> Float[Tensor, "rows n_latents"]:
        """Exact scores from pre-activations."""
        return (pre if self.floor is None else pre - self.floor[part]) * self.scale[part]

    def reaching(self, limit: float, part: slice, *, per_token: float = 0.0) -> tuple[Found, float]:
        """Every entry of the part whose score is at least `limit` (0 or more), and a few more.

        Where tokens show fewer than `per_token` such entries, the limit is lowered for them and
        those that follow, while their scores are at hand; the limit that holds for all is returned.
        """
        gathered, highest = [], 0.0
        for start, scores, pre in self._chunks(part):
            hits = at_least(scores, scores.new_full((1, 1), limit))
            if len(hits) < per_token * len(scores):
                limit = min(limit, _quantile(scores, 1.2 * per_token))
                hits = at_least(scores, scores.new_full((1, 1), limit))
            highest = max(highest, limit)
            gathered.append(self._found(hits, start, part, pre))
        return self._joined(gathered), highest

    def reaching_kth(self, k: int, part: slice) -> Found:
        """For each token the entries that reach a limit not above its k-th largest score."""
        gathered = []
        for start, scores, pre in self._chunks(part):
            hits = at_least(scores, self._kth_limits(scores, start, part, k))
            gathered.append(self._found(hits, start, part, pre))
        return self._joined(gathered)

    def _found(
        self, hits: Tensor, start: int, part: slice, pre: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Positions in the batch from those in a chunk, and pre-activations where known."""
        width = part.stop - part.start
        tokens = torch.div(hits, width, rounding_mode="floor")
        positions = hits + tokens * (self.d_sae - width) + (start * self.d_sae + part.start)
        return positions, None if pre is None else pre.flatten()[hits]

    def _joined(self, gathered: list[tuple[Tensor, Tensor | None]]) -> Found:
        positions = torch.cat([p for p, _ in gathered])
        known = [pre for _, pre in gathered if pre is not None]
        return Found(positions, torch.cat(known) if known else self.pre_at(positions))

    def _kth_limits(self, scores: Tensor, start: int, part: slice, k: int) -> Tensor:
        """A limit for each token that k of its scores reach, unless fewer are positive.

        k groups of latents whose maximum reaches a value hold k scores that do.
        """
        maxima = scores
        if scores.shape[1] % GROUP == 0 and scores.shape[1] // GROUP >= k:
            maxima = group_maxima(scores)
        kth = maxima.topk(min(k, maxima.shape[1]), dim=-1).values[:, -1:]
        if self.prefilter:  # A score is below its upper bound by at most twice the error.
            columns = slice(self.x.shape[-1] + 1, self.x.shape[-1] + 3)
            left, right = (f[:, columns].float() for f in self._bounds)
            error = left[start : start + CHUNK] @ right[part].amax(dim=0)
            kth = (kth.float() * (1 - 2**-6) - 2 * UP * error[:, None]).to(kth)
        return kth.clamp(min=TINY)

    def pre_at(self, positions: Int[Tensor, " nnz"]) -> Float[Tensor, " nnz"]:
        """Exact pre-activations of these entries."""
        pattern = Pattern.at(positions, shape=(len(self.x), self.d_sae))
        dots = sampled_dots(self.x, self.W, pattern.offsets, pattern.latents)
        return dots + self.bias[pattern.latents]

    def of(self, found: Found) -> Float[Tensor, " nnz"]:
        """Exact scores of found entries."""
        latents = found.positions % self.d_sae
        pre = found.pre if self.floor is None else found.pre - self.floor[latents]
        return pre * self.scale[latents]

    def sample(self, n_tokens: int, part: slice) -> Float[Tensor, "n_tokens n_latents"]:
        """Exact scores of evenly spread tokens."""
        step = max(1, len(self.x) // n_tokens)
        return self.scored(self.pre(slice(None, None, step), part), part)


def _rounded(
    rows: Float[Tensor, "n d"], last: Float[Tensor, " n"], scale: Float[Tensor, " n"] | None
) -> tuple[Float[Tensor, "n d_up"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Rows `scale * [row, last]` in bfloat16, their norms and the norms of what rounding did.

    A few rows at a time, which stay in the cache; padded with zeros for the error columns.
    """
    n, d = rows.shape
    out = torch.zeros(n, -(-(d + 3) // 32) * 32, dtype=torch.bfloat16, device=rows.device)
    norms, errors = last.new_empty(n), last.new_empty(n)
    for start in range(0, n, CHUNK):
        own = slice(start, start + CHUNK)
        exact = torch.cat([rows[own].to(last.dtype), last[own, None]], dim=-1)
        if scale is not None:
            exact *= scale[own, None]
        out[own, : d + 1] = exact
        norms[own] = torch.linalg.vector_norm(exact, dim=-1)
        errors[own] = torch.linalg.vector_norm(exact.sub_(out[own, : d + 1]), dim=-1)
    return out, norms, errors


def _summed_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """A bfloat16 product; on CUDA partial sums could be rounded too, which the bound forbids."""
    if not left.is_cuda:
        return left @ right
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        return left @ right
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def batch_topk(
    scores: Scores, n_kept: int, part: slice, *, guess: float | None = None
) -> tuple[Found, float]:
    """The `n_kept` largest positive scores of the batch; of equal ones the first.

    A limit is guessed, and the entries that reach it are counted: if they are enough, the largest
    are among them. Otherwise it is estimated anew, in the end 0.

    Args:
        scores: of the batch.
        n_kept: k * batch; fewer are kept only where fewer are positive.
        part: the latents to choose from.
        guess: a limit to begin with, such as the one returned for the batch before.

    Returns:
        The entries, and a limit for the next batch.
    """
    per_token = n_kept / len(scores.x) * (1.5 if scores.prefilter else 1.1)
    for limit, share in (
        (math.inf if guess is None else guess, per_token),
        (math.inf, 3 * per_token),
        (TINY, 0.0),
    ):
        found, holds = scores.reaching(limit, part, per_token=share)
        values = scores.of(found)
        if int((values >= holds).sum()) >= n_kept:
            break
    kept = largest(values, n_kept).nonzero().squeeze(-1)
    n_next = min(len(values), round(SLACK * n_kept))
    following = float(values.kthvalue(len(values) - n_next + 1).values) if n_next else TINY
    return Found(found.positions[kept], found.pre[kept]), max(following, TINY)


def _quantile(scores: Float[Tensor, "rows n"], per_token: float) -> float:
    """About the value that `per_token` scores of a token reach, from some of the tokens."""
    sample = scores[:: max(1, len(scores) // 64)]
    rank = min(sample.numel(), max(1, round(per_token * len(sample))))
    return max(TINY, float(sample.flatten().topk(rank, sorted=False).values.min()))


def token_topk(scores: Scores, k: int, part: slice) -> Found:
    """For each token its k largest positive scores; of equal ones the first."""
    found = scores.reaching_kth(k, part)
    values = scores.of(found)
    tokens = torch.div(found.positions, scores.d_sae, rounding_mode="floor")
    by_value = values.argsort(descending=True, stable=True)
    order = by_value[tokens[by_value].argsort(stable=True)]  # token by token, the largest first
    ordered = tokens[order]
    places = torch.arange(len(values), device=values.device) - torch.searchsorted(ordered, ordered)
    kept = torch.zeros_like(values, dtype=torch.bool)
    kept[order] = places < k
    kept &= values > 0
    return Found(found.positions[kept], found.pre[kept])


def largest(values: Float[Tensor, " n"], n_kept: int) -> Bool[Tensor, " n"]:
    """Which are the `n_kept` largest positive values; of equal ones the first."""
    n_kept = min(n_kept, len(values))
    if n_kept <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    kth = values.topk(n_kept, sorted=False).values.min()
    kept = values > kth
    ties = (values == kth).nonzero().squeeze(-1)
    kept[ties[: n_kept - int(kept.sum())]] = True
    return kept & (values > 0)
