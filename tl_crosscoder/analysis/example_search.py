"""Search in the file of an `ExampleDatabase`: which examples have a text in their window.

Contract: characters are compared without case, anywhere in a word. The index, where there is one,
only leaves out contexts that cannot hold the text, so that what is found does not depend on it.
Limit: a text that many contexts hold is looked up in all of them.
"""

import sqlite3
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

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
