"""`Window`: a piece of text that a latent is active in, or is not, for a judge to tell which.

Contract: windows are of one shape (`n_before` tokens, one, `n_after`) and come from other contexts
than those that names are made from, at most one of a kind from a context; none is a text that the
judge has seen. Those with the latent are spread over the quantiles of its codes. Limit: contexts of
packed text may share a document with their neighbours.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_crosscoder.activations.text import TokenizedText
from tl_crosscoder.analysis.active_tokens import ActiveTokens
from tl_crosscoder.analysis.token_pieces import TokenPieces


@dataclass(frozen=True, kw_only=True)
class Window:
    """A piece of a context."""

    text: str
    is_active: bool
    """The latent is active on at least one of its tokens."""
    context: int
    position: int
    """Of the token that it was cut around."""


@dataclass(frozen=True, kw_only=True)
class WindowSettings:
    """How many windows of each latent, and of what size."""

    n_active: int = 20
    """Windows with the latent."""
    n_inactive: int = 20
    """Windows without it."""
    n_hard: int = 0
    """Of those without it, so many in which another of the judged latents is active."""
    n_quantiles: int = 5
    """Bins of equal counts that those with the latent are spread over."""
    n_before: int = 16
    n_after: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_active", "n_inactive", "n_quantiles"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if not 0 <= self.n_hard <= self.n_inactive:
            raise ValueError(
                f"n_hard is {self.n_hard}; it must be 0 to n_inactive, {self.n_inactive}."
            )


def is_for_scoring(context: int) -> bool:
    """Names are made from contexts of even numbers, and scored on those of odd ones."""
    return context % 2 == 1


class WindowSampler:
    """Draws windows of latents from one text.

    Args:
        active: active tokens of all judged latents.
        text: the same text.
        tokenizer: of the text.
        settings: how many.
    """

    def __init__(
        self, active: ActiveTokens, text: TokenizedText, tokenizer: Any, settings: WindowSettings
    ) -> None:
        self.active, self.text, self.settings = active, text, settings
        self._pieces = TokenPieces(tokenizer)
        scored = torch.tensor([is_for_scoring(i) for i in range(len(text))], dtype=torch.bool)
        self._counted = (active.counted & scored[:, None]).flatten()

    def draw(
        self, latent: int, *, others: Sequence[int] = (), seen: Collection[str] = ()
    ) -> list[Window]:
        """Windows with a latent and without it, shuffled; fewer where the text has no more.

        Args:
            latent: which.
            others: latents that hard windows may be of.
            seen: texts that are left out.
        """
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed + latent)
        used = set(seen)
        found = self._with(latent, generator, used)
        silent = self._counted & ~self._near(latent)
        hard = torch.zeros_like(silent)
        for other in set(others) - {latent}:
            hard[self.active.of(other)[0]] = True
        for pool, n in (
            (silent & hard, settings.n_hard),
            (silent, settings.n_inactive - settings.n_hard),
        ):
            order = _one_a_context(pool.nonzero().squeeze(1), self._size, generator)
            found += self._first(n, order, is_active=False, used=used)
        return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]

    @property
    def _size(self) -> int:
        return self.text.context_size

    def _with(self, latent: int, generator: torch.Generator, used: set[str]) -> list[Window]:
        """Bin by bin, the tokens of a bin in a random order."""
        positions, values = self.active.of(latent)
        at = self._counted[positions].nonzero().squeeze(1)
        at = at[torch.randperm(len(at), generator=generator)]
        at = at[_first_of_each(positions[at] // self._size)]
        rising = torch.empty_like(at)
        rising[values[at].argsort(stable=True)] = torch.arange(len(at))
        n, n_bins = self.settings.n_active, self.settings.n_quantiles
        bins = rising * n_bins // max(1, len(at))
        found = []
        for b in range(n_bins):
            own = positions[at[bins == b]]
            n_own = n * (b + 1) // n_bins - n * b // n_bins
            found += self._first(n_own, own, is_active=True, used=used)
        return found

    def _first(
        self, n: int, positions: Int[Tensor, " n"], *, is_active: bool, used: set[str]
    ) -> list[Window]:
        """The first windows of new texts."""
        found: list[Window] = []
        for window in self._windows(positions, is_active):
            if len(found) == n:
                break
            if window.text not in used:
                used.add(window.text)
                found.append(window)
        return found

    def _windows(self, positions: Int[Tensor, " n"], is_active: bool) -> Iterator[Window]:
        for flat in positions.tolist():
            context, position = divmod(flat, self._size)
            length = int(self.text.lengths[context])
            pieces = self._pieces.of(self.text.tokens[context, :length].tolist())
            first = max(0, position - self.settings.n_before)
            text = "".join(pieces[first : position + 1 + self.settings.n_after])
            yield Window(text=text, is_active=is_active, context=context, position=position)

    def _near(self, latent: int) -> Bool[Tensor, " tokens"]:
        """Tokens whose window has a token on which the latent is active."""
        is_active = torch.zeros(len(self.text), self._size, dtype=torch.long)
        is_active.view(-1)[self.active.of(latent)[0]] = 1
        before = torch.nn.functional.pad(is_active.cumsum(dim=1), (1, 0))
        at = torch.arange(self._size)
        first = (at - self.settings.n_before).clamp(min=0)
        end = (at + 1 + self.settings.n_after).clamp(max=self._size)
        return (before[:, end] > before[:, first]).flatten()


def _one_a_context(
    positions: Int[Tensor, " n"], size: int, generator: torch.Generator
) -> Int[Tensor, " m"]:
    """A random token of each context, contexts in a random order."""
    shuffled = positions[torch.randperm(len(positions), generator=generator)]
    return shuffled[_first_of_each(shuffled // size)]


def _first_of_each(groups: Int[Tensor, " n"]) -> Int[Tensor, " m"]:
    """Where each group comes first, in the order of the entries."""
    _, inverse = groups.unique(return_inverse=True)
    first = torch.full((int(inverse.max()) + 1 if len(inverse) else 0,), len(groups))
    first = first.scatter_reduce(0, inverse, torch.arange(len(groups)), reduce="amin")
    return first.sort().values
