"""Text for a model pair: documents, held-out split, and contexts of token ids without padding.

A document is `{"text": str}` or `{"messages": [{"role", "content"}, ...]}`, with an optional
`"source"` that names where it comes from. Tokens are made once; both models read the same ids.
Limit: documents are held in memory.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from jinja2 import TemplateError
from torch import Tensor
from tqdm.auto import tqdm

from tl_crosscoder.tokenization import encode, own_bos_id

Document = Mapping[str, Any]

SEPARATOR = "<|endoftext|>"
MAX_STREAMED_DOCUMENTS = 100_000
"""Documents of a `datasets` name that are read where no limit is given: they are held in memory."""
MAX_SOURCES = 64
"""Firing is counted for each source and latent, so sources cannot be as many as documents."""
_SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """Contexts of token ids, which of their positions count, and where each token comes from."""

    tokens: Int[Tensor, "contexts pos"]
    mask: Bool[Tensor, "contexts pos"]
    """False at BOS and at the first position, whose norms dwarf all others (attention sink)."""
    source_ids: Int[Tensor, "contexts pos"]
    """Index into `sources` of the document that a token belongs to."""
    sources: tuple[str, ...]

    def __len__(self) -> int:
        """Number of contexts."""
        return len(self.tokens)

    @property
    def context_size(self) -> int:
        """Tokens a context."""
        return self.tokens.shape[1]

    @property
    def n_tokens(self) -> int:
        """Tokens that count."""
        return int(self.mask.sum())

    def __getitem__(self, index: Any) -> "TokenizedText":
        """Some of the contexts."""
        return TokenizedText(
            tokens=self.tokens[index],
            mask=self.mask[index],
            source_ids=self.source_ids[index],
            sources=self.sources,
        )


def load_documents(
    source: str | Path | Sequence[str | Document],
    *,
    text_column: str = "text",
    max_documents: int | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
) -> list[Document]:
    """Documents from a file, a folder, a `datasets` name, or a list of strings or documents.

    Text files hold documents separated by `<|endoftext|>`, or else by blank lines. JSONL and
    parquet rows have a `messages` column (chats) or `text_column`. A folder is read file by file,
    in the order of names. Documents without text are left out. Of a `datasets` name, streamed,
    at most `max_documents` are read, or else `MAX_STREAMED_DOCUMENTS`.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without text in it.
        ValueError: a column that does not exist, or nothing but empty text.
    """
    if isinstance(source, (str, Path)):
        if _is_hub_name(source):
            rows = _read_dataset(str(source), dataset_config, dataset_split, text_column)
            max_documents = max_documents or MAX_STREAMED_DOCUMENTS
        else:
            rows = _read(Path(source), text_column)
    else:
        rows = ({"text": d} if isinstance(d, str) else d for d in source)
    rows = (r for r in rows if _has_text(r))
    documents = list(islice(rows, max_documents))
    if not documents:
        name = source if isinstance(source, (str, Path)) else "the list of documents"
        raise ValueError(f"there is no text in {name}: every document is empty or whitespace.")
    return documents


def split_documents(
    documents: Sequence[Document], *, held_out: float = 0.1, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Shuffled documents for training, and a share of them kept for measuring.

    Raises:
        ValueError: fewer than two documents, which cannot be split.
    """
    if len(documents) < 2:
        raise ValueError(
            f"the text has {len(documents)} document; at least 2 are needed to keep some for "
            "measuring. Separate documents by blank lines or '<|endoftext|>', or give more text."
        )
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    n_held_out = min(max(1, round(held_out * len(documents))), len(documents) - 1)
    shuffled = [documents[i] for i in order]
    return shuffled[n_held_out:], shuffled[:n_held_out]


def tokenize(
    documents: Sequence[Document], tokenizer: Any, *, context_size: int, show_progress: bool = False
) -> TokenizedText:
    """Pack documents into full contexts, each beginning with BOS; the last partial one is dropped.

    Every document begins with BOS too. A tokenizer without BOS gets none. Chats go through the
    tokenizer's chat template.

    Raises:
        ValueError: chats without a template, or text shorter than one context.
    """
    if context_size < 2:
        raise ValueError(f"context_size is {context_size}; it must be 2 or more.")
    sources = _source_names(documents)
    index = {source: i for i, source in enumerate(sources)}
    bos = own_bos_id(tokenizer)
    ids: list[int] = []
    origins: list[int] = []
    for document in tqdm(documents, desc="Tokenising", unit="doc", disable=not show_progress):
        own = document_ids(document, tokenizer)
        ids += own
        origins += [index.get(_source_of(document), len(sources) - 1)] * len(own)
    rows, origin_rows = _pack(ids, origins, bos=bos, context_size=context_size)
    if not rows:
        raise ValueError(
            f"the text has only {len(ids):,} tokens, fewer than one context of {context_size}. "
            "Give more text or a smaller context_size."
        )
    tokens = torch.tensor(rows, dtype=torch.long)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    if bos is not None:
        mask &= tokens != bos
    return TokenizedText(
        tokens=tokens,
        mask=mask,
        source_ids=torch.tensor(origin_rows, dtype=torch.long),
        sources=sources,
    )


def document_ids(document: Document, tokenizer: Any) -> list[int]:
    """Token ids of one document, beginning with exactly one BOS where the tokenizer has one."""
    if "messages" in document:
        if not tokenizer.chat_template:
            raise ValueError(
                "the text holds chats ('messages'), but the tokenizer has no chat template. Set "
                "tokenizer.chat_template, or give the chats as plain text under 'text'."
            )
        messages = list(document["messages"])
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            raise ValueError(
                f"the tokenizer's chat template refuses a chat of {_source_of(document)!r} "
                f"({error}; its roles are {[m.get('role') for m in messages]}). Remove or merge "
                "these turns."
            ) from error
    else:
        text = document["text"]
    return encode(tokenizer, text, prepend_bos=True)


def _source_of(document: Document) -> str:
    return str(document.get("source", "text"))


def _source_names(documents: Sequence[Document]) -> tuple[str, ...]:
    """Sources in the order of the text; of more than `MAX_SOURCES`, the rarest are one, `other`."""
    counts = Counter(map(_source_of, documents))
    if len(counts) <= MAX_SOURCES:
        return tuple(counts)
    common = {name for name, _ in counts.most_common(MAX_SOURCES - 1)}
    return (*(name for name in counts if name in common), "other")


def _pack(
    ids: list[int], origins: list[int], *, bos: int | None, context_size: int
) -> tuple[list[list[int]], list[list[int]]]:
    rows, origin_rows, start = [], [], 0
    while start < len(ids):
        prefix = [] if bos is None or ids[start] == bos else [bos]
        end = start + context_size - len(prefix)
        if end > len(ids):
            break
        rows.append(prefix + ids[start:end])
        origin_rows.append(origins[start : start + len(prefix)] + origins[start:end])
        start = end
    return rows, origin_rows


def _has_text(row: Document) -> bool:
    if "messages" in row:
        return any(str(m.get("content") or "").strip() for m in row["messages"])
    return bool(str(row.get("text") or "").strip())


def _is_hub_name(source: str | Path) -> bool:
    path = Path(source)
    is_path_like = path.suffix in _SUFFIXES or str(source).startswith((".", "/", "~"))
    return isinstance(source, str) and not path.exists() and not is_path_like and "\\" not in source


def _read(path: Path, text_column: str) -> Iterable[Document]:
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES)
        if not paths:
            raise FileNotFoundError(f"the folder {path} holds no {', '.join(_SUFFIXES)} file.")
        return (row for p in paths for row in _read_file(p, text_column))
    if path.is_file():
        return _read_file(path, text_column)
    raise FileNotFoundError(f"there is no text file or folder {path} (from {Path.cwd()}).")


def _read_file(path: Path, text_column: str) -> Iterable[Document]:
    if path.suffix == ".txt":
        text = path.read_text(encoding="utf-8")
        separator = SEPARATOR if SEPARATOR in text else "\n\n"
        return ({"text": part.strip(), "source": path.stem} for part in text.split(separator))
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path} is not one of {', '.join(_SUFFIXES)}.")
    from datasets import load_dataset

    kind = "json" if path.suffix == ".jsonl" else "parquet"
    rows = load_dataset(kind, data_files=str(path), split="train", streaming=True)
    return _rows(rows, text_column, name=str(path), source=path.stem)


def _read_dataset(
    name: str, config: str | None, split: str, text_column: str
) -> Iterable[Document]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = load_dataset(name, config, split=split, streaming=True)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(
            f"{name!r} is neither a file nor a folder here, and not a dataset that the hub gives "
            f"({error}). Check the path, the dataset's name, config and split, and the network; a "
            "gated dataset needs `hf auth login`."
        ) from error
    return _rows(rows, text_column, name=name, source=name)


def _rows(rows: Iterable[Any], text_column: str, *, name: str, source: str) -> Iterable[Document]:
    for row in rows:
        if row.get("messages"):
            yield {"messages": row["messages"], "source": row.get("source") or source}
        elif text_column in row:
            yield {"text": row[text_column], "source": row.get("source") or source}
        else:
            raise ValueError(
                f"{name} has no column {text_column!r} and no 'messages'; it has {sorted(row)}. "
                "Name the column with text_column (--text-column)."
            )
