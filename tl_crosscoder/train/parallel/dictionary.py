"""`Shard`: the latents of one process as an ordinary dictionary in training.

It differs from one that is alone in what it asks of the others: which entries are the largest of
all, and what all latents decode to. The sum over latents of what they decode to, `[batch, d_in]`,
is the one large exchange; its gradient stays where it is, since every process computes the same
loss from it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.crosscoder.config import CrosscoderTrainingConfig
from tl_crosscoder.crosscoder.sparse.codes import Codes
from tl_crosscoder.crosscoder.sparse.selection import SLACK, TINY, Found, Scores, token_topk
from tl_crosscoder.crosscoder.sparse.step import Request, Step
from tl_crosscoder.crosscoder.sparsity import Sparsity
from tl_crosscoder.crosscoder.topk import BatchTopK, Selection, TopK
from tl_crosscoder.crosscoder.training import CrosscoderTraining, drawn_decoder
from tl_crosscoder.mesh import Axis, Mesh
from tl_crosscoder.train.parallel.shards import latents_of, shard_config


class Place:
    """Where the latents and the tokens of this process stand among all."""

    def __init__(self, mesh: Mesh, latents: Int[Tensor, " n"], d_sae: int) -> None:
        self.mesh, self.latents, self.d_sae = mesh, latents, d_sae
        self.has_same_tokens = False
        """Whether every process has the same tokens, as at the start."""

    @property
    def axis(self) -> Axis:
        """Processes whose codes compete in a batch."""
        return self.mesh.latents if self.has_same_tokens else self.mesh.world

    @property
    def n_parts(self) -> int:
        """Parts of a batch."""
        return 1 if self.has_same_tokens else self.mesh.data.size

    def places(
        self, tokens: Int[Tensor, " nnz"], latents: Int[Tensor, " nnz"], batch: int
    ) -> Int[Tensor, " nnz"]:
        """Flat positions in the codes `[batch, d_sae]` that one process would have."""
        first = 0 if self.has_same_tokens else self.mesh.data.index * batch
        return (tokens + first) * self.d_sae + self.latents.to(latents.device)[latents]


@dataclass(frozen=True, kw_only=True)
class _Shared(Selection):
    """What both selections share out in the same way."""

    place: Place

    def to_dict(self) -> dict[str, Any]:
        """JSON form of the selection that one process would have."""
        kind = next(c for c in type(self).__mro__ if "kind" in vars(c))
        return kind(**{f.name: getattr(self, f.name) for f in fields(kind)}).to_dict()

    def smallest(self, codes: Codes, norms: Tensor, latents: slice) -> Float[Tensor, ""]:
        """Over the codes of all processes."""
        return self.place.axis.reduced(super().smallest(codes, norms, latents), "min")

    def threshold_keeping(self, k: float, n_tokens: int, values: Tensor) -> Float[Tensor, ""]:
        """Midway between the two values of all processes that it separates."""
        axis, data = self.place.axis, self.place.mesh.data
        n = round(k * int(data.reduced(torch.tensor(n_tokens, device=values.device))))
        edges = [axis.nth_largest(values, i)[0] for i in (n, n + 1)]
        return values.new_tensor(sum(edges) / 2 if n > 0 else edges[1])


@dataclass(frozen=True, kw_only=True)
class SharedBatchTopK(_Shared, BatchTopK):
    """The k * batch largest over the tokens and latents of all processes, exactly."""

    def keep(
        self, weighted: Tensor, k: float, *, latents: slice | None = None
    ) -> Bool[Tensor, "batch n"]:
        """See `Axis.largest`."""
        assert latents is not None
        tokens, own = weighted.new_ones(weighted.shape).nonzero().unbind(dim=1)
        places = self.place.places(tokens, own + latents.start, len(weighted))
        n = round(k * len(weighted) * self.place.n_parts)
        return self.place.axis.largest(weighted.flatten(), places, n).view_as(weighted)

    def find(
        self, scores: Scores, latents: slice, *, k: float, guess: float | None
    ) -> tuple[Found, float]:
        """As `batch_topk`: a limit is guessed, and what reaches it is counted everywhere."""
        axis, batch = self.place.axis, len(scores.x)
        n = round(k * batch * self.place.n_parts)
        per_token = k / self.place.mesh.latents.size * (1.5 if scores.prefilter else 1.1)
        first = torch.inf if guess is None else guess
        for limit, share in ((first, per_token), (torch.inf, 3 * per_token), (TINY, 0.0)):
            found, holds = scores.reaching(limit, latents, per_token=share)
            values = scores.of(found)
            highest = axis.reduced(values.new_tensor(holds), "max")
            if int(axis.reduced((values >= highest).sum())) >= n:
                break
        tokens = torch.div(found.positions, scores.d_sae, rounding_mode="floor")
        places = self.place.places(tokens, found.positions % scores.d_sae, batch)
        kept = axis.largest(values, places, n).nonzero().squeeze(-1)
        n_next = min(len(values), round(SLACK * len(kept)))
        following = (
            values.kthvalue(len(values) - n_next + 1).values if n_next else values.new_tensor(TINY)
        )
        following = float(axis.reduced(following, "min"))
        return Found(found.positions[kept], found.pre[kept]), max(following, TINY)


@dataclass(frozen=True, kw_only=True)
class SharedTopK(_Shared, TopK):
    """For each token the k largest over the latents of all processes, exactly."""

    def keep(
        self, weighted: Tensor, k: float, *, latents: slice | None = None
    ) -> Bool[Tensor, "batch n"]:
        """Chosen among the k largest here."""
        assert latents is not None
        kept = super().keep(weighted, k)
        positions = kept.flatten().nonzero().squeeze(-1)
        chosen = self._chosen(weighted.flatten()[positions], positions, weighted.shape, k, latents)
        return (
            torch.zeros_like(kept.flatten()).index_fill_(0, positions[chosen], True).view_as(kept)
        )

    def find(
        self, scores: Scores, latents: slice, *, k: float, guess: float | None
    ) -> tuple[Found, None]:
        """As `token_topk`, and then chosen among the k largest here."""
        del guess
        found = token_topk(scores, round(k), latents)
        shape = torch.Size((len(scores.x), scores.d_sae))
        chosen = self._chosen(scores.of(found), found.positions, shape, k, slice(0, None))
        return Found(found.positions[chosen], found.pre[chosen]), None

    def _chosen(
        self, values: Tensor, positions: Tensor, shape: torch.Size, k: float, latents: slice
    ) -> Bool[Tensor, " nnz"]:
        tokens = torch.div(positions, shape[1], rounding_mode="floor")
        own = self.place.latents.to(positions.device)[positions % shape[1] + latents.start]
        return largest_of_rows(values, tokens, own, shape[0], round(k), self.place.mesh.latents)


def largest_of_rows(
    values: Float[Tensor, " nnz"],
    tokens: Int[Tensor, " nnz"],
    latents: Int[Tensor, " nnz"],
    batch: int,
    k: int,
    axis: Axis,
) -> Bool[Tensor, " nnz"]:
    """Which entries are among the k largest of their token over all processes.

    Of equal ones the lowest latents. Each process gives at most k entries a token, sorted by token.
    """
    starts = torch.searchsorted(tokens, torch.arange(batch, device=tokens.device))
    column = torch.arange(len(tokens), device=tokens.device) - starts[tokens]
    table = values.new_zeros(batch, k).index_put((tokens, column), values)
    names = latents.new_full((batch, k), torch.iinfo(latents.dtype).max)
    names = names.index_put((tokens, column), latents)
    every, named = (torch.cat(axis.gathered(t[None]).unbind(), dim=1) for t in (table, names))
    order = named.argsort(dim=1, stable=True)
    order = order.gather(1, every.gather(1, order).argsort(dim=1, descending=True, stable=True))
    is_kept = torch.zeros_like(every, dtype=torch.bool).scatter_(1, order[:, :k], True)
    own = is_kept[:, axis.index * k : (axis.index + 1) * k]
    return own[tokens, column]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, axis: Axis) -> Tensor:
        del ctx
        return axis.reduced(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grads[0], None


class Shard(CrosscoderTraining):
    """Some of the latents of a dictionary, on some of the tokens of each batch."""

    def __init__(self, whole: CrosscoderTrainingConfig, mesh: Mesh) -> None:
        self.mesh, self.whole = mesh, whole
        index, n = mesh.latents.index, mesh.latents.size
        self.place = Place(mesh, latents_of(whole, index, n), whole.d_sae)
        super().__init__(shard_config(whole, n, sparsity=_shared(whole.sparsity, self.place)))

    def _drawn_decoder(self) -> Tensor:
        return drawn_decoder(self.whole, self.place.latents, dtype=self.dtype, device=self.device)

    def initialize_from_(self, activations: Tensor) -> float:
        """As of the whole; every process is given the same activations."""
        with self._same_tokens():
            return super().initialize_from_(activations)

    @contextmanager
    def _same_tokens(self) -> Iterator[None]:
        self.place.has_same_tokens = True
        try:
            yield
        finally:
            self.place.has_same_tokens = False

    def batch_mean(self, values: Tensor) -> Tensor:
        """Over the parts of all processes."""
        return self.mesh.data.mean(values.mean(dim=0))

    def _request(self, x: Tensor, *, is_dead: Tensor | None, step: int) -> Request:
        r = super()._request(x, is_dead=is_dead, step=step)
        n, factor = self.mesh.latents.size, self.cfg.sparsity.k_factor(step)
        groups = [
            (own, min(k * factor, (own.stop - own.start) * n))
            for own, k in self.cfg.selection_groups()
        ]
        self._n_dead = int(self.mesh.latents.reduced(torch.tensor(len(r.block), device=x.device)))
        return replace(
            r, groups=groups, block_codes=partial(self._auxk_codes, k=self._k_aux, own=r.block)
        )

    def _auxk_codes(self, pre: Tensor, norms: Tensor, *, k: int, own: Tensor) -> Tensor:
        """As `auxk_codes`, over the dead latents of all processes."""
        codes = pre.relu()
        if self._n_dead <= k:
            return codes
        weighted = codes.detach() * norms.detach()
        top, at = weighted.topk(min(k, weighted.shape[1]), dim=-1)
        at, order = at.sort(dim=-1)
        top = top.gather(1, order)
        tokens = torch.arange(len(at), device=at.device)[:, None].expand_as(at).flatten()
        latents = self.place.latents.to(at.device)[own][at.flatten()]
        kept = largest_of_rows(top.flatten(), tokens, latents, len(at), k, self.mesh.latents)
        mask = torch.zeros_like(codes).scatter_(-1, at, kept.view_as(at).to(codes.dtype))
        return codes * mask

    def _summed(self, step: Step) -> Step:
        block = step.block_decoded
        parts = [*step.decoded]
        if self._n_dead:
            parts.append(torch.zeros_like(parts[0]) if block is None else block)
        summed = _Summed.apply(torch.stack(parts), self.mesh.latents).unbind()
        n = len(step.decoded)
        return replace(
            step, decoded=[*summed[:n]], block_decoded=summed[n] if self._n_dead else None
        )


def _shared(sparsity: Sparsity, place: Place) -> Sparsity:
    """The same sparsity over all processes; penalties are sums and need nothing."""
    own = {f.name: getattr(sparsity, f.name) for f in fields(sparsity)}
    match sparsity:
        case BatchTopK():
            return SharedBatchTopK(**own, place=place)
        case TopK():
            return SharedTopK(**own, place=place)
        case Selection():
            raise ValueError(f"{sparsity.kind} selects in its own way: train it in one process.")
    return sparsity
