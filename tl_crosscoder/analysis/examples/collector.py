"""`TokenPieces`: a text token by token, as strings that together are the text.

Contract: one string a token; decoded alone, a token loses the space before it in the tokenizers of
Llama 2 and its kin, so a piece is what a token adds to the one before. Limit: a character that is
split between tokens belongs to the one that completes it, and the others are empty.

`BestEntries`: of a stream of entries, the n best of each latent.

Contract: an entry has a rank, its latent in the upper 32 bits and a key in the lower ones; the n
smallest ranks of each latent are kept, among equals the smallest positions, whatever the order in
which entries come. Limit: entries wait in a buffer as large as what is kept.

`ExampleCollector`: tokens that show what each latent is active on, of all in one pass.

Contract: of every latent the `n_top` largest codes and a uniform sample of its active tokens, each
with the latent's codes `[n_before + 1 + n_after]` around it. The result depends on the codes and
the seed alone: not on batches, their order or the device. Limits: a context must come whole, in
one `add`; memory is 120 bytes x (n_top + n_sampled) x d_sae at the default window, 140 MB for
16,384 latents, and up to four times that while it is sorted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_crosscoder.crosscoder.sparse.codes import SparseCodes

_UNREADABLE = "\N{REPLACEMENT CHARACTER}"
_MOST_WAITING = 16
"""Tokens held back in the hope of a whole character; one has at most four bytes."""


class TokenPieces:
    """Decodes contexts with one tokenizer; pairs of tokens seen before are not decoded again."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Pairs repeat: one in a hundred of the embedded text is new.
        self._decode = lru_cache(maxsize=2**18)(self._decoded)

    def of(self, ids: Sequence[int]) -> list[str]:
        """One string for each token."""
        pieces = []
        anchor = read = 0  # decoded so far: ids[:read]; the tokens from `anchor` on give the spaces
        said = ""
        for end in range(1, len(ids) + 1):
            text = self._decode(tuple(ids[anchor:end]))
            waits = end < len(ids) and end - read < _MOST_WAITING
            whole = text.rstrip(_UNREADABLE) if waits else text
            pieces.append(whole[len(said) :])
            if whole == text:
                anchor, read = read, end
                said = self._decode(tuple(ids[anchor:end]))
            elif len(whole) > len(said):
                said = whole
        return pieces

    def _decoded(self, ids: tuple[int, ...]) -> str:
        return self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


_BUFFER = 2**16
"""Entries that may wait however few are kept: sorting fewer at a time would not pay."""
_NONE = torch.iinfo(torch.int64).max


@dataclass(frozen=True, kw_only=True)
class Entries:
    """Active tokens of latents."""

    ranks: Int[Tensor, " n"]
    """Latent x 2^32 + key: sorted, they stand latent by latent, the best first."""
    positions: Int[Tensor, " n"]
    values: Float[Tensor, " n"]
    windows: Float[Tensor, "n window"]

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.ranks)

    def __getitem__(self, index: Shaped[Tensor, " m"]) -> "Entries":
        """Some of them, by index or mask."""
        return Entries(
            ranks=self.ranks[index],
            positions=self.positions[index],
            values=self.values[index],
            windows=self.windows[index],
        )

    @classmethod
    def cat(cls, parts: "Sequence[Entries]") -> "Entries":
        """One after the other."""
        return cls(
            ranks=torch.cat([p.ranks for p in parts]),
            positions=torch.cat([p.positions for p in parts]),
            values=torch.cat([p.values for p in parts]),
            windows=torch.cat([p.windows for p in parts]),
        )


class BestEntries:
    """The n entries with the smallest ranks of each latent."""

    def __init__(self, n: int, *, d_sae: int, width: int, device: torch.device | str) -> None:
        self.n = n
        none = torch.zeros(0, dtype=torch.int64, device=device)
        values = torch.zeros(0, device=device)
        self._parts = [
            Entries(ranks=none, positions=none, values=values, windows=values.view(0, width))
        ]
        self._limit, self._n_entries = _BUFFER, 0
        # Of each latent: its n-th entry, which a better one has to beat.
        self._last_ranks = torch.full((d_sae,), _NONE, device=device)
        self._last_positions = torch.full((d_sae,), _NONE, device=device)

    def may_hold(self, ranks: Int[Tensor, " m"], latents: Int[Tensor, " m"]) -> Bool[Tensor, " m"]:
        """Which entries are no worse than the last one known of their latents."""
        return ranks <= self._last_ranks.index_select(0, latents)

    def add(self, entries: Entries) -> None:
        """Take more entries into account."""
        latents = entries.ranks >> 32
        ties = entries.ranks == self._last_ranks[latents]
        entries = entries[~ties | (entries.positions < self._last_positions[latents])]
        self._parts.append(entries)
        self._n_entries += len(entries)
        if self._n_entries > self._limit:
            self.entries()

    def entries(self) -> Entries:
        """What is kept, sorted by rank and then by position."""
        if len(self._parts) > 1:
            every = Entries.cat(self._parts)
            self._parts = []
            order = order_by(every.ranks, every.positions)
            latents = every.ranks[order] >> 32
            places = index_in_group(latents)
            kept = every[order[places < self.n]]
            last = order[places == self.n - 1]
            full = latents[places == self.n - 1]
            self._last_ranks[full] = every.ranks[last]
            self._last_positions[full] = every.positions[last]
            self._parts, self._n_entries = [kept], len(kept)
            self._limit = max(_BUFFER, 2 * len(kept))
        return self._parts[0]


def order_by(first: Shaped[Tensor, " n"], *others: Shaped[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The order that sorts by the first key, equals by the second, and so on."""
    *rest, last = (first, *others)
    order = last.argsort(stable=True)
    for key in reversed(rest):
        order = order[key[order].argsort(stable=True)]
    return order


def index_in_group(groups: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """0, 1, 2, ... within each run of equal numbers."""
    index = torch.arange(len(groups), device=groups.device)
    begins = torch.ones_like(groups, dtype=torch.bool)
    begins[1:] = groups[1:] != groups[:-1]
    return index - (index * begins).cummax(dim=0).values if len(groups) else index


KINDS = ("top", "quantile")
"""Why an example was kept: its code is one of the largest, or it was drawn from a quantile."""
_KEY_BITS = 32
_MASK = 2**_KEY_BITS - 1


@dataclass(frozen=True, kw_only=True)
class ExampleSettings:
    """How many examples of each latent, and how much around them."""

    n_top: int = 20
    """Largest codes of each latent."""
    n_quantiles: int = 5
    """Bins of equal counts, from the weakest to the strongest codes."""
    n_per_quantile: int = 5
    """Examples of each bin."""
    n_sampled: int = 50
    """Active tokens drawn of each latent, at least n_quantiles x n_per_quantile.

    They are those with the smallest random keys (bottom-k sampling, Cohen and Kaplan 2007). Bins
    are cut at the quantiles of this sample: estimates, but where a latent is active on no more
    tokens than that.
    """
    n_before: int = 16
    """Positions before the token of which the codes are kept."""
    n_after: int = 8
    """Positions after it."""
    seed: int = 0
    """Of the sample."""

    def __post_init__(self) -> None:
        for name in ("n_top", "n_quantiles", "n_per_quantile"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        for name in ("n_before", "n_after", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        shown = self.n_quantiles * self.n_per_quantile
        if self.n_sampled < shown:
            raise ValueError(
                f"n_sampled is {self.n_sampled}, fewer than n_quantiles x n_per_quantile = {shown}:"
                " raise n_sampled, or show fewer."
            )


@dataclass(frozen=True, kw_only=True)
class CollectedExamples:
    """The examples of all latents, on the CPU: by latent, kind, quantile and rank."""

    latents: Int[Tensor, " n"]
    kinds: Int[Tensor, " n"]
    """Index into `KINDS`."""
    quantiles: Int[Tensor, " n"]
    """0 is the bin of the weakest codes; -1 for the top."""
    ranks: Int[Tensor, " n"]
    """Place among those of its latent, kind and quantile: the largest code first."""
    values: Float[Tensor, " n"]
    """The latent's code at the token, float32."""
    positions: Int[Tensor, " n"]
    """Context in the text x context_size + position in the context."""
    windows: Float[Tensor, "n window"]
    """The latent's codes around the token; 0 where it is not active, where a token does not count
    and outside the context."""
    d_sae: int
    context_size: int
    settings: ExampleSettings

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.latents)


class ExampleCollector:
    """Collects examples while codes stream by."""

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
        self.top, self.sample = (
            BestEntries(n, d_sae=d_sae, width=width, device=device)
            for n in (self.settings.n_top, self.settings.n_sampled)
        )
        own = _mixed(torch.full((1,), self.settings.seed, device=device))
        self.salts = _mixed(own + torch.arange(d_sae, device=device))

    @torch.no_grad()
    def add(self, codes: SparseCodes, positions: Int[Tensor, " rows"]) -> None:
        """Take the codes of whole contexts into account.

        Args:
            codes: of the tokens that count, context by context and in the order of the text.
            positions: of each of them, as in `Harvested.positions`.

        Raises:
            ValueError: codes of other latents, or not one position for each row.
        """
        self._check(codes, positions)
        order, _ = codes.pattern.by_latent
        latents = codes.pattern.latents.index_select(0, order).long()
        values = codes.values.index_select(0, order).float()
        tokens = codes.pattern.tokens.index_select(0, order)
        where = positions.to(values.device).index_select(0, tokens)
        high = latents << _KEY_BITS
        ranks = (high | _largest_first(values), high | self._drawn(latents, where))
        bests = (self.top, self.sample)
        may = [b.may_hold(r, latents) for b, r in zip(bests, ranks, strict=True)]
        at = ((may[0] | may[1]) & (values > 0)).nonzero().squeeze(-1)
        windows = self._windows(at, latents, where, values)
        for best, rank, mask in zip(bests, ranks, may, strict=True):
            own = mask[at]
            chosen = at[own]
            best.add(
                Entries(
                    ranks=rank[chosen],
                    positions=where[chosen],
                    values=values[chosen],
                    windows=windows[own],
                )
            )

    def result(self) -> CollectedExamples:
        """The examples so far."""
        top, sample = self.top.entries(), self.sample.entries()
        latents = [e.ranks >> _KEY_BITS for e in (top, sample)]
        bins, shown = self._quantiles(sample, latents[1])
        entries = Entries.cat([top, sample[shown]])
        columns = {
            "latents": torch.cat([latents[0], latents[1][shown]]),
            "quantiles": torch.cat([torch.full_like(latents[0], -1), bins[shown]]),
            "values": entries.values,
            "positions": entries.positions,
            "windows": entries.windows,
        }
        groups = columns["latents"] * (self.settings.n_quantiles + 1) + columns["quantiles"] + 1
        order = order_by(groups, _largest_first(entries.values), entries.positions)
        columns = {name: column[order].cpu() for name, column in columns.items()}
        return CollectedExamples(
            **columns,
            kinds=(columns["quantiles"] >= 0).long(),
            ranks=index_in_group(groups[order]).cpu(),
            d_sae=self.d_sae,
            context_size=self.context_size,
            settings=self.settings,
        )

    def _quantiles(
        self, sample: Entries, latents: Int[Tensor, " n"]
    ) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
        """The bin of each sampled token, and whether it is among the first drawn of its bin."""
        n_bins = self.settings.n_quantiles
        counts = torch.bincount(latents, minlength=self.d_sae)[latents]
        rising = order_by(latents, sample.values, sample.positions)
        places = torch.empty_like(latents)
        places[rising] = index_in_group(latents[rising])
        bins = torch.div(places * n_bins, counts, rounding_mode="floor")
        # Entries stand in the order in which they were drawn, which a stable sort keeps.
        groups, order = (latents * n_bins + bins).sort(stable=True)
        shown = torch.zeros_like(latents, dtype=torch.bool)
        shown[order] = index_in_group(groups) < self.settings.n_per_quantile
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
        """A random key of each entry, for bottom-k sampling: of the seed, latent and position."""
        return (_mixed(positions + self.salts.index_select(0, latents)) >> (64 - _KEY_BITS)) & _MASK

    def _check(self, codes: SparseCodes, positions: Tensor) -> None:
        if codes.pattern.d_sae != self.d_sae or codes.batch != len(positions):
            raise ValueError(
                f"codes are [{codes.batch}, {codes.pattern.d_sae}] with {len(positions)} positions;"
                f" they must have {self.d_sae} latents and one position for each row."
            )


def _largest_first(values: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Keys of 31 bits in the opposite order of floats of 0 or more."""
    # The bits of floats that are not negative are in the order of the floats.
    return (2**31 - 1) - values.clamp(min=0).contiguous().view(torch.int32).long()


def _mixed(x: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """A bijection of 64 bits that looks random: of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = x * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, n: int) -> Tensor:
    """To the right, without the copies of the sign that `>>` brings in."""
    return (x >> n) & (2 ** (64 - n) - 1)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
