"""Several texts as one, each with its share of the tokens, streamed.

At every step the component that is furthest behind its share gives the next document, so shares are
exact to a document and nothing is drawn; the seed decides the order within each component and which
documents are held out. Source: the mixtures of Minder et al. 2025 and of Kassem et al. 2026.
Limit: a component that ends is read again, in another order; how often is reported.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tl_crosscoder.config.text import Masks, TextSource
from tl_crosscoder.data.chat import Encoded, encode_documents
from tl_crosscoder.data.documents import Document, is_held_out, stream_documents
from tl_crosscoder.data.tokens import TokenizedText, tokenize_encoded

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class MixedText:
    """A mixture as contexts, for training and held out."""

    training: TokenizedText
    held_out: TokenizedText
    held_out_documents: list[Document]
    """What `held_out` was made of, in its order."""
    n_passes: dict[str, int]
    """How often the training documents of each component were begun."""


def tokenize_mixture(
    sources: Sequence[TextSource],
    tokenizer: Any,
    *,
    context_size: int,
    n_tokens: int,
    n_held_out_tokens: int = 200_000,
    held_out: float = 0.1,
    masks: Masks | None = None,
    pack: bool = True,
    seed: int = 0,
    show_progress: bool = False,
) -> MixedText:
    """Read a mixture until so many tokens are there to train on, and so many to measure on.

    Args:
        sources: the components and their weights: shares of the tokens of training.
        tokenizer: of the models.
        context_size: positions a context.
        n_tokens: tokens that count to read for training.
        n_held_out_tokens: the same held out; fewer where the components are short.
        held_out: share of the documents that are held out.
        masks: see `tokenize`.
        pack: see `tokenize`.
        seed: of the split and of the order of documents.
        show_progress: with a progress bar.

    Raises:
        ValueError: a component without text, or as `tokenize` does.
        FileNotFoundError: a component that is not there.
    """
    how = {"context_size": context_size, "pack": pack, "masks": masks or Masks()}
    acts = [_Stream(s, tokenizer, i, share=held_out, seed=seed) for i, s in enumerate(sources)]
    kept: list[Document] = []

    def held_out_encoded() -> Iterator[Encoded]:
        for document, encoded in _mixed(acts, held_out=True):
            kept.append(document)
            yield encoded

    progress = ("Reading held-out text", "Reading text") if show_progress else (None, None)
    measured = tokenize_encoded(
        held_out_encoded(), tokenizer, **how, max_tokens=n_held_out_tokens, progress=progress[0]
    )
    every = (encoded for _, encoded in _mixed(acts, held_out=False))
    training = tokenize_encoded(every, tokenizer, **how, max_tokens=n_tokens, progress=progress[1])
    return MixedText(
        training=training,
        held_out=measured,
        held_out_documents=kept,
        n_passes={s.name: s.n_passes for s in acts},
    )


class _Stream:
    """The documents of one component, on one side of the split, tokenised a few at a time."""

    def __init__(
        self, source: TextSource, tokenizer: Any, index: int, *, share: float, seed: int
    ) -> None:
        self.source, self.tokenizer, self.seed = source, tokenizer, seed + 1_000_003 * index
        self.name = source.name or source.text
        self.weight = source.weight
        self.n_passes = 0
        self._is_held_out: Callable[[Document], bool] = lambda d: is_held_out(
            d, share=share, seed=seed
        )

    def once(self, *, held_out: bool) -> Iterator[tuple[Document, Encoded]]:
        """Each document of the side once, in an order of this pass."""
        every = stream_documents(self.source, seed=self.seed + self.n_passes)
        documents = (d for d in every if self._is_held_out(d) == held_out)
        while batch := list(islice(documents, _BATCH)):
            yield from zip(batch, encode_documents(batch, self.tokenizer), strict=True)

    def endless(self) -> Iterator[tuple[Document, Encoded]]:
        """Training documents, read again and again."""
        self.n_passes = 0
        while True:
            before, any_yet = self.once(held_out=False), False
            self.n_passes += 1
            for item in before:
                any_yet = True
                yield item
            if not any_yet:
                raise ValueError(
                    f"there is no text to train on in {self.name!r}: it is empty, whitespace, or "
                    "all held out. Give more text or a smaller held_out."
                )


def _mixed(acts: Sequence[_Stream], *, held_out: bool) -> Iterator[tuple[Document, Encoded]]:
    """Documents of all streams, each stream with its share of the tokens.

    Held-out streams that end are left out from then on; training streams begin again.
    """
    open_ = {i: s.once(held_out=True) if held_out else s.endless() for i, s in enumerate(acts)}
    read = [0] * len(acts)
    while open_:
        behind = min(open_, key=lambda i: (read[i] / acts[i].weight, i))
        item = next(open_[behind], None)
        if item is None:
            del open_[behind]
            continue
        yield item
        read[behind] += len(item[1].ids)
