"""Shuffled batches of activations, harvested live, from any position on.

The order is a function of the seed alone. Each pass over the text draws a permutation of its
contexts; `buffer_contexts` of them at a time are harvested, their rows shuffled, and dealt out
in batches. So a position is three integers, and a run that resumes harvests one buffer again and
continues with the same bits. Limit: the rows that do not fill a buffer's last batch are left out
of that pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.activation_source import ActivationSource
from tl_crosscoder.activations.harvest import harvest_rows
from tl_crosscoder.activations.text import TokenizedText
from tl_crosscoder.site import row_shape


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in the stream of batches a run stands: the next batch to be dealt."""

    n_passes: int = 0
    """Complete passes over the text."""
    buffer: int = 0
    """Index of the buffer within the pass."""
    batch: int = 0
    """Index of the batch within the buffer."""


class ActivationLoader:
    """Deals batches of rows without end, shaped as `row_shape` says; see the module for the order.

    Raises ValueError for contexts longer than the models take, and text too short for one batch.
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
    ) -> None:
        if text.context_size > source.n_ctx:
            raise ValueError(
                f"contexts of {text.context_size} tokens are longer than the {source.n_ctx} that "
                "the models take. Choose a smaller context_size."
            )
        if text.n_tokens < batch_size:
            raise ValueError(
                f"one batch is {batch_size:,} tokens, but the text has only {text.n_tokens:,} that "
                "count. Give more text or a smaller batch_size."
            )
        self.source, self.text, self.batch_size, self.seed = source, text, batch_size, seed
        self.harvest_batch_size = harvest_batch_size
        # Two batches a buffer at least: a smaller one would leave most of its rows out.
        tokens_per_context = text.n_tokens / len(text)
        self.buffer_contexts = max(buffer_contexts, round(2 * batch_size / tokens_per_context) + 1)

    def batches(
        self, start: Position | None = None
    ) -> Iterator[tuple[Float[Tensor, "batch *row"], Position]]:
        """Batches from `start` on, each with the position of the batch that follows it."""
        start = start or Position()
        n_passes, buffer, batch = start.n_passes, start.buffer, start.batch
        while True:
            contexts = self._order(n_passes).split(self.buffer_contexts)
            for b in range(buffer, len(contexts)):
                rows = self._rows(contexts[b], n_passes=n_passes, buffer=b)
                for i in range(batch, len(rows) // self.batch_size):
                    after = Position(n_passes=n_passes, buffer=b, batch=i + 1)
                    # A copy: a view would keep the whole buffer while the next one is filled.
                    yield rows[i * self.batch_size : (i + 1) * self.batch_size].clone(), after
                del rows
                batch = 0
            n_passes, buffer = n_passes + 1, 0

    def _order(self, n_passes: int) -> Tensor:
        return torch.randperm(len(self.text), generator=_generator(self.seed, n_passes))

    def _rows(
        self, contexts: Tensor, *, n_passes: int, buffer: int
    ) -> Float[Tensor, "tokens *row"]:
        """Shuffled rows of one buffer, written to their places as they come: one copy in memory."""
        text = self.text[contexts]
        order = torch.randperm(text.n_tokens, generator=_generator(self.seed, n_passes, buffer))
        place, start = order.argsort().to(self.source.device), 0
        shape = (text.n_tokens, *row_shape(self.source.sites))
        rows = torch.empty(shape, device=self.source.device)
        for part in harvest_rows(self.source, text, batch_size=self.harvest_batch_size):
            rows[place[start : start + len(part)]] = part
            start += len(part)
        return rows


def _generator(*key: int) -> torch.Generator:
    """A generator for this key; nearby keys give unrelated streams."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
