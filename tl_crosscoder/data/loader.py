"""Shuffled batches of activations, live or from a cache, from any position on.

The order is a function of the seed alone. Each pass over the text draws a permutation of its
contexts; `buffer_contexts` of them at a time are harvested or read, and their rows `[batch, *row]`
are dealt in random order. So a position is three integers, a resumed run fills one buffer again and
continues with the same bits, and a cache deals the batches that the models would. Limit: rows that
do not fill the last batch of a buffer are left out of that pass.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.data.harvest import batches_of, harvest_rows
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.site import row_shape
from tl_crosscoder.models.source import ActivationSource, StoredRows

T = TypeVar("T")
_END = object()


def prefetched(items: Iterator[T], n: int) -> Generator[T, None, None]:
    """`items` in their order, up to `n` of them made ahead in a thread; 0 makes each on request.

    An error of the maker is raised in place of its item, and closing the iterator ends the thread.
    Python code of both threads shares one core; tensor work and reading do not.
    """
    if n <= 0:
        yield from items
        return
    maker = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ahead = deque(maker.submit(next, items, _END) for _ in range(n))
        while (item := ahead.popleft().result()) is not _END:
            ahead.append(maker.submit(next, items, _END))
            yield cast(T, item)
    finally:
        maker.shutdown(cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place in the stream of batches: the next batch to be dealt."""

    n_passes: int = 0
    """Complete passes over the text."""
    buffer: int = 0
    """Index of the buffer within the pass."""
    batch: int = 0
    """Index of the batch within the buffer."""


class ActivationLoader:
    """Deals batches of rows without end, shaped as `row_shape` says; see the module for the order.

    Args:
        source: models, or a cache.
        text: the contexts; for a cache, some or all of those that it holds.
        batch_size: rows a batch.
        buffer_contexts: contexts whose rows are shuffled together.
        harvest_batch_size: contexts a forward pass.
        seed: of the order.
        prefetch: batches made ahead in a thread; 0 makes each on request.

    Raises:
        ValueError: contexts longer than the models take, or text too short for one batch.
    """

    def __init__(
        self,
        source: ActivationSource,
        text: TokenizedText,
        *,
        batch_size: int,
        buffer_contexts: int = 256,
        harvest_batch_size: int = 32,
        seed: int = 0,
        prefetch: int = 0,
    ) -> None:
        if text.context_size > source.n_ctx:
            raise ValueError(
                f"contexts of {text.context_size} tokens are longer than the {source.n_ctx} that "
                "the models take. Choose a smaller context_size."
            )
        if text.n_tokens < batch_size:
            raise ValueError(
                f"one batch is {batch_size:,} tokens, but the text has only {text.n_tokens:,} kept "
                "tokens. Give more text or a smaller batch_size."
            )
        self.source, self.text, self.batch_size, self.seed = source, text, batch_size, seed
        self.harvest_batch_size, self.prefetch = harvest_batch_size, prefetch
        # At least two batches a buffer: a smaller one would leave out most of its rows.
        tokens_per_context = text.n_tokens / len(text)
        self.buffer_contexts = max(buffer_contexts, round(2 * batch_size / tokens_per_context) + 1)

    def batches(
        self, start: Position | None = None
    ) -> Generator[tuple[Float[Tensor, "batch *row"], Position], None, None]:
        """Batches from `start` on, each with the position of the batch that follows it.

        Close the iterator (`contextlib.closing`) to end the thread that makes them ahead.
        """
        return prefetched(self._batches(start or Position()), self.prefetch)

    def _batches(self, start: Position) -> Iterator[tuple[Tensor, Position]]:
        n_passes, buffer, batch = start.n_passes, start.buffer, start.batch
        while True:
            contexts = self._order(n_passes).split(self.buffer_contexts)
            n_dealt = 0
            for b in range(buffer, len(contexts)):
                generator = _generator(self.seed, n_passes, b)
                n_batches, deal = self._buffer(contexts[b], generator)
                for i in range(batch, n_batches):
                    yield deal(i), Position(n_passes=n_passes, buffer=b, batch=i + 1)
                    n_dealt += 1
                del deal
                batch = 0
            if not n_dealt and not buffer:
                raise ValueError(
                    f"no buffer of {self.buffer_contexts} contexts has a batch of "
                    f"{self.batch_size:,} tokens: the norm limits {self.text.norm_limits} leave "
                    "out too many. Raise max_norm_multiple or buffer_contexts."
                )
            n_passes, buffer = n_passes + 1, 0

    def _order(self, n_passes: int) -> Tensor:
        """Contexts of a pass, in their order."""
        return torch.randperm(len(self.text), generator=_generator(self.seed, n_passes))

    def _buffer(
        self, contexts: Tensor, generator: torch.Generator
    ) -> tuple[int, Callable[[int], Tensor]]:
        """Number of batches of some contexts, and a function that gives one by its number.

        From a cache only the places of the rows are looked up here; each batch is read when it is
        due, so that a buffer takes no memory.
        """
        text = self.text[contexts]
        if not self._reads(text):
            rows = self._rows(text)
            chosen = self._chosen(len(rows), generator)
            return len(chosen), lambda i: rows.index_select(0, chosen[i].to(rows.device))
        stored = cast(StoredRows, self.source)
        parts = batches_of(text, self.harvest_batch_size)
        places = torch.cat([stored.places(part) for _, part in parts])
        chosen = self._chosen(len(places), generator)
        return len(chosen), lambda i: stored.read(places[chosen[i]])

    def _reads(self, text: TokenizedText) -> bool:
        """Whether rows are read one by one, and not made for a whole buffer."""
        return self.source.reads_by_row and text.norm_limits is None

    def _chosen(self, n_rows: int, generator: torch.Generator) -> list[Tensor]:
        """Numbers of the rows of each batch."""
        order = torch.randperm(n_rows, generator=generator)
        return [*order[: n_rows - n_rows % self.batch_size].split(self.batch_size)]

    def _rows(self, text: TokenizedText) -> Float[Tensor, "tokens *row"]:
        """Rows of one buffer. They are written into one tensor: `cat` would hold them twice."""
        start, shape = 0, (text.n_tokens, *row_shape(self.source.sites))
        rows = torch.empty(shape, device=self.source.device)
        for part in harvest_rows(self.source, text, batch_size=self.harvest_batch_size):
            rows[start : start + len(part)] = part
            start += len(part)
        return rows[:start]


def _generator(*key: int) -> torch.Generator:
    """A generator for a key; `SeedSequence` makes those of nearby keys unrelated."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
