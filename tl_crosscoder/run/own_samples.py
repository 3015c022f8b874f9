"""Samples of a base model: texts that it writes itself, after prompts of a run's own text.

Contract: documents as `ContrastiveSampler.sample` gives them, with the token that ended them, at
temperature 1, so that what follows the prompts is as the base predicts it. Documents that a run is
measured on give no prompts. Limit: prompts are in memory.
"""

import math
import random
from collections.abc import Iterable, Iterator
from itertools import cycle, islice

from tl_crosscoder.config.inputs import TextConfig
from tl_crosscoder.config.null import NullConfig
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.data.chat import encode_stream
from tl_crosscoder.data.contrastive import ContrastiveSampler
from tl_crosscoder.data.documents import content_hash, stream_documents
from tl_crosscoder.data.records import BadDocuments, Document
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.lora import TrainingText
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.progress import note, progress
from tl_crosscoder.results.render import wrapped

Content = TokenizedText | list[Document] | None
"""Contexts or documents in the place of the text that a config names."""


def prompt_documents(
    how: RunConfig, content: Content, n: int, *, measured: Iterable[Document] = ()
) -> list[Document]:
    """Documents of a run's text but those that it is measured on, over again where they are few.

    Raises:
        ValueError: there are none.
    """
    left_out = {content_hash(document) for document in measured}
    found: list[Document] = []
    for stream, share in _streams(how, content):
        own = (d for d in stream if content_hash(d) not in left_out)
        found += islice(own, math.ceil(share * n))
    if not found:
        raise ValueError(
            "there is no text to take prompts of: the run is measured on all of its documents. "
            "Give more text with text (--text)."
        )
    return [*islice(cycle(found), n)]


def _streams(how: RunConfig, content: Content) -> Iterator[tuple[Iterator[Document], float]]:
    """Documents of each component in an order of the seed, and its share."""
    if content is None:
        weight = sum(source.weight for source in how.sources)
        for source in how.sources:
            yield stream_documents(source, seed=how.seed), source.weight / weight
        return
    if isinstance(content, TokenizedText):
        lengths = content.lengths.tolist()
        rows = zip(content.tokens.tolist(), lengths, strict=True)
        content = [{"input_ids": row[:n]} for row, n in rows]
    yield iter(random.Random(how.seed).sample(content, len(content))), 1.0


def own_samples(
    models: ModelPair, documents: list[Document], config: NullConfig, *, how: TextConfig
) -> Iterator[Document]:
    """What the base writes after prompts of these documents, as `ContrastiveSampler.sample`.

    Raises:
        ValueError: documents that cannot be encoded, or none after which it writes.
    """
    base, tokenizer = models.compared_names[0], models.tokenizer
    bad = BadDocuments(how.on_bad_document)
    prompts = [
        encoded.document
        if "messages" in encoded.document
        else {"input_ids": encoded.ids[: config.max_prompt_tokens].tolist()}
        for encoded in encode_stream(documents, tokenizer, bad=bad)
    ]
    sampler = ContrastiveSampler(
        models,
        prompts,
        max_new_tokens=min(config.max_new_tokens, models.n_ctx // 2),
        seed=config.seed,
        sites=[base],
        with_stop=True,
    )
    n = 0
    for batch in progress(range(len(sampler.batches)), desc="Sampling", unit="batch"):
        rows = sampler.sample(batch)
        n += len(rows)
        yield from rows
    if n < len(documents):
        said = f"{n:,} of {len(documents):,} prompts gave samples; the others are too long"
        note(wrapped(f"{said}, or the base writes nothing after them."))


def training_texts(samples: list[Document]) -> list[TrainingText]:
    """Samples in an order that is none of their length."""
    rows = random.Random(0).sample(samples, len(samples))
    return [TrainingText(ids=tuple(r["input_ids"]), n_prompt=r["n_prompt_tokens"]) for r in rows]
