"""Documents from files, folders, `datasets` names and lists, and which of them are held out.

A document is a text `{"text": str}`, a chat `{"messages": [{"role", "content"}, ...]}`, or token
ids `{"input_ids": [int], "role_ids": [int]}` (the roles are optional), each with an optional
`"source"` that names its origin. Limit: `load_documents` holds every document in memory;
`stream_documents` holds at most `SHUFFLE_BUFFER` of them.
"""

import hashlib
import json
import lzma
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tl_crosscoder import files
from tl_crosscoder.config.inputs import TextSource
from tl_crosscoder.models.pretrained import PREFIX, embedded_text

Document = Mapping[str, Any]

SEPARATOR = "<|endoftext|>"
SHUFFLE_BUFFER = 10_000
"""Number of documents among which a stream is shuffled."""
_SUFFIXES = (".txt", ".jsonl", ".parquet")


def load_documents(
    source: str | Path | TextSource | Sequence[str | Document],
    *,
    text_column: str = "text",
    max_documents: int | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
) -> list[Document]:
    """Documents from a file, a folder, a `datasets` name, or a list of strings or documents.

    A `TextSource` has the options of its own.

    Text files hold documents separated by `<|endoftext|>`, or else by blank lines. JSONL and
    parquet rows have a `messages` or `input_ids` column, or `text_column`, which may also hold
    chats. A folder is read file by file, in the order of names. Empty documents are dropped.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without text in it.
        ValueError: a column that does not exist, nothing but empty text, or a `datasets` name
            without `max_documents`, since whole datasets do not fit in memory.
    """
    if isinstance(source, str | Path):
        source = TextSource(
            text=str(source),
            text_column=text_column,
            max_documents=max_documents,
            dataset_config=dataset_config,
            dataset_split=dataset_split,
        )
    if isinstance(source, TextSource):
        name = source.text
        if is_dataset_name(name) and source.max_documents is None:
            raise ValueError(
                f"{name!r} is a dataset of the hub; say how many of its documents to hold in "
                "memory with max_documents, or stream it: tokenize_mixture([TextSource(...)])."
            )
        documents = [*stream_documents(source)]
    else:
        name = "the list of documents"
        rows = _with_text(({"text": d} if isinstance(d, str) else d for d in source), name)
        documents = [*islice(rows, max_documents)]
    if not documents:
        raise ValueError(f"there is no text in {name}: every document is empty or whitespace.")
    return documents


def stream_documents(source: TextSource, *, seed: int | None = None) -> Iterator[Document]:
    """The documents of a source, one by one; a seed shuffles them, none keeps the given order.

    Empty documents are dropped. Raises the errors of `load_documents` when the stream reaches
    their cause.
    """
    name = source.text
    # With max_documents every pass must see the same first documents, so the files keep their
    # order and only these documents are shuffled.
    file_seed = seed if source.max_documents is None else None
    if name.startswith(PREFIX):
        rows = _read_embedded(embedded_text(name))
    elif is_dataset_name(name):
        rows = _read_dataset(source, file_seed)
    else:
        rows = _read(files.user_path(name), source.text_column, file_seed)
    rows = islice(_with_text(rows, name), source.max_documents)
    if source.name is not None:
        rows = ({**row, "source": source.name} for row in rows)
    return iter(rows) if seed is None else _shuffled(rows, seed)


def split_documents(
    documents: Sequence[Document], *, held_out: float = 0.1, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents: a shuffle, of which the share `held_out` is set aside.

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


def is_held_out(document: Document, *, share: float, seed: int = 0) -> bool:
    """Whether a streamed document is held out, decided by a hash of its content.

    A split by position would leak: documents occur twice, and streams are read again. By hash a
    document is on one side in every pass and every source, and no stream is read to its end.
    Continuations of one prompt (`n_prompt_tokens`) are hashed by the prompt: one side holds all.
    """
    content = [document.get(key) for key in ("text", "messages", "input_ids")]
    if document.get("n_prompt_tokens"):
        content[2] = document["input_ids"][: document["n_prompt_tokens"]]
    key = json.dumps([seed, content], ensure_ascii=False, sort_keys=True, default=str)
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def source_of(document: Document) -> str:
    """Name of the document's origin."""
    return str(document.get("source", "text"))


def has_text(row: Document) -> bool:
    """Whether there is more than whitespace in a document."""
    if "messages" in row:
        return any(str(m.get("content") or "").strip() for m in row["messages"])
    if "input_ids" in row:
        return len(row["input_ids"]) > 0
    return bool(str(row.get("text") or "").strip())


def _with_text(rows: Iterable[Document], name: str) -> Iterator[Document]:
    """The documents that are not empty; a warning at the end counts the others."""
    n_empty = n = 0
    for row in rows:
        n += 1
        if has_text(row):
            yield row
        else:
            n_empty += 1
    if 0 < n_empty < n:
        warnings.warn(
            f"{n_empty:,} of the {n:,} documents of {name} are empty or whitespace: dropped.",
            stacklevel=2,
        )


def is_dataset_name(source: str | Path) -> bool:
    """Whether this names a dataset of the hub, not a local file or folder or embedded text."""
    path = files.user_path(source)
    if not isinstance(source, str) or path.exists() or path.suffix in _SUFFIXES:
        return False
    return "\\" not in source and not source.startswith((".", "/", "~", PREFIX))


def _read_embedded(path: Path) -> Iterator[Document]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _read(path: Path, text_column: str, seed: int | None) -> Iterable[Document]:
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES)
        if not paths:
            raise FileNotFoundError(f"the folder {path} holds no {', '.join(_SUFFIXES)} file.")
        if seed is not None:
            random.Random(seed).shuffle(paths)
        return (row for p in paths for row in _read_file(p, text_column))
    if path.is_file():
        return _read_file(path, text_column)
    raise FileNotFoundError(f"there is no text file or folder {path} (from {Path.cwd()}).")


def _read_file(path: Path, text_column: str) -> Iterable[Document]:
    if path.suffix == ".txt":
        text = path.read_text(encoding="utf-8")
        separator = SEPARATOR if SEPARATOR in text else "\n\n"
        parts = (part.strip() for part in text.split(separator))
        return ({"text": part, "source": path.stem} for part in parts if part)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path} is not one of {', '.join(_SUFFIXES)}.")
    if not path.stat().st_size:
        return ()  # `datasets` raises StopIteration at an empty file
    from datasets import load_dataset

    kind = "json" if path.suffix == ".jsonl" else "parquet"
    rows = load_dataset(kind, data_files=str(path), split="train", streaming=True)
    return _rows(rows, text_column, name=str(path), source=path.stem)


def _read_dataset(source: TextSource, seed: int | None) -> Iterable[Document]:
    from datasets import load_dataset
    from huggingface_hub.errors import HTTPError

    name = source.text
    try:
        rows = load_dataset(name, source.dataset_config, split=source.dataset_split, streaming=True)
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        # OSError: not found, gated, no network. ValueError: an unknown config or split.
        # RuntimeError: a dataset that is a script. HTTPError: a broken connection.
        raise FileNotFoundError(
            f"{name!r} is neither a file nor a folder here, and not a dataset that the hub gives "
            f"({' '.join(str(error).split())}). Check the path, the dataset's name, config and "
            "split, and the network; a gated dataset needs `hf auth login`."
        ) from error
    if seed is not None:
        rows = _file_by_file(rows, seed)
    return _rows(rows, source.text_column, name=name, source=name)


def _file_by_file(rows: Any, seed: int) -> Iterable[Any]:
    """Rows of a streamed dataset, file after file, the files shuffled by the seed.

    `IterableDataset.shuffle` (datasets 5.2) would read ten files at once, row by row, and sleep
    five seconds at the end of each pass over parquet.
    """
    files = list(range(rows.num_shards))
    random.Random(seed).shuffle(files)
    return (row for i in files for row in rows.shard(len(files), i))


def _rows(rows: Iterable[Any], text_column: str, *, name: str, source: str) -> Iterable[Document]:
    for row in rows:
        content = next((k for k in ("messages", "input_ids") if row.get(k)), text_column)
        if content not in row:
            raise ValueError(
                f"{name} has no column {text_column!r} and no 'messages'; it has {sorted(row)}. "
                "Name the column with text_column (--text-column)."
            )
        document = {"source": row.get("source") or source}
        if content == "input_ids":
            fields = ("input_ids", "role_ids", "tokenizer", "n_prompt_tokens")
            yield document | {k: row[k] for k in fields if row.get(k) is not None}
        else:
            kind = "messages" if isinstance(row[content], list) else "text"
            yield document | {kind: row[content]}


def _shuffled(documents: Iterable[Document], seed: int) -> Iterator[Document]:
    """Documents through a buffer of `SHUFFLE_BUFFER`, of which a random one leaves each time."""
    rng, buffer = random.Random(seed), []
    for document in documents:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(document)
            continue
        i = rng.randrange(SHUFFLE_BUFFER)
        buffer[i], document = document, buffer[i]
        yield document
    rng.shuffle(buffer)
    yield from buffer
