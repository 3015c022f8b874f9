"""Rows of the files that hold text, with one reader for each format.

A row is a string or a mapping of columns, or, in place of one that cannot be read, the `ValueError`
that says why: whoever reads decides whether that ends it. The first row of a format with columns
has all of them. Every other row has those that were asked for, and more where that costs nothing.
Limit: .txt, .csv and .json that is no JSON lines are read whole.
"""

import codecs
import gzip
import io
import json
import lzma
import re
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from tl_crosscoder import files
from tl_crosscoder.models.devices import memory_of

Rows = Iterator[Any]

SEPARATOR = "<|endoftext|>"
_BLANK_LINES = re.compile(r"\n\s*\n")
_ROWS_TOGETHER = 1_000
_PART, _LONGEST_LINE = 2**24, 2**29
_SAVED = ("state.json", "dataset_dict.json")
"""One of them is in a folder that `datasets` saved."""


def format_of(path: str | Path) -> str | None:
    """Suffix of the format, `.jsonl` for `a.jsonl.gz`; None for a file that is no text."""
    path = files.user_path(path)
    inner = path.with_suffix("") if path.suffix.lower() in _OPENERS else path
    suffix = inner.suffix.lower()
    return suffix if suffix in _READERS and (inner is path or suffix != ".parquet") else None


def name_of(path: Path) -> str:
    """Name of a file without its suffixes, as `a` for `a.jsonl.gz`."""
    return path.with_suffix("").stem if path.suffix.lower() in _OPENERS else path.stem


def valid_formats() -> str:
    """The suffixes that can be read, for errors."""
    return f"{', '.join(_READERS)} (also with {', '.join(_OPENERS)})"


def files_of(folder: Path) -> list[Path]:
    """Files of text within a folder, by name; a warning names the others.

    .json and .csv, which often hold something else, count where nothing else does.

    Raises:
        FileNotFoundError: there is none.
    """
    every = sorted(p for p in folder.rglob("*") if p.is_file())
    every = [p for p in every if not any(n.startswith(".") for n in p.relative_to(folder).parts)]
    of_text = [p for p in every if format_of(p)]
    found = [p for p in of_text if format_of(p) not in (".json", ".csv")] or of_text
    if not found:
        raise FileNotFoundError(f"the folder {folder} holds no {valid_formats()} file.")
    if left := [str(p.relative_to(folder)) for p in every if p not in {*found}]:
        more = f" and {len(left) - 3:,} more" if len(left) > 3 else ""
        warnings.warn(
            f"of the folder {folder} {len(found):,} files are read, and not {', '.join(left[:3])}"
            f"{more}.",
            stacklevel=2,
        )
    return found


def read_rows(path: Path, columns: Collection[str]) -> Rows:
    """Rows of a file, of which these columns are used.

    Raises:
        ValueError: another format, or a file that is damaged.
    """
    kind = format_of(path)
    if kind is None:
        raise ValueError(f"{path} is not one of {valid_formats()}.")
    try:
        yield from _READERS[kind](path, columns)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path} cannot be decompressed ({error}). It is damaged, or not what its name says."
        ) from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote this folder."""
    return any((folder / name).is_file() for name in _SAVED)


def read_saved(folder: Path, split: str, columns: Collection[str]) -> Rows:
    """Rows of a folder that `save_to_disk` wrote. Raises ValueError for a split it lacks."""
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(folder))
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise ValueError(
                f"{folder} has the splits {sorted(dataset)} and not {split!r}; name one with "
                "dataset_split (--dataset-split)."
            )
        dataset = dataset[split]
    names = dataset.column_names
    used = [name for name in names if name in columns]
    batches = dataset.select_columns(used).iter(_ROWS_TOGETHER) if used else [{}]
    rows = (dict(zip(b, row, strict=True)) for b in batches for row in _across(b))
    yield from _first_with(rows, names)


def _across(batch: Any) -> Iterator[tuple[Any, ...]]:
    return zip(*batch.values(), strict=True) if batch else iter([()])


def _first_with(rows: Rows, names: Collection[str]) -> Rows:
    """Rows, of which the first has every column by name."""
    for row in rows:
        yield dict.fromkeys(names) | row
        break
    yield from rows


# --- formats --------------------------------------------------------------------------------------


def _texts(path: Path, columns: Collection[str]) -> Rows:
    del columns
    text = io.StringIO(_content(path), newline=None).read()
    parts = text.split(SEPARATOR) if SEPARATOR in text else _BLANK_LINES.split(text)
    yield from (part for part in map(str.strip, parts) if part)


def _json_lines(path: Path, columns: Collection[str]) -> Rows:
    """One value a line, by Python's parser: pyarrow's crashes at a `null` in the first line."""
    del columns
    at = 0
    with _open(path) as file:
        lines = iter(lambda: file.readline(_LONGEST_LINE), b"")
        for number, line in enumerate(lines, 1):
            if len(line) == _LONGEST_LINE:
                raise ValueError(
                    f"line {number:,} of {path} has more than {_LONGEST_LINE / 1e9:,.1f} GB, which "
                    "is no document. Give one document a line."
                )
            if line.strip():
                yield _json_line(line, path, number, at)
            at += len(line)


def _json_line(line: bytes, path: Path, number: int, at: int) -> Any:
    try:
        text = _decoded(line, path, at)
    except ValueError as error:
        return error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"line {number:,} of {path} is not JSON ({error})")


def _json(path: Path, columns: Collection[str]) -> Rows:
    """A list of rows, an object with one list of them, or JSON lines."""
    with _open(path) as file:
        is_lines = _is_object(file.readline()) and bool(file.read(1))
    if is_lines:
        yield from _json_lines(path, columns)
        return
    text = _content(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if isinstance(content, dict) and not any(name in content for name in columns):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise ValueError(
                f"{path} holds a JSON object of {sorted(content)[:8]}, of which {len(lists)} are "
                "lists. Give a list of documents, or one document a line (.jsonl)."
            )
        (content,) = lists
    yield from content if isinstance(content, list) else [content]


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.removeprefix(codecs.BOM_UTF8)), dict)
    except (ValueError, RecursionError):
        return False


def _csv(path: Path, columns: Collection[str]) -> Rows:
    """Rows of strings: `NA` and `1.0` are text as they stand."""
    import pandas as pd

    del columns
    text = io.StringIO(_content(path), newline="")
    try:
        tables = pd.read_csv(text, dtype=str, keep_default_na=False, chunksize=_ROWS_TOGETHER)
        for table in tables:
            if not isinstance(table.index, pd.RangeIndex):  # pandas shifts the columns, silently
                raise ValueError(f"{path} is not CSV: a row has more values than the header names.")
            yield from table.to_dict("records")
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{path} is not CSV ({' '.join(str(error).split())}).") from error


def _parquet(path: Path, columns: Collection[str]) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            used = [name for name in names if name in columns]
            _check_row_groups(path, file.metadata, used)
            batches = file.iter_batches(_ROWS_TOGETHER, columns=used)
            yield from _first_with((row for b in batches for row in b.to_pylist()), names)
    except (pa.ArrowException, OSError, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a parquet file that can be read ({reason}).") from error


def _check_row_groups(path: Path, metadata: Any, used: Collection[str]) -> None:
    """Refuse a file that claims more bytes for a group of rows than there is memory."""
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        columns = map(group.column, range(group.num_columns))
        own = [c for c in columns if c.path_in_schema.split(".")[0] in used]
        _check_size(path, sum(max(0, c.total_uncompressed_size) for c in own))


_READERS: dict[str, Callable[[Path, Collection[str]], Rows]] = {
    ".txt": _texts, ".jsonl": _json_lines, ".parquet": _parquet, ".json": _json, ".csv": _csv,
}  # fmt: skip


# --- bytes ----------------------------------------------------------------------------------------


def _open_zst(path: Path) -> io.BufferedIOBase:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".zst": _open_zst}


def _open(path: Path) -> io.BufferedIOBase:
    """The content of a file as bytes, decompressed."""
    opener = _OPENERS.get(path.suffix.lower())
    return path.open("rb") if opener is None else opener(path)


def _content(path: Path) -> str:
    """The whole of a file, of which the compressed size says little."""
    parts, n_bytes = [], 0
    with _open(path) as file:
        while part := file.read(_PART):
            parts.append(part)
            _check_size(path, n_bytes := n_bytes + len(part))
    return _decoded(b"".join(parts), path, 0)


def _check_size(path: Path, n_bytes: int) -> None:
    there = memory_of("cpu")
    if there is not None and n_bytes > there // 2:  # as bytes and as text, at least
        raise ValueError(
            f"{path} takes {n_bytes / 1e9:,.1f} GB or more at once, and this machine has "
            f"{there / 1e9:,.1f} GB of memory. It is damaged, or too large: split it into several "
            "files, or give it as JSON lines (.jsonl)."
        )


def _decoded(content: bytes, path: Path, at: int) -> str:
    """Bytes of a file from the offset `at` as text, without a byte order mark at its beginning."""
    if at == 0 and content.startswith(codecs.BOM_UTF8):
        content, at = content[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: its byte at offset {at + error.start:,} is "
            f"{content[error.start]:#04x}. Convert it first (iconv -t UTF-8)."
        ) from error
