"""Run models over text and keep the activations that count.

Shapes: a row is one token of one text in every site, `[n_sites, d_model]` or `[d_in]` (see
`site.row_shape`); rows never part from their sites. Contexts of unequal length run longest first,
a batch cut at its longest. Limit: one process; give each its own contexts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_crosscoder.data.tokens import REASONS, TokenizedText
from tl_crosscoder.models.site import Site, site_parts
from tl_crosscoder.models.source import ActivationSource

N_LIMIT_CONTEXTS = 16
"""Contexts on which the median norm is measured."""


@dataclass(frozen=True, kw_only=True)
class Harvested:
    """Some contexts of a text and the activations of their tokens that count."""

    index: Int[Tensor, " contexts"]
    """Which contexts of the text."""
    text: TokenizedText
    """These contexts, perhaps cut at the right; `mask` says whose the rows are, in its order."""
    rows: Float[Tensor, "tokens *row"]

    def positions(self, context_size: int) -> Int[Tensor, " tokens"]:
        """Of each row: index of its context in the text x context_size + position in it."""
        starts = self.index[:, None] * context_size
        return (starts + torch.arange(self.text.context_size))[self.text.mask]

    def split(self, n_rows: int) -> Iterator["Harvested"]:
        """Whole contexts in pieces of about so many rows, and of at least one context."""
        n = max(1, n_rows // self.text.context_size)
        counts = self.text.mask.sum(dim=1)
        parts = zip(self.index.split(n), counts.split(n), strict=True)
        done = rows = 0
        for index, own in parts:
            n_own = int(own.sum())
            text = self.text[slice(done, done + len(index))]
            yield Harvested(index=index, text=text, rows=self.rows[rows : rows + n_own])
            done, rows = done + len(index), rows + n_own


def harvest(
    source: ActivationSource,
    text: TokenizedText,
    *,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
    description: str | None = None,
) -> Iterator[Harvested]:
    """Contexts and the rows of their tokens that count, `batch_size` contexts at a time.

    Packed text comes in its own order, contexts of unequal lengths by length. A description shows
    a progress bar.
    """
    batches = batches_of(text, batch_size)
    bar = tqdm(batches, desc=description, unit="batch", disable=None if description else True)
    for index, part in bar:
        rows = source.rows(part, dtype=dtype)
        if part.norm_limits is not None:
            keep = within_limits(rows, source.sites, part.norm_limits)
            part, rows = _without_sinks(part, keep.cpu()), rows[keep]
        yield Harvested(index=index, text=part, rows=rows)


def harvest_rows(
    source: ActivationSource,
    text: TokenizedText,
    *,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Float[Tensor, "tokens *row"]]:
    """The same without the contexts."""
    for part in harvest(source, text, batch_size=batch_size, dtype=dtype):
        yield part.rows


def batches_of(
    text: TokenizedText, batch_size: int
) -> list[tuple[Int[Tensor, " contexts"], TokenizedText]]:
    """Contexts in batches of about equal lengths, each with their place in the text."""
    lengths = text.lengths
    if not len(text) or bool((lengths == text.context_size).all()):
        order = torch.arange(len(text))
    else:
        order = lengths.argsort(descending=True, stable=True)
    parts = []
    for index in order.split(batch_size):
        longest = int(lengths[index].max())
        part = text[index]
        parts.append((index, part if longest == text.context_size else part.cut(longest)))
    return parts


def with_norm_limits(
    source: ActivationSource,
    text: TokenizedText,
    *,
    multiple: float | None,
    batch_size: int = 32,
) -> TokenizedText:
    """A text whose tokens do not count where their norm, at any site, is above a limit.

    The limit of a site is `multiple` times the median norm of the tokens that count in the first
    `N_LIMIT_CONTEXTS`. None sets no limit.
    """
    if multiple is None:
        return text
    sample = torch.cat([*harvest_rows(source, text[:N_LIMIT_CONTEXTS], batch_size=batch_size)])
    medians = [part.norm(dim=-1).median().item() for part in site_parts(sample, source.sites)]
    return replace(text, norm_limits=tuple(multiple * median for median in medians))


def within_limits(
    rows: Float[Tensor, "tokens *row"], sites: Sequence[Site], limits: Sequence[float]
) -> Bool[Tensor, " tokens"]:
    """Which rows have a norm of at most the limit at every site."""
    parts = zip(site_parts(rows, sites), limits, strict=True)
    return torch.stack([part.norm(dim=-1) <= limit for part, limit in parts]).all(dim=0)


def _without_sinks(text: TokenizedText, keep: Bool[Tensor, " tokens"]) -> TokenizedText:
    dropped = text.dropped.clone()
    reasons = torch.where(keep, 0, REASONS.index("norm")).to(dropped.dtype)
    dropped[text.mask] = reasons
    return replace(text, dropped=dropped)
