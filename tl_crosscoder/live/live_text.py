"""The text of a run that Python starts: a file's name, documents, or contexts.

Contract: what is trained on, what is measured on, and documents from which the latter is made again
to the token, as a run's folder keeps them. Limit: documents and contexts are in memory.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tl_crosscoder.activation_source import ActivationSource
from tl_crosscoder.activations.documents import Document, load_documents, split_documents
from tl_crosscoder.activations.harvest import with_norm_limits
from tl_crosscoder.activations.text import TokenizedText, tokenize
from tl_crosscoder.run_text import RunText, held_out_text, text_of_run, tokens_of
from tl_crosscoder.tokenization import tokenizer_sha256
from tl_crosscoder.train.config import RunConfig

Text = str | Path | Iterable[str | Document] | TokenizedText
"""A file, folder or `datasets` name; strings or documents; or contexts."""

_LONGEST_NAME = 300


def checked_text(text: Any) -> str | Path | TokenizedText | list[Document]:
    """The text by its type, before anything is loaded.

    Raises:
        ValueError: no text, or text itself in place of a file's name.
    """
    if isinstance(text, TokenizedText | Path):
        return text
    if isinstance(text, str):
        if "\n" in text or len(text) > _LONGEST_NAME:
            raise ValueError(
                f"text is a string of {len(text):,} characters that is no name: give a file, a "
                "`datasets` name, or a list of documents such as [text_1, text_2]."
            )
        return text
    is_one = not isinstance(text, Iterable) or isinstance(text, Mapping | bytes)
    documents: list[Any] = [text] if is_one or hasattr(text, "iterrows") else [*text]
    for document in documents:
        if not _is_document(document):
            raise ValueError(
                f"the text holds a {type(document).__name__}, {repr(document)[:80]}: give a file, "
                "a `datasets` name, a list of strings or of documents ({'text': str} or "
                "{'messages': [...]}), or a TokenizedText."
            )
    found = load_documents(documents)
    split_documents(found[:2])  # refuses fewer than two
    return found


def _is_document(value: Any) -> bool:
    keys = ("text", "messages", "input_ids")
    return isinstance(value, str) or (isinstance(value, Mapping) and any(k in value for k in keys))


def read_text(
    config: RunConfig,
    models: ActivationSource,
    content: str | Path | TokenizedText | list[Document],
) -> RunText:
    """Train and held-out text of a run on these models; `content` is checked.

    Raises: as `text_of_run` does, and for contexts with other masks than those of the config.
    """
    if isinstance(content, str | Path):
        return text_of_run(config, models)
    tokenizer = models.tokenizer
    if isinstance(content, TokenizedText):
        made = _split(content, config, tokenizer)
    else:
        rest, kept = split_documents(content, held_out=config.held_out, seed=config.seed)
        n = config.n_measured_tokens
        made = RunText(
            training=tokens_of(config, rest, tokenizer),
            held_out=held_out_text(config, kept, tokenizer, n_tokens=n),
            held_out_documents=kept,
        )
    limited = with_norm_limits(
        models,
        made.training,
        multiple=config.max_norm_multiple,
        batch_size=config.harvest_batch_size,
    )
    held_out = replace(made.held_out, norm_limits=limited.norm_limits)
    return replace(made, training=limited, held_out=held_out)


def _split(text: TokenizedText, config: RunConfig, tokenizer: Any) -> RunText:
    """Whole contexts, at random; the held-out ones as documents of ids, which make them again.

    Raises ValueError for a single context, and for masks other than those of the config: whoever
    opens the run would measure other tokens.
    """
    if len(text) < 2:
        raise ValueError(
            f"the text has {len(text)} context; at least 2 are needed to keep some for measuring."
        )
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(config.seed))
    n_held_out = min(max(1, round(config.held_out * len(text))), len(text) - 1)
    n_measured = max(1, config.n_measured_tokens // text.context_size)
    kept = text[order[: min(n_held_out, n_measured)].sort().values]
    documents = [*_as_documents(kept, tokenizer_sha256(tokenizer))]
    how = {"context_size": text.context_size, "pack": False, "masks": config}
    again = tokenize(documents, tokenizer, **how)
    if not (torch.equal(again.tokens, kept.tokens) and torch.equal(again.dropped, kept.dropped)):
        raise ValueError(
            f"the contexts leave out other tokens ({kept.mask_counts}) than the settings of this "
            f"run say ({again.mask_counts}). Give diff the masks that they were made with, such as "
            "drop_template=True."
        )
    rest = text[order[n_held_out:].sort().values]
    return RunText(training=rest, held_out=kept, held_out_documents=documents)


def _as_documents(text: TokenizedText, tokenizer: str) -> Iterator[Document]:
    for i, n in enumerate(text.lengths.tolist()):
        yield {
            "input_ids": text.tokens[i, :n].tolist(),
            "role_ids": text.role_ids[i, :n].tolist(),
            "source": text.sources[int(text.source_ids[i, n - 1])],
            "tokenizer": tokenizer,
        }
