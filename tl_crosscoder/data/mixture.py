"""Several texts as one, each with its share of the tokens, streamed.

At every step the component furthest behind its share gives the next document, so shares are exact
to a document and nothing is drawn at random; the seed decides the order within each component and
which documents are held out. Limit: a component that ends is read again, in another order;
`SplitText.n_passes` counts how often.
Source: the mixtures of Minder et al. 2025 and of Kassem et al. 2026.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tl_crosscoder.config.inputs import Masks, TextSource
from tl_crosscoder.data.chat import EncodedDocument, encode_stream
from tl_crosscoder.data.documents import content_hash, is_held_out, stream_documents
from tl_crosscoder.data.records import BadDocuments, Document
from tl_crosscoder.data.tokens import Packer, TokenizedText


@dataclass(frozen=True, kw_only=True)
class SplitText:
    """Contexts to train on and contexts to measure on."""

    training: TokenizedText
    held_out: TokenizedText
    held_out_documents: list[Document]
    """The documents that `held_out` was made of, in its order."""
    n_passes: dict[str, int] = field(default_factory=dict)
    """How often the training documents of each component of a mixture were begun."""
    n_documents: int = 0
    """Documents that were read, each once; 0 where contexts were given."""
    n_repeated: int = 0
    """How many of these have the content of an earlier one."""

    def describe(self) -> str:
        """One line: the training text, and how many documents are repeated."""
        repeated = (
            f"; {self.n_repeated:,} of {self.n_documents:,} documents are repeated"
            if self.n_repeated
            else ""
        )
        return self.training.describe() + repeated


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
) -> SplitText:
    """Read a mixture until there are `n_tokens` to train on and `n_held_out_tokens` to measure on.

    Args:
        sources: the components and their weights: shares of the training tokens.
        tokenizer: of the models.
        context_size: positions a context.
        n_tokens: kept tokens to read for training.
        n_held_out_tokens: kept tokens to hold out; fewer where the components are short.
        held_out: share of the documents that are held out.
        masks: see `tokenize`.
        pack: see `tokenize`.
        seed: of the split and of the order of documents.
        show_progress: with a progress bar.

    Raises:
        ValueError: a component without text, or as `tokenize` does.
        FileNotFoundError: a component that does not exist.
    """
    mixture = _Mixture(sources, tokenizer, share=held_out, seed=seed)
    documents: list[Document] = []

    def held_out_documents() -> Iterator[EncodedDocument]:
        for encoded in mixture.documents(held_out=True):
            documents.append(encoded.document)
            yield encoded

    def packed(
        stream: Iterator[EncodedDocument], max_tokens: int, description: str
    ) -> TokenizedText:
        packer = Packer(tokenizer, context_size=context_size, pack=pack, masks=masks)
        shown = description if show_progress else None
        return packer.packed(stream, max_tokens, description=shown)

    measured = packed(held_out_documents(), n_held_out_tokens, "Reading held-out text")
    training = packed(mixture.documents(held_out=False), n_tokens, "Reading text")
    mixture.warn()
    return SplitText(
        training=training,
        held_out=measured,
        held_out_documents=documents,
        n_passes={s.name or s.text: n for s, n in zip(sources, mixture.n_passes, strict=True)},
        n_documents=mixture.n_documents,
        n_repeated=mixture.n_documents - len(mixture.contents),
    )


class _Mixture:
    """Streams of several sources, split by `is_held_out`, and interleaved by their weights."""

    def __init__(
        self, sources: Sequence[TextSource], tokenizer: Any, *, share: float, seed: int
    ) -> None:
        self.sources, self.tokenizer, self.share, self.seed = sources, tokenizer, share, seed
        self.n_passes = [0] * len(sources)
        self.n_documents = 0
        self.contents: set[int] = set()
        """Hashes of the documents of both sides, each read once."""
        self._bad = [BadDocuments(source.on_bad_document) for source in sources]

    def warn(self) -> None:
        """Say which documents were left out; one that was read again counts again."""
        for source, bad in zip(self.sources, self._bad, strict=True):
            bad.warn(source.name or source.text)

    def documents(self, *, held_out: bool) -> Iterator[EncodedDocument]:
        """Documents of one side of the split.

        A held-out source that ends is dropped from then on; a training source begins again.
        """
        stream_of = self._once if held_out else self._endless
        streams = {i: stream_of(i) for i in range(len(self.sources))}
        n_read = [0] * len(self.sources)
        while streams:
            behind = min(streams, key=lambda i: (n_read[i] / self.sources[i].weight, i))
            encoded = next(streams[behind], None)
            if encoded is None:
                del streams[behind]
                continue
            yield encoded
            n_read[behind] += len(encoded.ids)

    def _once(self, i: int, *, held_out: bool = True) -> Iterator[EncodedDocument]:
        """Each document of one side once, in an order of this pass and source."""
        # Orders differ, also where two sources read one file; the split is the same for all, so
        # that a document of two sources is on one side.
        seed = self.seed + 1_000_003 * i + self.n_passes[i]
        every = stream_documents(self.sources[i], seed=seed, bad=self._bad[i])
        documents = (
            d for d in every if is_held_out(d, share=self.share, seed=self.seed) == held_out
        )
        if held_out or self.n_passes[i] == 1:
            documents = self._counted(documents)
        yield from encode_stream(documents, self.tokenizer, bad=self._bad[i])

    def _counted(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            self.n_documents += 1
            self.contents.add(content_hash(document, by_prompt=False))
            yield document

    def _endless(self, i: int) -> Iterator[EncodedDocument]:
        """Training documents, read again and again. Raises ValueError where there are none."""
        is_empty = False
        while not is_empty:
            is_empty = True
            self.n_passes[i] += 1
            for encoded in self._once(i, held_out=False):
                is_empty = False
                yield encoded
        name = self.sources[i].name or self.sources[i].text
        raise ValueError(
            f"there is no text to train on in {name!r}: it is empty, whitespace, or all held out. "
            "Give more text or a smaller held_out."
        )
