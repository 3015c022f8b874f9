"""Items made ahead in a thread while the caller works on the one before.

Contract: the same items in the same order as without; an error of the maker is raised where its
item would have come; closing the iterator ends the thread. Limit: Python code of both sides shares
one core; tensor work and reading do not.

Shuffled batches of activations, live or from a cache, from any position on.

The order is a function of the seed alone. Each pass over the text draws a permutation of its
contexts; `buffer_contexts` of them at a time are harvested or read, and their rows dealt out in
random order. So a position is three integers, a run that resumes fills one buffer again and
continues with the same bits, and a cache deals the batches that the models would. Limit: the rows
that do not fill a buffer's last batch are left out of that pass.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

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
    """`items`, up to `n` of them ahead; with 0 they are made when asked for."""
    if n <= 0:
        yield from items
        return
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=n)
    stopped = threading.Event()

    def make() -> None:
        try:
            for item in items:
                if not _put(ready, (item, None), stopped):
                    return
            _put(ready, (_END, None), stopped)
        except BaseException as error:  # whatever it is, the caller's side raises it
            _put(ready, (_END, error), stopped)

    thread = threading.Thread(target=make, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()
        thread.join()


def _put(ready: queue.Queue[Any], item: Any, stopped: threading.Event) -> bool:
    """Wait for a place; False if nobody waits for items any more."""
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in the stream of batches a run stands: the next batch to be dealt."""

    n_passes: int = 0
    """Complete passes over the text."""
    buffer: int = 0
    """Index of the buffer within the pass."""
    batch: int = 0
    """Index of the batch within the buffer."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Which part of every pass a loader deals: several processes share the contexts out."""

    rank: int = 0
    n_workers: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.n_workers:
            raise ValueError(f"worker {self.rank} is not one of {self.n_workers}, counted from 0.")


class ActivationLoader:
    """Deals batches of rows without end, shaped as `row_shape` says; see the module for the order.

    Args:
        source: models, or a cache.
        text: the contexts; of a cache, those that it holds or some of them.
        batch_size: rows a batch.
        buffer_contexts: contexts whose rows are shuffled together.
        harvest_batch_size: contexts a forward pass.
        seed: of the order.
        prefetch: batches made ahead in a thread; 0 makes each when it is asked for.
        worker: which of several processes this is; the parts of all are disjoint and complete.

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
        worker: Worker | None = None,
    ) -> None:
        self.worker = worker or Worker()
        if text.context_size > source.n_ctx:
            raise ValueError(
                f"contexts of {text.context_size} tokens are longer than the {source.n_ctx} that "
                "the models take. Choose a smaller context_size."
            )
        n_own = text.n_tokens // self.worker.n_workers
        if n_own < batch_size:
            raise ValueError(
                f"one batch is {batch_size:,} tokens, but the text has only {n_own:,} that "
                "count (for each worker). Give more text or a smaller batch_size."
            )
        self.source, self.text, self.batch_size, self.seed = source, text, batch_size, seed
        self.harvest_batch_size, self.prefetch = harvest_batch_size, prefetch
        # Two batches a buffer at least: a smaller one would leave most of its rows out.
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
                n_rows, take = self._buffer(contexts[b])
                order = torch.randperm(n_rows, generator=_generator(self.seed, n_passes, b))
                for i in range(batch, n_rows // self.batch_size):
                    after = Position(n_passes=n_passes, buffer=b, batch=i + 1)
                    yield take(order[i * self.batch_size : (i + 1) * self.batch_size]), after
                    n_dealt += 1
                del take
                batch = 0
            if not n_dealt and not buffer:
                raise ValueError(
                    f"no buffer of {self.buffer_contexts} contexts has a batch of "
                    f"{self.batch_size:,} tokens: the norm limits {self.text.norm_limits} leave "
                    "out too many. Raise max_norm_multiple or buffer_contexts."
                )
            n_passes, buffer = n_passes + 1, 0

    def _order(self, n_passes: int) -> Tensor:
        """Contexts of a pass, in their order; of this worker."""
        order = torch.randperm(len(self.text), generator=_generator(self.seed, n_passes))
        return order[self.worker.rank :: self.worker.n_workers]

    def _buffer(self, contexts: Tensor) -> tuple[int, Callable[[Tensor], Tensor]]:
        """How many rows the contexts of a buffer have, and what gives some of them by number.

        Of a cache only the places are known, and a batch is read when it is due.
        """
        text = self.text[contexts]
        if self.source.cache_id is None or text.norm_limits is not None:
            rows = self._rows(text)
            return len(rows), lambda chosen: rows.index_select(0, chosen.to(rows.device))
        stored = cast(StoredRows, self.source)
        parts = batches_of(text, self.harvest_batch_size)
        places = torch.cat([stored.places(part) for _, part in parts])
        return len(places), lambda chosen: stored.read(places[chosen])

    def _rows(self, text: TokenizedText) -> Float[Tensor, "tokens *row"]:
        """Rows of one buffer, written to one place as they come: one copy in memory."""
        start, shape = 0, (text.n_tokens, *row_shape(self.source.sites))
        rows = torch.empty(shape, device=self.source.device)
        for part in harvest_rows(self.source, text, batch_size=self.harvest_batch_size):
            rows[start : start + len(part)] = part
            start += len(part)
        return rows[:start]


def _generator(*key: int) -> torch.Generator:
    """A generator for this key; nearby keys give unrelated streams."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
