"""The text of a run or of a cache: read, split, tokenised, masked.

Local files and the embedded text are held in memory; `datasets` names and mixtures are streamed,
and read as far as tokens are needed. All are split by a hash of each document, so that equal ones
are on one side. From Python documents or contexts will do; the held-out part is kept as documents
that make the same tokens again.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.config.inputs import CONTEXT_SIZE, OnBadDocument, TextConfig
from tl_crosscoder.config.scan import ScanConfig
from tl_crosscoder.config.training import HarvestConfig, RunConfig
from tl_crosscoder.data.chat import encode_stream
from tl_crosscoder.data.documents import (
    content_hash,
    is_dataset_name,
    load_documents,
    lowest_hashes,
    split_documents,
    stream_documents,
)
from tl_crosscoder.data.harvest import with_norm_limits
from tl_crosscoder.data.mixture import SplitText, tokenize_mixture
from tl_crosscoder.data.records import BadDocuments, Document
from tl_crosscoder.data.tokens import TokenizedText, tokenize
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.models.tokenizer import tokenizer_sha256


def check_text(config: TextConfig) -> None:
    """Read one document of every text, before models load.

    Raises:
        ValueError: no text was named, a column does not exist, or everything is empty.
        FileNotFoundError: a text that is not there.
    """
    if not config.sources:
        raise ValueError(
            "no text was given: name a file, a folder or a `datasets` name (--text), several with "
            "weights in a YAML file (mixture), or a cache (--cache)."
        )
    for source in config.sources:
        if next(stream_documents(source), None) is None:
            raise ValueError(
                f"there is no text in {source.text}: every document is empty or whitespace."
            )


def text_of_run(config: RunConfig, source: ActivationSource) -> SplitText:
    """The text of a training run. Raises as `load_documents` and `tokenize` do."""
    n_tokens = config.plan(d_model=source.d_model).n_tokens
    return _read(config, source, n_tokens=n_tokens, n_held_out=config.n_measured_tokens)


def text_of_harvest(config: HarvestConfig, source: ActivationSource) -> SplitText:
    """The text of a cache: `n_tokens` in all, the share `held_out` of them held out."""
    n_held_out = max(1, round(config.held_out * config.n_tokens))
    n_tokens = max(1, config.n_tokens - n_held_out)
    text = _read(config, source, n_tokens=n_tokens, n_held_out=n_held_out)
    per_context = text.training.n_tokens / len(text.training)
    return replace(text, training=text.training[: math.ceil(n_tokens / per_context)])


def _read(
    config: RunConfig | HarvestConfig, source: ActivationSource, *, n_tokens: int, n_held_out: int
) -> SplitText:
    if _is_streamed(config):
        made = tokenize_mixture(
            config.sources,
            source.tokenizer,
            context_size=config.context_size,
            n_tokens=n_tokens,
            n_held_out_tokens=n_held_out,
            held_out=config.held_out,
            masks=config,
            pack=config.pack,
            seed=config.seed,
            show_progress=True,
        )
    else:
        (where,) = config.sources
        made = _split(load_documents(where), config, source.tokenizer, n_held_out=n_held_out)
    return _limited(made, config, source)


def _split(
    documents: list[Document], config: RunConfig | HarvestConfig, tokenizer: Any, *, n_held_out: int
) -> SplitText:
    rest, kept = split_documents(documents, held_out=config.held_out, seed=config.seed)
    if config.on_bad_document == "skip":  # what is recorded must be read again without a policy
        bad = BadDocuments(config.on_bad_document)
        kept = [encoded.document for encoded in encode_stream(kept, tokenizer, bad=bad)]
        bad.warn("the held-out text")
    return SplitText(
        training=tokens_of(config, rest, tokenizer, show_progress=True),
        held_out=held_out_text(config, kept, tokenizer, n_tokens=n_held_out),
        held_out_documents=kept,
        n_documents=len(documents),
        n_repeated=len(documents) - len({content_hash(d, by_prompt=False) for d in documents}),
    )


def _limited(
    text: SplitText, config: RunConfig | HarvestConfig, source: ActivationSource
) -> SplitText:
    """The text without tokens above the norm limits, which its training part sets."""
    how = {"multiple": config.max_norm_multiple, "batch_size": config.harvest_batch_size}
    training = with_norm_limits(source, text.training, **how)
    held_out = replace(text.held_out, norm_limits=training.norm_limits)
    return replace(text, training=training, held_out=held_out)


def tokens_of(
    config: TextConfig, documents: list[Document], tokenizer: Any, *, show_progress: bool = False
) -> TokenizedText:
    """Documents as contexts, as a config says."""
    return tokenize(
        documents,
        tokenizer,
        context_size=config.context_size,
        pack=config.pack,
        masks=config,
        show_progress=show_progress,
        on_bad_document=config.on_bad_document,
    )


def held_out_text(
    config: TextConfig, documents: list[Document], tokenizer: Any, *, n_tokens: int
) -> TokenizedText:
    """The held-out contexts that a run is measured on, at most so many tokens."""
    text = tokens_of(config, documents, tokenizer)
    return text[: math.ceil(n_tokens / config.context_size)]


def training_prompts(
    config: RunConfig | ScanConfig,
    source: ActivationSource,
    content: TokenizedText | list[Document] | None = None,
    *,
    n: int,
) -> TokenizedText:
    """Some training documents, each in a context of its own, chats alone where there are any.

    Args:
        config: names the text where there is no content, and what of it is held out.
        source: its tokenizer is taken, and contexts are no longer than its models take.
        content: documents or contexts at hand.
        n: about so many, in an order that is a function of the seed.
    """
    if isinstance(content, TokenizedText):
        order = torch.randperm(len(content), generator=torch.Generator().manual_seed(config.seed))
        return content[order[~_held_out_contexts(content, config)[order]][:n]]
    size = min(max(config.context_size, CONTEXT_SIZE), source.n_ctx)
    if content is None and _is_streamed(config):
        made = tokenize_mixture(
            config.sources,
            source.tokenizer,
            context_size=size,
            n_tokens=n * size,
            n_held_out_tokens=1,
            held_out=config.held_out,
            masks=config,
            pack=False,
            seed=config.seed,
        )
        return made.training
    if content is None:
        (where,) = config.sources
        content = load_documents(where)
    rest, _ = split_documents(content, held_out=config.held_out, seed=config.seed)
    chats = [document for document in rest if "messages" in document]
    of_own = replace(config, context_size=size, pack=False)
    return tokens_of(of_own, (chats or rest)[:n], source.tokenizer)


def _is_streamed(config: TextConfig) -> bool:
    return bool(config.mixture) or is_dataset_name(config.text or "")


def write_documents(path: Path, documents: list[Document]) -> None:
    """Write documents as JSONL, from which `load_documents` reads them."""
    files.write_text(path, "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents))


Text = str | Path | Iterable[str | Document] | TokenizedText
"""A file, folder or `datasets` name; strings or documents; or contexts."""

_LONGEST_NAME = 300


def checked_text(
    text: Any, *, on_bad_document: OnBadDocument = "error"
) -> str | Path | TokenizedText | list[Document]:
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
    found = load_documents(documents, on_bad_document=on_bad_document)
    if len(found) < 2 or all(document == found[0] for document in found):
        split_documents(found)  # refuses fewer than two
    return found


def _is_document(value: Any) -> bool:
    keys = ("text", "messages", "conversations", "input_ids")
    return isinstance(value, str) or (isinstance(value, Mapping) and any(k in value for k in keys))


def text_at_hand(
    config: RunConfig, source: ActivationSource, content: TokenizedText | list[Document]
) -> SplitText:
    """Training and held-out text from documents or contexts, which are checked.

    Raises ValueError for contexts with other masks than those of the config.
    """
    if isinstance(content, TokenizedText):
        made = _split_contexts(content, config, source.tokenizer)
    else:
        made = _split(content, config, source.tokenizer, n_held_out=config.n_measured_tokens)
    return _limited(made, config, source)


def _split_contexts(text: TokenizedText, config: RunConfig, tokenizer: Any) -> SplitText:
    """Whole contexts; the held-out ones as documents of ids, which make them again.

    Raises ValueError unless two contexts differ, and for masks other than those of the config:
    whoever opens the run would measure other tokens.
    """
    is_kept = _held_out_contexts(text, config)
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(config.seed))
    n_measured = max(1, config.n_measured_tokens // text.context_size)
    kept = text[order[is_kept[order]][:n_measured].sort().values]
    documents = [*_as_documents(kept, tokenizer_sha256(tokenizer))]
    how = {"context_size": text.context_size, "pack": False, "masks": config}
    again = tokenize(documents, tokenizer, **how)
    if not (torch.equal(again.tokens, kept.tokens) and torch.equal(again.dropped, kept.dropped)):
        raise ValueError(
            f"the contexts leave out other tokens ({kept.mask_counts}) than the settings of this "
            f"run say ({again.mask_counts}). Give diff the masks that they were made with, such as "
            "drop_template=True."
        )
    rest = text[~is_kept]
    return SplitText(training=rest, held_out=kept, held_out_documents=documents)


def _held_out_contexts(
    text: TokenizedText, config: RunConfig | ScanConfig
) -> Bool[Tensor, " contexts"]:
    rows = ({"input_ids": row.tolist()} for row in text.tokens)
    hashes = [content_hash(row, seed=config.seed) for row in rows]
    sizes, share = text.mask.sum(dim=1).tolist(), config.held_out
    return torch.tensor(lowest_hashes(hashes, sizes, share=share, what="context"))


def _as_documents(text: TokenizedText, tokenizer: str) -> Iterator[Document]:
    for i, n in enumerate(text.lengths.tolist()):
        yield {
            "input_ids": text.tokens[i, :n].tolist(),
            "role_ids": text.role_ids[i, :n].tolist(),
            "source": text.sources[int(text.source_ids[i, n - 1])],
            "tokenizer": tokenizer,
        }
