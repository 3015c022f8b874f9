"""Documents from files, folders, `datasets` names and lists, and which of them are held out.

A document is a text `{"text": str}`, a chat `{"messages": [{"role", "content"}, ...]}`, or token
ids `{"input_ids": [int], "role_ids": [int]}` (the roles are optional), each with an optional
`"source"` that names its origin; `records.as_document` makes them of what people have. Limit:
`load_documents` holds every document in memory; `stream_documents` holds at most `SHUFFLE_BUFFER`
of them.
"""

import hashlib
import json
import lzma
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tl_crosscoder import files
from tl_crosscoder.config.inputs import OnBadDocument, TextSource
from tl_crosscoder.data.readers import (
    files_of,
    format_of,
    is_saved_dataset,
    name_of,
    read_rows,
    read_saved,
)
from tl_crosscoder.data.records import (
    COLUMNS,
    BadDocuments,
    Document,
    as_document,
    columns_not_read,
    has_content,
)
from tl_crosscoder.models.pretrained import PREFIX, embedded_text

SHUFFLE_BUFFER = 10_000
"""Number of documents among which a stream is shuffled."""
_CHARACTERS_PER_TOKEN = 4


def load_documents(
    source: str | Path | TextSource | Sequence[str | Document],
    *,
    text_column: str = "text",
    max_documents: int | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    on_bad_document: OnBadDocument = "error",
) -> list[Document]:
    """Documents from a file, a folder, a `datasets` name, or a list of strings or documents.

    A `TextSource` has the options of its own.

    Text files hold documents separated by `<|endoftext|>`, or else by blank lines. Rows of JSON,
    CSV and parquet have a `messages`, `conversations` or `input_ids` column, or `text_column`,
    which may also hold chats. A folder is read file by file, in the order of names. Empty documents
    are dropped.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without text in it.
        ValueError: a column that does not exist, a document that cannot be read (unless it is to
            be skipped), nothing but empty text, or a `datasets` name without `max_documents`,
            since whole datasets do not fit in memory.
    """
    if isinstance(source, str | Path):
        source = TextSource(
            text=str(source),
            text_column=text_column,
            max_documents=max_documents,
            dataset_config=dataset_config,
            dataset_split=dataset_split,
            on_bad_document=on_bad_document,
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
        bad = BadDocuments(on_bad_document)
        rows = _documents(source, name=name, bad=bad)
        documents = [*islice(_with_text(rows, name), max_documents)]
        bad.warn(name)
    if not documents:
        raise ValueError(f"there is no text in {name}: every document is empty or whitespace.")
    return documents


def stream_documents(
    source: TextSource, *, seed: int | None = None, bad: BadDocuments | None = None
) -> Iterator[Document]:
    """The documents of a source, one by one; a seed shuffles them, none keeps the given order.

    Empty documents are dropped, and counted at the end as those are that were to be skipped; with
    `bad` its owner does the latter. Raises the errors of `load_documents` when the stream reaches
    their cause.
    """
    name = source.text
    own = BadDocuments(source.on_bad_document) if bad is None else bad
    # With max_documents every pass must see the same first documents, so the files keep their
    # order and only these documents are shuffled.
    file_seed = seed if source.max_documents is None else None
    if name.startswith(PREFIX):
        rows = _read_embedded(embedded_text(name))
    elif is_dataset_name(name):
        rows = _read_dataset(source, file_seed, own)
    else:
        rows = _read(files.user_path(name), source, file_seed, own)
    rows = islice(_with_text(rows, name), source.max_documents)
    if bad is None:
        rows = _then_warn(rows, own, name)
    if source.name is not None:
        rows = ({**row, "source": source.name} for row in rows)
    return iter(rows) if seed is None else _shuffled(rows, seed)


def split_documents(
    documents: Sequence[Document], *, held_out: float = 0.1, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, each shuffled; equal documents are on one side.

    Documents are held out in the order of `content_hash`, as streams are, until their characters
    are the share `held_out` of all.

    Raises:
        ValueError: fewer than two different documents, which cannot be split.
    """
    hashes = [content_hash(document, seed=seed) for document in documents]
    is_kept = lowest_hashes(hashes, [_size(document) for document in documents], share=held_out)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    return [documents[i] for i in order if not is_kept[i]], [
        documents[i] for i in order if is_kept[i]
    ]


def lowest_hashes(
    hashes: Sequence[int], sizes: Sequence[int], *, share: float, what: str = "document"
) -> list[bool]:
    """Which of some documents are held out; of those with one hash all or none.

    In the order of their hashes all are held out of which at least half fits into what is left of
    the share, so that neither a long document nor one that is often repeated makes it much larger.
    At least one hash is on either side. Raises ValueError where there are not two.
    """
    size_of: Counter[int] = Counter()
    for own, size in zip(hashes, sizes, strict=True):
        size_of[own] += size
    if len(size_of) < 2:
        different = "different " if len(hashes) > 1 else ""
        raise ValueError(
            f"the text has {len(size_of)} {different}{what}; at least 2 are needed to keep some "
            "for measuring. Separate documents by blank lines or '<|endoftext|>', or give more "
            "text."
        )
    left, kept = share * size_of.total(), set[int]()
    for own in sorted(size_of):
        if size_of[own] / 2 <= left:
            kept.add(own)
            left -= size_of[own]
    kept = kept or {min(size_of, key=lambda own: (size_of[own], own))}
    if len(kept) == len(size_of):
        kept.remove(max(kept))
    return [own in kept for own in hashes]


def is_held_out(document: Document, *, share: float, seed: int = 0) -> bool:
    """Whether a streamed document is held out, decided by its `content_hash`.

    A split by position would leak: documents occur twice, and streams are read again. By hash a
    document is on one side in every pass and every source, and no stream is read to its end.
    """
    return content_hash(document, seed=seed) < share * 2**64


def halves(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(for ranking, for tests): a split by content, so that a document is on one side in any text.

    What is chosen on the first half, such as a ranking of latents, is tested on the second. Only
    where one of them would be empty does a document change sides.

    Raises:
        ValueError: fewer than two different documents.
    """
    places = [content_hash(document, seed="halves") for document in documents]
    ordered = sorted({*places})
    if len(ordered) < 2:
        raise ValueError(
            f"the text has {len(ordered)} different document: at least 2 are needed, to rank "
            "latents on some and to test them on others. Give more text."
        )
    limit = min(max(2**63, ordered[1]), ordered[-1])
    sides: tuple[list[Document], list[Document]] = ([], [])
    for place, document in zip(places, documents, strict=True):
        sides[place >= limit].append(document)
    return sides


def content_hash(document: Document, *, seed: int | str = 0, by_prompt: bool = True) -> int:
    """64 bits that documents of one content share, whatever their source.

    Of a chat roles and words count, white space at the ends of a text does not. Continuations of
    one prompt (`n_prompt_tokens`) share the hash of the prompt, unless `by_prompt` is off.
    """
    if "messages" in document:
        content: Any = [(m.get("role"), _stripped(m.get("content"))) for m in document["messages"]]
    elif "input_ids" in document:
        n = document.get("n_prompt_tokens") if by_prompt else None
        content = [document["input_ids"][: n or None]]
    else:
        content = _stripped(document.get("text"))
    key = json.dumps([seed, content], ensure_ascii=False, default=str)
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _stripped(text: Any) -> Any:
    return text.strip() if isinstance(text, str) else text


def _size(document: Document) -> int:
    """About how many characters a document has."""
    if "messages" in document:
        return sum(len(m.get("content") or "") for m in document["messages"])
    if "input_ids" in document:
        return _CHARACTERS_PER_TOKEN * len(document["input_ids"])
    return len(document.get("text") or "")


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
    if not isinstance(source, str) or files.user_path(source).exists() or format_of(source):
        return False
    return "\\" not in source and not source.startswith((".", "/", "~", PREFIX))


def _read_embedded(path: Path) -> Iterator[Document]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _then_warn(rows: Iterable[Document], bad: BadDocuments, name: str) -> Iterator[Document]:
    yield from rows
    bad.warn(name)


def _read(
    path: Path, source: TextSource, seed: int | None, bad: BadDocuments
) -> Iterable[Document]:
    column = source.text_column
    columns = (*COLUMNS, column)
    if path.is_dir() and is_saved_dataset(path):
        rows = read_saved(path, source.dataset_split, columns)
        return _documents(rows, column, name=str(path), origin=path.name, bad=bad)
    if not path.exists():
        raise FileNotFoundError(f"there is no text file or folder {path} (from {Path.cwd()}).")
    paths = files_of(path) if path.is_dir() else [path]
    if seed is not None:
        random.Random(seed).shuffle(paths)
    return (
        document
        for p in paths
        for document in _documents(
            read_rows(p, columns), column, name=str(p), origin=name_of(p), bad=bad
        )
    )


def _read_dataset(source: TextSource, seed: int | None, bad: BadDocuments) -> Iterable[Document]:
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
    return _documents(rows, source.text_column, name=name, origin=name, bad=bad)


def _file_by_file(rows: Any, seed: int) -> Iterable[Any]:
    """Rows of a streamed dataset, file after file, the files shuffled by the seed.

    `IterableDataset.shuffle` (datasets 5.2) would read ten files at once, row by row, and sleep
    five seconds at the end of each pass over parquet.
    """
    files = list(range(rows.num_shards))
    random.Random(seed).shuffle(files)
    return (row for i in files for row in rows.shard(len(files), i))


def _documents(
    rows: Iterable[Any],
    text_column: str = "text",
    *,
    name: str,
    origin: str | None = None,
    bad: BadDocuments,
) -> Iterator[Document]:
    """Rows as documents; those of files keep the columns that are read, and an origin.

    Raises ValueError for a row that cannot be read, with its number, unless `bad` skips it.
    """
    columns, was_column_seen = {*COLUMNS, text_column}, False
    for number, row in enumerate(rows, 1):
        if was_column_seen and not has_content(row, text_column):
            yield {"text": ""}  # a field left out where it is empty; counted with the empty ones
            continue
        used = row
        if origin is not None and isinstance(row, dict):
            used = {k: v for k, v in row.items() if k in columns}
        try:
            document = _document(used if has_content(used, text_column) else row, text_column)
        except ValueError as error:
            bad.add(ValueError(f"document {number:,} of {name} cannot be read: {error}."))
            continue
        if number == 1 and "input_ids" in document and (ignored := columns_not_read(row)):
            warnings.warn(f"the columns {ignored} of {name} are not used.", stacklevel=2)
        was_column_seen = True
        yield document if origin is None or "source" in document else {"source": origin, **document}


def _document(row: Any, text_column: str) -> Document:
    if isinstance(row, ValueError):
        raise row
    return as_document(row, text_column=text_column)


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
