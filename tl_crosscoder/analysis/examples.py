"""Tokens that show what each latent is active on, collected for all latents in one pass.

Contract: of every latent the `n_top` largest codes and a uniform sample of its active tokens, each
with the latent's codes `[n_before + 1 + n_after]` around it. The result depends on the codes and
the seed alone: not on batches, their order or the device. Limits: a context must be whole in one
`add`; memory is 120 bytes x (n_top + n_sampled) x d_sae at the default window, 140 MB for 16,384
latents, and up to four times that while it is sorted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.mesh import Axis
from tl_crosscoder.models.tokenizer import token_pieces


@dataclass(frozen=True, kw_only=True)
class ExampleSettings:
    """How many examples of each latent are kept, and how much around them."""

    n_top: int = 20
    """Largest codes of each latent."""
    n_quantiles: int = 5
    """Bins of equal counts, from the weakest to the strongest codes."""
    n_per_quantile: int = 5
    """Examples of each bin."""
    n_sampled: int = 50
    """Active tokens drawn of each latent, at least n_quantiles x n_per_quantile.

    They are those with the smallest random keys (bottom-k sampling, Cohen and Kaplan 2007). Bins
    are cut at the quantiles of this sample, which are estimates where a latent is active on more
    tokens than that.
    """
    n_before: int = 16
    """Positions before the token of which the codes are kept."""
    n_after: int = 8
    """Positions after it."""
    seed: int = 0
    """Seed of the sample."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name in ("n_before", "n_after", "seed") else 1
            if value < least:
                raise ValueError(f"{name} is {value}; it must be {least} or more.")
        shown = self.n_quantiles * self.n_per_quantile
        if self.n_sampled < shown:
            raise ValueError(
                f"n_sampled is {self.n_sampled}, fewer than n_quantiles x n_per_quantile = {shown}:"
                " raise n_sampled, or show fewer."
            )


@dataclass(frozen=True, kw_only=True)
class CollectedExamples:
    """Examples of all latents, on the CPU, sorted by latent, quantile and rank."""

    latents: Int[Tensor, " n"]
    quantiles: Int[Tensor, " n"]
    """0 is the bin of the weakest codes; -1 for the largest codes of all."""
    ranks: Int[Tensor, " n"]
    """Place among the examples of the same latent and quantile: the largest code is 0."""
    values: Float[Tensor, " n"]
    """The latent's code at the token, float32."""
    positions: Int[Tensor, " n"]
    """Context in the text x context_size + position in the context."""
    windows: Float[Tensor, "n window"]
    """The latent's codes around the token; 0 where it is not active, at masked tokens and outside
    the context."""
    d_sae: int
    context_size: int
    settings: ExampleSettings

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.latents)


_KEY_BITS = 32
_BUFFER = 2**16
"""Entries that may wait however few are kept: sorting fewer at a time would not pay."""


class _Entries(NamedTuple):
    """Active tokens of latents."""

    ranks: Int[Tensor, " n"]
    """Latent x 2^32 + key: sorted, entries stand latent by latent, the best first."""
    positions: Int[Tensor, " n"]
    values: Float[Tensor, " n"]
    windows: Float[Tensor, "n window"]

    def at(self, index: Shaped[Tensor, " m"]) -> "_Entries":
        """Some of them, by index or mask."""
        return _Entries(*(column[index] for column in self))

    @classmethod
    def cat(cls, parts: "Sequence[_Entries]") -> "_Entries":
        """One after the other."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))


class _SmallestRanks:
    """The n entries of smallest rank of each latent, whatever order they come in.

    Among equal ranks the smallest positions are kept.
    """

    def __init__(self, n: int, *, d_sae: int, width: int, device: torch.device | str) -> None:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        values = torch.zeros(0, device=device)
        self.n = n
        self._parts = [_Entries(none, none, values, values.view(0, width))]
        self._limit, self._n_entries = _BUFFER, 0
        # Of each latent the rank of its n-th entry, which others must not exceed.
        self._last = torch.full((d_sae,), torch.iinfo(torch.int64).max, device=device)

    def may_hold(self, ranks: Int[Tensor, " m"], latents: Int[Tensor, " m"]) -> Bool[Tensor, " m"]:
        """Which entries are no worse than the last one known of their latents."""
        return ranks <= self._last.index_select(0, latents)

    def add(self, entries: _Entries) -> None:
        """Take more entries into account."""
        self._parts.append(entries)
        self._n_entries += len(entries.ranks)
        if self._n_entries > self._limit:
            self.entries()

    def gather(self, axis: Axis) -> None:
        """Keep the best of several processes."""
        if axis.size > 1:
            own = self.entries()
            every = _Entries(*map(axis.gathered, own))
            self._parts = [own.at(own.ranks < 0), every]  # nothing, and everything

    def entries(self) -> _Entries:
        """What is kept, sorted by rank and then by position."""
        if len(self._parts) > 1:
            every = _Entries.cat(self._parts)
            self._parts = []
            order = _order_by(every.ranks, every.positions)
            latents = every.ranks[order] >> _KEY_BITS
            places = _index_in_group(latents)
            kept, is_last = every.at(order[places < self.n]), places == self.n - 1
            self._last[latents[is_last]] = every.ranks[order[is_last]]
            self._parts, self._n_entries = [kept], len(kept.ranks)
            self._limit = max(_BUFFER, 2 * len(kept.ranks))
        return self._parts[0]


class ExampleCollector:
    """Collects examples while codes are computed batch by batch."""

    def __init__(
        self,
        d_sae: int,
        *,
        context_size: int,
        settings: ExampleSettings | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.d_sae, self.context_size = d_sae, context_size
        self.settings = settings or ExampleSettings()
        width = self.settings.n_before + 1 + self.settings.n_after
        self._top, self._sample = (
            _SmallestRanks(n, d_sae=d_sae, width=width, device=device)
            for n in (self.settings.n_top, self.settings.n_sampled)
        )
        seed = _mixed(torch.full((1,), self.settings.seed, device=device))
        self._salts = _mixed(seed + torch.arange(d_sae, device=device))

    @torch.no_grad()
    def add(self, codes: SparseCodes, positions: Int[Tensor, " rows"]) -> None:
        """Take the codes of whole contexts into account.

        Args:
            codes: of the kept tokens, context by context and in the order of the text.
            positions: of each of them, as in `Harvested.positions`.

        Raises:
            ValueError: codes of other latents, or not one position for each row.
        """
        if codes.pattern.d_sae != self.d_sae or codes.batch != len(positions):
            raise ValueError(
                f"codes are [{codes.batch}, {codes.pattern.d_sae}] with {len(positions)} positions;"
                f" they must have {self.d_sae} latents and one position for each row."
            )
        order, _ = codes.pattern.by_latent
        latents = codes.pattern.latents.index_select(0, order).long()
        values = codes.values.index_select(0, order).float()
        where = positions.to(values.device).index_select(
            0, codes.pattern.tokens.index_select(0, order)
        )
        high = latents << _KEY_BITS
        ranks = (high | _largest_first(values), high | self._drawn(latents, where))
        bests = (self._top, self._sample)
        may = [b.may_hold(r, latents) for b, r in zip(bests, ranks, strict=True)]
        at = ((may[0] | may[1]) & (values > 0)).nonzero().squeeze(-1)
        windows = self._windows(at, latents, where, values)
        for best, rank, mask in zip(bests, ranks, may, strict=True):
            own = mask[at]
            chosen = at[own]
            best.add(_Entries(rank[chosen], where[chosen], values[chosen], windows[own]))

    def gather(self, axis: Axis) -> None:
        """Keep the best of several processes, which read other contexts."""
        self._top.gather(axis)
        self._sample.gather(axis)

    def result(self) -> CollectedExamples:
        """The examples so far."""
        top, sample = self._top.entries(), self._sample.entries()
        bins, shown = self._quantiles(sample)
        entries = _Entries.cat([top, sample.at(shown)])
        latents = entries.ranks >> _KEY_BITS
        quantiles = torch.cat([torch.full_like(top.positions, -1), bins[shown]])
        groups = latents * (self.settings.n_quantiles + 1) + quantiles + 1
        order = _order_by(groups, _largest_first(entries.values), entries.positions)
        return CollectedExamples(
            latents=latents[order].cpu(),
            quantiles=quantiles[order].cpu(),
            ranks=_index_in_group(groups[order]).cpu(),
            values=entries.values[order].cpu(),
            positions=entries.positions[order].cpu(),
            windows=entries.windows[order].cpu(),
            d_sae=self.d_sae,
            context_size=self.context_size,
            settings=self.settings,
        )

    def _quantiles(self, sample: _Entries) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
        """The bin of each sampled token, and whether it is among the first drawn of its bin."""
        n_bins, latents = self.settings.n_quantiles, sample.ranks >> _KEY_BITS
        counts = torch.bincount(latents, minlength=self.d_sae)[latents]
        rising = _order_by(latents, sample.values, sample.positions)
        places = torch.empty_like(latents)
        places[rising] = _index_in_group(latents[rising])
        bins = torch.div(places * n_bins, counts, rounding_mode="floor")
        # Entries stand in the order in which they were drawn, which a stable sort keeps.
        groups, order = (latents * n_bins + bins).sort(stable=True)
        shown = torch.zeros_like(latents, dtype=torch.bool)
        shown[order] = _index_in_group(groups) < self.settings.n_per_quantile
        return bins, shown

    def _windows(self, at: Tensor, latents: Tensor, where: Tensor, values: Tensor) -> Tensor:
        """Codes around some of the entries, which stand latent by latent.

        The neighbours in the text on which a latent is active are neighbours among its entries.
        """
        n_before, n_after = self.settings.n_before, self.settings.n_after
        windows = values.new_zeros(len(at), n_before + 1 + n_after)
        windows[:, n_before] = values[at]
        for direction, reach in ((-1, n_before), (1, n_after)):
            rows, own = torch.arange(len(at), device=at.device), at
            for shift in range(1, reach + 1):
                other = (own + direction * shift).clamp(0, len(latents) - 1)
                distance = where[other] - where[own]
                near = (distance * direction > 0) & (distance * direction <= reach)
                near &= latents[other] == latents[own]
                near &= where[other] // self.context_size == where[own] // self.context_size
                near = near.nonzero().squeeze(-1)
                if not len(near):
                    break
                rows, own = rows[near], own[near]
                windows[rows, n_before + distance[near]] = values[other[near]]
        return windows

    def _drawn(self, latents: Tensor, positions: Tensor) -> Tensor:
        """A random key of each entry, a function of the seed, the latent and the position."""
        mixed = _mixed(positions + self._salts.index_select(0, latents))
        return _shifted(mixed, 64 - _KEY_BITS)


def _order_by(first: Shaped[Tensor, " n"], *others: Shaped[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The order that sorts by the first key, equals by the second, and so on."""
    *rest, last = (first, *others)
    order = last.argsort(stable=True)
    for key in reversed(rest):
        order = order[key[order].argsort(stable=True)]
    return order


def _index_in_group(groups: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """0, 1, 2, ... within each run of equal numbers."""
    index = torch.arange(len(groups), device=groups.device)
    begins = torch.ones_like(groups, dtype=torch.bool)
    begins[1:] = groups[1:] != groups[:-1]
    return index - (index * begins).cummax(dim=0).values if len(groups) else index


def _largest_first(values: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Keys of 31 bits in the opposite order of floats of 0 or more."""
    # The bits of floats that are not negative are in the order of the floats.
    return (2**31 - 1) - values.clamp(min=0).contiguous().view(torch.int32).long()


def _mixed(x: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """A bijection of 64 bits that looks random: SplitMix64 (Steele, Lea and Flood 2014)."""
    # The factors are 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB, signed.
    x = x * -7046029254386353131
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, n: int) -> Tensor:
    """To the right, without the copies of the sign that `>>` brings in."""
    return (x >> n) & (2 ** (64 - n) - 1)


@dataclass(frozen=True, kw_only=True)
class TopTokens:
    """The n most active tokens of every latent, best first."""

    values: Float[Tensor, "n d_sae"]
    """Codes; 0 where a latent was active on fewer than n tokens."""
    positions: Int[Tensor, "n d_sae"]
    """Index into the flattened `[contexts, pos]` of the text; -1 where the value is 0."""

    @classmethod
    def of(cls, collected: CollectedExamples, *, n: int) -> "TopTokens":
        """The first n of each latent from what a pass collected."""
        values = torch.zeros(n, collected.d_sae)
        positions = torch.full((n, collected.d_sae), -1)
        is_top = (collected.quantiles < 0) & (collected.ranks < n)
        at = collected.ranks[is_top], collected.latents[is_top]
        values[at] = collected.values[is_top]
        positions[at] = collected.positions[is_top]
        return cls(values=values, positions=positions)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One token in context."""

    before: str
    token: str
    after: str
    value: float
    """The latent's code at the token."""
    source: str
    """Where the text comes from."""


def examples(
    top: TopTokens,
    latent: int,
    text: TokenizedText,
    tokenizer: Any,
    *,
    n_before: int = 12,
    n_after: int = 6,
) -> list[Example]:
    """The stored tokens of a latent as text, best first; what is shown ends with the context."""
    found = []
    for value, position in zip(
        top.values[:, latent].tolist(), top.positions[:, latent].tolist(), strict=True
    ):
        if position < 0:
            break
        context, at = divmod(position, text.context_size)
        start = max(0, at - n_before)
        pieces = token_pieces(tokenizer, text.tokens[context, start : at + 1 + n_after].tolist())
        found.append(
            Example(
                before="".join(pieces[: at - start]),
                token=pieces[at - start],
                after="".join(pieces[at - start + 1 :]),
                value=value,
                source=text.sources[int(text.source_ids[context, at])],
            )
        )
    return found
