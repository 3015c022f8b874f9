"""`BestEntries`: of a stream of entries, the n best of each latent.

Contract: an entry has a rank, its latent in the upper 32 bits and a key in the lower ones; the n
smallest ranks of each latent are kept, among equals the smallest positions, whatever the order in
which entries come. Limit: entries wait in a buffer as large as what is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

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
