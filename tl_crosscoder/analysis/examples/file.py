"""Search in the file of an `ExampleDatabase`: which examples have a text in their window.

Contract: characters are compared without case, anywhere in a word. The index, where there is one,
only leaves out contexts that cannot hold the text, so that what is found does not depend on it.
Limit: a text that many contexts hold is looked up in all of them.

The SQLite file of an `ExampleDatabase`: its tables, how they are filled, how a file is opened.

Contract: the same examples and text give the same bytes, under one version of SQLite. Contexts are
stored once each, and only those that have an example. Limit: without FTS5's trigrams (SQLite 3.34)
there is no index of the text, and a search reads all of it; what it finds is the same.
"""

import errno
import json
import sqlite3
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tl_crosscoder import files
from tl_crosscoder.analysis.examples.collector import CollectedExamples, TokenPieces
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.results.tables import without_nan

N_TRIGRAM = 3
"""Characters of an entry of the index."""
_MOST_TRIGRAMS = 64
"""Of a long text the first are enough: the rest is compared."""
Key = tuple[int, int, int, int]
"""Latent, kind, quantile and rank of an example."""
Window = Callable[[int, list[int]], tuple[int, int]]
"""From a position and the ends of its context's tokens: first token shown, one after the last."""


@dataclass(kw_only=True)
class Matches:
    """Examples of one latent that contain a text."""

    near: set[tuple[int, int]] = field(default_factory=set)
    """Context and position: a token of the top may have been drawn, too, and counts once."""
    on_token: set[tuple[int, int]] = field(default_factory=set)
    """Those where the text lies on the token itself."""
    best: Key = (-1, -1, -1, -1)
    """The largest code of those on the token, or of all."""
    best_value: tuple[bool, float] = (False, -1.0)

    def add(self, where: tuple[int, int], key: Key, *, value: float, on_token: bool) -> None:
        """One more."""
        self.near.add(where)
        if on_token:
            self.on_token.add(where)
        if (on_token, value) > self.best_value:
            self.best, self.best_value = key, (on_token, value)


def find(
    connection: sqlite3.Connection, text: str, window: Window, *, is_indexed: bool
) -> dict[int, Matches]:
    """Examples with the text in their window, by latent."""
    wanted = _folded(text)
    found: dict[int, Matches] = {}
    for context, whole, lengths in _contexts(connection, wanted, is_indexed=is_indexed):
        starts = _starts(_folded(whole), wanted)
        if not starts:
            continue
        ends = ends_of(lengths)
        for key, value, position in _examples(connection, context):
            first, stop = window(position, ends)
            # An empty token is a part of the character after it.
            token = (ends[position], max(ends[position + 1], ends[position] + 1))
            near, on_token = _lies(
                starts, len(wanted), window=(ends[first], ends[stop]), token=token
            )
            if near:
                matches = found.setdefault(key[0], Matches())
                matches.add((context, position), key, value=value, on_token=on_token)
    return found


def indexable(text: str) -> str:
    """What the index is made of."""
    # FTS5 stops reading at a NUL.
    return _folded(text).replace("\0", " ")


def ends_of(lengths: bytes) -> list[int]:
    """Where each token begins in the text of its context, and at last its end."""
    return [0, *accumulate(np.frombuffer(lengths, "<u2").tolist())]


def _contexts(
    connection: sqlite3.Connection, wanted: str, *, is_indexed: bool
) -> Iterator[tuple[int, str, bytes]]:
    """Contexts that may contain it, and all that do."""
    query = "SELECT id, text, piece_lengths FROM contexts"
    if not is_indexed or len(wanted) < N_TRIGRAM:
        return iter(connection.execute(f"{query} ORDER BY id"))
    chosen = "id IN (SELECT rowid FROM trigrams WHERE trigrams MATCH ?)"
    return iter(connection.execute(f"{query} WHERE {chosen} ORDER BY id", (_question(wanted),)))


def _question(wanted: str) -> str:
    """To the index: which texts have all trigrams. Quoted, nothing in them is syntax."""
    text = indexable(wanted)
    found = dict.fromkeys(text[i : i + N_TRIGRAM] for i in range(len(text) - N_TRIGRAM + 1))
    return " AND ".join('"' + t.replace('"', '""') + '"' for t in [*found][:_MOST_TRIGRAMS])


def _examples(connection: sqlite3.Connection, context: int) -> Iterator[tuple[Key, float, int]]:
    query = (
        "SELECT latent, kind, quantile, rank, value, position FROM examples WHERE context = ?"
        " ORDER BY latent, kind, quantile, rank"
    )
    for row in connection.execute(query, (context,)):
        yield row[:4], row[4], row[5]


def _folded(text: str) -> str:
    """Without case, character by character: lengths stay, unlike those of `str.lower`."""
    return text.lower() if text.isascii() else "".join(map(_folded_character, text))


def _folded_character(character: str) -> str:
    lower = character.lower()
    return lower if len(lower) == 1 else character


def _starts(text: str, wanted: str) -> list[int]:
    """Where it occurs, overlaps included."""
    starts, at = [], text.find(wanted)
    while at >= 0:
        starts.append(at)
        at = text.find(wanted, at + 1)
    return starts


def _lies(
    starts: list[int], length: int, *, window: tuple[int, int], token: tuple[int, int]
) -> tuple[bool, bool]:
    """Whether an occurrence lies within the window; and whether one there lies on the token."""

    def is_from(least: int, most: int) -> bool:
        at = bisect_left(starts, least)
        return at < len(starts) and starts[at] <= most

    last = window[1] - length
    if not is_from(window[0], last):
        return False, False
    return True, is_from(max(window[0], token[0] - length + 1), min(last, token[1] - 1))


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
