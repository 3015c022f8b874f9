"""The SQLite file of an `ExampleDatabase`: its tables, how they are filled, how a file is opened.

Contract: the same examples and text give the same bytes, under one version of SQLite. Contexts are
stored once each, and only those that have an example. Limit: without FTS5's trigrams (SQLite 3.34)
there is no index of the text, and a search reads all of it; what it finds is the same.
"""

import errno
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tl_crosscoder import files
from tl_crosscoder.activations.roles import ROLES
from tl_crosscoder.activations.text import TokenizedText
from tl_crosscoder.analysis.example_collector import CollectedExamples
from tl_crosscoder.analysis.example_search import indexable
from tl_crosscoder.analysis.token_pieces import TokenPieces
from tl_crosscoder.tables import without_nan

VERSION = 1
_APPLICATION = int.from_bytes(b"tlcx", "big")
_SCHEMA = f"""
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {VERSION};
CREATE TABLE meta (content TEXT NOT NULL);
CREATE TABLE contexts (
    id INTEGER PRIMARY KEY, text TEXT NOT NULL, token_ids BLOB NOT NULL,
    piece_lengths BLOB NOT NULL
);
CREATE TABLE latents (id INTEGER PRIMARY KEY, n_tokens INTEGER NOT NULL);
CREATE TABLE examples (
    latent INTEGER NOT NULL, kind INTEGER NOT NULL, quantile INTEGER NOT NULL,
    rank INTEGER NOT NULL, value REAL NOT NULL, context INTEGER NOT NULL,
    position INTEGER NOT NULL, source INTEGER NOT NULL, role INTEGER NOT NULL,
    activations BLOB NOT NULL,
    PRIMARY KEY (latent, kind, quantile, rank)
) WITHOUT ROWID;
"""
# Only which contexts have a trigram is stored, since the texts themselves are at hand.
_INDEX = """
CREATE VIRTUAL TABLE trigrams USING fts5(
    text, content='', detail='none', columnsize=0, tokenize='trigram case_sensitive 1'
)
"""


def write_examples(
    path: Path,
    collected: CollectedExamples,
    text: TokenizedText,
    *,
    tokenizer: Any,
    about: Mapping[str, Any],
) -> None:
    """Write the file, atomically.

    Raises:
        ValueError: the text is not the one that the examples are of.
    """
    _check_text(collected, text)
    try:
        with files.replacing(path) as temporary, closing(sqlite3.connect(temporary)) as connection:
            _write_all(connection, collected, text, tokenizer=tokenizer, about=about)
    except sqlite3.OperationalError as error:
        # SQLite says so in words alone: "database or disk is full".
        number = errno.ENOSPC if "full" in str(error) else errno.EIO
        raise OSError(number, f"{path} could not be written: {error}") from error


def _write_all(
    connection: sqlite3.Connection,
    collected: CollectedExamples,
    text: TokenizedText,
    *,
    tokenizer: Any,
    about: Mapping[str, Any],
) -> None:
    # The file takes its name when it is complete, so that nothing needs a journal.
    connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _SCHEMA)
    meta = _meta(collected, text, about)
    connection.execute("INSERT INTO meta VALUES (?)", (meta,))
    connection.executemany(
        "INSERT INTO examples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        _example_rows(collected, text),
    )
    connection.executescript(
        "CREATE INDEX examples_of_context ON examples (context);"
        "INSERT INTO latents SELECT latent, COUNT(DISTINCT context * "
        f"{text.context_size} + position) FROM examples GROUP BY latent;"
    )
    _write_contexts(connection, collected, text, TokenPieces(tokenizer))
    connection.commit()
    connection.execute("VACUUM")


def open_examples(path: Path) -> tuple[sqlite3.Connection, dict[str, Any]]:
    """A file to read from, and what holds for all of it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, of another version, or cut short.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: write an ExampleDatabase first.")
    # A file is replaced and never changed, so that it needs no lock and its folder no journal.
    uri = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
    connection = sqlite3.connect(uri, uri=True)
    try:
        _check_file(connection, path)
        return connection, json.loads(connection.execute("SELECT content FROM meta").fetchone()[0])
    except sqlite3.DatabaseError as error:
        connection.close()
        raise ValueError(f"{path} is not an ExampleDatabase ({error}).") from error
    except ValueError:
        connection.close()
        raise


def has_index(connection: sqlite3.Connection) -> bool:
    """Whether the file has an index of its text that this SQLite can read."""
    query = "SELECT COUNT(*) FROM sqlite_master WHERE name = 'trigrams'"
    return bool(connection.execute(query).fetchone()[0]) and _knows_trigrams()


def packed(windows: Float[np.ndarray, "n width"]) -> Iterator[bytes]:
    """Each window as a bit for each position and then what is not 0: most of it is."""
    bits = np.packbits(windows != 0, axis=1)
    for window, own in zip(windows.astype("<f4"), bits, strict=True):
        yield own.tobytes() + window[window != 0].tobytes()


def unpacked(activations: bytes, width: int) -> Float[np.ndarray, " width"]:
    """Inverse of `packed`, of one window."""
    n_bytes = (width + 7) // 8
    bits = np.unpackbits(np.frombuffer(activations[:n_bytes], np.uint8), count=width)
    window = np.zeros(width, dtype=np.float32)
    window[bits == 1] = np.frombuffer(activations[n_bytes:], "<f4")
    return window


def _example_rows(collected: CollectedExamples, text: TokenizedText) -> Iterable[tuple[Any, ...]]:
    contexts = collected.positions // text.context_size
    positions = collected.positions % text.context_size
    columns = (
        collected.latents,
        collected.kinds,
        collected.quantiles,
        collected.ranks,
        collected.values,
        contexts,
        positions,
        text.source_ids[contexts, positions],
        text.role_ids[contexts, positions],
    )
    windows = packed(collected.windows.numpy())
    return zip(*(c.tolist() for c in columns), windows, strict=True)


def _write_contexts(
    connection: sqlite3.Connection,
    collected: CollectedExamples,
    text: TokenizedText,
    pieces: TokenPieces,
) -> None:
    is_indexed = _knows_trigrams()
    if is_indexed:
        connection.execute(_INDEX)
    used = (collected.positions // text.context_size).unique()
    for context, length in zip(used.tolist(), text.lengths[used].tolist(), strict=True):
        ids = text.tokens[context, :length].tolist()
        parts = pieces.of(ids)
        whole = "".join(parts)
        lengths = np.array([len(p) for p in parts], dtype="<u2").tobytes()
        row = (context, whole, np.array(ids, dtype="<i4").tobytes(), lengths)
        connection.execute("INSERT INTO contexts VALUES (?, ?, ?, ?)", row)
        if is_indexed:
            entry = (context, indexable(whole))
            connection.execute("INSERT INTO trigrams (rowid, text) VALUES (?, ?)", entry)
    if is_indexed:
        connection.execute("INSERT INTO trigrams (trigrams) VALUES ('optimize')")


def _meta(collected: CollectedExamples, text: TokenizedText, about: Mapping[str, Any]) -> str:
    content = {
        "d_sae": collected.d_sae,
        "settings": asdict(collected.settings),
        "sources": text.sources,
        "roles": ROLES,
        "about": without_nan(dict(about)),
    }
    return json.dumps(content, allow_nan=False)


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


def _knows_trigrams() -> bool:
    if sqlite3.sqlite_version_info < (3, 34):
        return False
    query = "SELECT sqlite_compileoption_used('ENABLE_FTS5')"
    with closing(sqlite3.connect(":memory:")) as connection:
        return bool(connection.execute(query).fetchone()[0])
