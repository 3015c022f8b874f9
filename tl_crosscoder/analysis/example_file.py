"""The SQLite file of an `ExampleDatabase`: its tables, how they are filled, how a file is opened.

Contract: the same examples and text give the same bytes, under one version of SQLite. Contexts are
stored once each, and only those that have an example. Limit: a file is written whole and never
changed.
"""

import errno
import json
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tl_crosscoder import files
from tl_crosscoder.analysis.examples import CollectedExamples
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.tokenizer import token_pieces
from tl_crosscoder.results.tables import without_nan

VERSION = 2
_APPLICATION = int.from_bytes(b"tlcx", "big")
_SCHEMA = f"""
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {VERSION};
CREATE TABLE meta (content TEXT NOT NULL);
CREATE TABLE contexts (
    id INTEGER PRIMARY KEY, text TEXT NOT NULL, token_ids BLOB NOT NULL,
    piece_lengths BLOB NOT NULL
);
CREATE TABLE latents (id INTEGER PRIMARY KEY, n_tokens INTEGER NOT NULL);
CREATE TABLE examples (
    latent INTEGER NOT NULL, quantile INTEGER NOT NULL, rank INTEGER NOT NULL,
    value REAL NOT NULL, context INTEGER NOT NULL, position INTEGER NOT NULL,
    source INTEGER NOT NULL, role INTEGER NOT NULL, activations BLOB NOT NULL,
    PRIMARY KEY (latent, quantile, rank)
) WITHOUT ROWID;
"""
_CONTENT = {
    ("index", "examples_of_context"),
    *(("table", name) for name in ("meta", "contexts", "latents", "examples")),
}
MAX_BYTES, MAX_SECONDS = 2**26, 60.0
"""Of one value in a file, and of the check when a file is opened."""


def write_examples(
    path: str | Path,
    collected: CollectedExamples,
    text: TokenizedText,
    *,
    tokenizer: Any,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write examples and the contexts they stand in, atomically; a file there is replaced.

    Args:
        path: of the file, by convention `.sqlite`.
        collected: from `ExampleCollector.result`.
        text: what they were collected on.
        tokenizer: of the text; its strings are stored, it is not.
        about: plain values to store with it, such as the names of models.

    Raises:
        ValueError: the text is not the one that the examples are of.
        OSError: the disk is full, or another failure of the file system.
    """
    path = files.user_path(path)
    _check_text(collected, text)
    meta = {
        "d_sae": collected.d_sae,
        "settings": asdict(collected.settings),
        "sources": text.sources,
        "roles": ROLES,
        "about": without_nan(dict(about or {})),
    }
    try:
        with files.replacing(path) as temporary, closing(sqlite3.connect(temporary)) as made:
            # The file takes its name when it is complete, so that it needs no journal.
            made.executescript(_SCHEMA)
            made.execute("INSERT INTO meta VALUES (?)", (json.dumps(meta, allow_nan=False),))
            made.executemany(_insert("examples", 9), _example_rows(collected, text))
            made.execute("CREATE INDEX examples_of_context ON examples (context)")
            made.execute(
                "INSERT INTO latents SELECT latent, COUNT(DISTINCT context * ? + position)"
                " FROM examples GROUP BY latent",
                (text.context_size,),
            )
            made.executemany(_insert("contexts", 4), _context_rows(collected, text, tokenizer))
            made.commit()
            made.execute("VACUUM")
    except sqlite3.OperationalError as error:
        # SQLite tells a full disk by these words alone: "database or disk is full".
        number = errno.ENOSPC if "full" in str(error) else errno.EIO
        raise OSError(number, f"{path} could not be written: {error}") from error
    return path


def open_examples(path: Path) -> tuple[sqlite3.Connection, dict[str, Any]]:
    """A file open to read only, and what holds for all of it; see `ExampleDatabase.open`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: write an ExampleDatabase first.")
    # A file is replaced and never changed, so that it needs no lock and its folder no journal.
    uri = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
    connection = sqlite3.connect(uri, uri=True)
    try:
        _restrict(connection)
        _check_file(connection, path)
        (meta,) = connection.execute("SELECT content FROM meta").fetchone()
        return connection, _checked_meta(meta)
    except (sqlite3.Error, TypeError, RecursionError, json.JSONDecodeError) as error:
        connection.close()
        raise ValueError(
            f"{path} is not an ExampleDatabase, or damaged ({error}). Make it again with "
            "`tl-crosscoder analyze --fresh`."
        ) from error
    except ValueError:
        connection.close()
        raise


def _restrict(connection: sqlite3.Connection) -> None:
    """Distrust a file that may have come from anywhere: what it defines, its sizes, its time."""
    connection.execute("PRAGMA trusted_schema = OFF")
    if sys.version_info >= (3, 11):
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_BYTES)
    end = time.monotonic() + MAX_SECONDS
    connection.set_progress_handler(lambda: time.monotonic() > end, 100_000)


def _checked_meta(text: str) -> dict[str, Any]:
    meta = json.loads(text)
    kinds = {"d_sae": int, "settings": dict, "sources": list, "roles": list, "about": dict}
    for name, kind in kinds.items():
        if type(meta[name]) is not kind:
            raise TypeError(f"{name} is no {kind.__name__}")
    return meta


def unpacked(activations: bytes, width: int) -> Float[np.ndarray, " width"]:
    """Inverse of `_packed`, of one window."""
    n_bytes = (width + 7) // 8
    bits = np.unpackbits(np.frombuffer(activations[:n_bytes], np.uint8), count=width)
    window = np.zeros(width, dtype=np.float32)
    window[bits == 1] = np.frombuffer(activations[n_bytes:], "<f4")
    return window


def ends_of(lengths: bytes) -> list[int]:
    """Where each token begins in the text of its context, and at last its end."""
    return [0, *accumulate(np.frombuffer(lengths, "<u2").tolist())]


def _example_rows(collected: CollectedExamples, text: TokenizedText) -> Iterable[tuple[Any, ...]]:
    contexts = collected.positions // text.context_size
    positions = collected.positions % text.context_size
    columns = (
        collected.latents,
        collected.quantiles,
        collected.ranks,
        collected.values,
        contexts,
        positions,
        text.source_ids[contexts, positions],
        text.role_ids[contexts, positions],
    )
    windows = _packed(collected.windows.numpy())
    return zip(*(c.tolist() for c in columns), windows, strict=True)


def _context_rows(
    collected: CollectedExamples, text: TokenizedText, tokenizer: Any
) -> Iterator[tuple[Any, ...]]:
    """Contexts with an example, each once and without padding."""
    used = (collected.positions // text.context_size).unique()
    for context, length in zip(used.tolist(), text.lengths[used].tolist(), strict=True):
        ids = text.tokens[context, :length].tolist()
        pieces = token_pieces(tokenizer, ids)
        lengths = np.array([len(p) for p in pieces], dtype="<u2").tobytes()
        yield context, "".join(pieces), np.array(ids, dtype="<i4").tobytes(), lengths


def _packed(windows: Float[np.ndarray, "n width"]) -> Iterator[bytes]:
    """Each window as a bit for each position, and then what is not 0: most of a window is."""
    bits = np.packbits(windows != 0, axis=1)
    for window, own in zip(windows.astype("<f4"), bits, strict=True):
        yield own.tobytes() + window[window != 0].tobytes()


def _insert(table: str, n_columns: int) -> str:
    return f"INSERT INTO {table} VALUES ({', '.join('?' * n_columns)})"


def _check_text(collected: CollectedExamples, text: TokenizedText) -> None:
    last = int(collected.positions.max()) if len(collected) else -1
    if collected.context_size != text.context_size or last >= text.tokens.numel():
        raise ValueError(
            f"the examples are of contexts of {collected.context_size} tokens, up to position "
            f"{last:,}; the text has {len(text):,} of {text.context_size}: give the text that the "
            "examples were collected on."
        )


def _check_file(connection: sqlite3.Connection, path: Path) -> None:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != _APPLICATION:
        raise ValueError(
            f"{path} is an SQLite file, but not an ExampleDatabase (application_id {application})."
        )
    if version != VERSION:
        raise ValueError(
            f"{path} is an ExampleDatabase of version {version}; this package reads {VERSION}: "
            "write it again, or install the package that wrote it."
        )
    query = "SELECT type, name FROM sqlite_master WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    if (there := {*connection.execute(query)}) != _CONTENT:
        raise ValueError(f"{path} is damaged: it defines {sorted(there ^ _CONTENT)} otherwise.")
    (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if state != "ok":
        raise ValueError(
            f"{path} is damaged ({state}). Make it again with `tl-crosscoder analyze --fresh`."
        )
    connection.set_progress_handler(None, 0)
