"""`ExampleDatabase`: the examples of all latents with their text, in one SQLite file.

Contract: opening checks the file, which may come from anywhere; the examples of a latent are a few
pages that lie together; a search finds the latents whose examples contain a text. Neither models
nor tokenizer are needed to read it. Limits: an example shows `n_before` tokens and `n_after`, as
collected, and a search looks no further; a search reads all contexts, which takes about a second
for 5 million tokens.
"""

import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tl_crosscoder import files
from tl_crosscoder.analysis.example_file import ends_of, open_examples, unpacked, write_examples
from tl_crosscoder.analysis.examples import ExampleSettings
from tl_crosscoder.config.settings import from_mapping
from tl_crosscoder.data.tokens import TokenizedText

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("top", "quantile")
"""Why an example was kept: its code is one of the largest, or it was drawn from a quantile."""


@dataclass(frozen=True, kw_only=True)
class StoredExample:
    """One token in context, and how active a latent is around it."""

    latent: int
    kind: str
    """One of `KINDS`."""
    quantile: int | None
    """Bin of the sample, 0 the weakest; None for the top."""
    rank: int
    """Place among those of its kind and quantile: 0 is the largest code."""
    value: float
    """The latent's code at the token."""
    before: str
    token: str
    after: str
    tokens: tuple[str, ...]
    """The window around the token, token by token."""
    activations: tuple[float, ...]
    """The latent's code at each of `tokens`; 0 at masked tokens too."""
    at: int
    """Which of `tokens` it is."""
    role: str
    """Role of the token in a chat."""
    source: str
    """Where the text comes from."""
    context: int
    """Index of the context in the text."""
    position: int
    """Position of the token in its context."""


@dataclass(frozen=True, kw_only=True)
class SearchHit:
    """A latent with examples that contain a text."""

    latent: int
    n_matching: int
    """Tokens among its examples with the text in their window."""
    n_on_token: int
    """Examples where the text lies on the token itself, not only near it."""
    n_tokens: int
    """Tokens among its examples."""
    example: StoredExample
    """The largest code of those on the token, or of all that match."""


class _Match(NamedTuple):
    """An example with the text in its window."""

    is_on_token: bool
    value: float
    key: tuple[int, int, int]
    """Latent, quantile and rank."""
    place: tuple[int, int]
    """Context and position: a token of the top may have been drawn, too, and counts once."""


class ExampleDatabase:
    """Examples in a file, open to read; close it, or use it in a `with` statement."""

    def __init__(self, connection: sqlite3.Connection, meta: Mapping[str, Any]) -> None:
        self._connection = connection
        self.d_sae: int = meta["d_sae"]
        self.settings = from_mapping(ExampleSettings, meta["settings"], name="the settings")
        """How the examples were collected."""
        self.about: dict[str, Any] = meta["about"]
        """What the writer stored with it."""
        self._sources, self._roles = meta["sources"], meta["roles"]

    write = staticmethod(write_examples)
    """Writes a file; see `example_file.write_examples`."""

    @classmethod
    def open(cls, path: str | Path) -> "ExampleDatabase":
        """Open what `write` wrote, to read only.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file, of another version, or damaged.
        """
        return cls(*open_examples(files.user_path(path)))

    def close(self) -> None:
        """Close the file; closing it twice does no harm."""
        self._connection.close()

    def __enter__(self) -> "ExampleDatabase":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def latents(self) -> list[int]:
        """Latents with examples: those that were active at all."""
        return [row[0] for row in self._connection.execute("SELECT id FROM latents ORDER BY id")]

    def latent(
        self, latent: int, *, kind: str | None = None, n: int | None = None
    ) -> list[StoredExample]:
        """Examples of a latent: the top, then the quantiles, each with the largest codes first.

        Args:
            latent: its index; one that was never active has no examples.
            kind: only this of `KINDS`.
            n: only so many.

        Raises:
            ValueError: a latent or a kind that does not exist, or an n below 0.
        """
        if not 0 <= latent < self.d_sae:
            raise ValueError(
                f"latent {latent} is not in this database: it has {self.d_sae:,}, "
                f"0 to {self.d_sae - 1}."
            )
        if kind is not None and kind not in KINDS:
            raise ValueError(f"kind {kind!r} is not known; examples are {list(KINDS)}.")
        _check_count(n)
        of_kind = {None: "", "top": "AND quantile < 0 ", "quantile": "AND quantile >= 0 "}[kind]
        order = "ORDER BY quantile >= 0, quantile DESC, rank LIMIT ?"
        values = int(latent), -1 if n is None else n
        with _reading():
            return [*self._examples(f"latent = ? {of_kind}{order}", values)]

    def is_of(self, text: TokenizedText) -> bool:
        """Whether the examples stand in this text, as far as their first contexts show."""
        query = "SELECT id, token_ids FROM contexts ORDER BY id LIMIT 20"
        with _reading():
            for context, stored in self._connection.execute(query):
                ids = np.frombuffer(stored, "<i4").tolist()
                if context >= len(text) or text.tokens[context, : len(ids)].tolist() != ids:
                    return False
        return True

    def search(self, text: str, *, n: int = 20) -> list[SearchHit]:
        """Latents whose examples contain a text, anywhere in a word and in any case.

        First those with most examples where it lies on the token itself, then those with most
        where it is near; equals by index.

        Raises:
            ValueError: an empty text, or an n below 0.
        """
        _check_count(n)
        if not text:
            raise ValueError("the text to search is empty: give at least one character.")
        with _reading():
            return self._hits(text, n)

    def _hits(self, text: str, n: int) -> list[SearchHit]:
        found: dict[int, list[_Match]] = defaultdict(list)
        for match in self._matches(_folded(text)):
            found[match.key[0]].append(match)
        counts = {
            latent: (len({m.place for m in own if m.is_on_token}), len({m.place for m in own}))
            for latent, own in found.items()
        }
        order = sorted(found, key=lambda j: (-counts[j][0], -counts[j][1], j))
        of_latent = "SELECT n_tokens FROM latents WHERE id = ?"
        best = {j: max(found[j], key=lambda m: (m.is_on_token, m.value)) for j in order[:n]}
        return [
            SearchHit(
                latent=j,
                n_matching=counts[j][1],
                n_on_token=counts[j][0],
                n_tokens=self._connection.execute(of_latent, (j,)).fetchone()[0],
                example=next(self._examples("latent = ? AND quantile = ? AND rank = ?", match.key)),
            )
            for j, match in best.items()
        ]

    def to_frame(self, latent: int) -> "pd.DataFrame":
        """Examples of a latent, one a row; what is known of all examples is in `attrs`."""
        import pandas as pd

        columns = list(StoredExample.__dataclass_fields__)
        frame = pd.DataFrame([asdict(e) for e in self.latent(latent)], columns=columns)
        frame.attrs.update(self.about)
        return frame

    def _matches(self, wanted: str) -> Iterator[_Match]:
        """Examples whose window contains a folded text, in the order of the text."""
        contexts = self._connection.execute(
            "SELECT id, text, piece_lengths FROM contexts ORDER BY id"
        )
        of_context = (
            "SELECT latent, quantile, rank, value, position FROM examples WHERE context = ?"
            " ORDER BY latent, quantile, rank"
        )
        for context, text, lengths in contexts:
            folded = _folded(text)
            if wanted not in folded:
                continue
            ends = ends_of(lengths)
            for *key, value, position in self._connection.execute(of_context, (context,)):
                first, stop = self._window(position, ends)
                begin, end = ends[first], ends[stop]
                if folded.find(wanted, begin, end) < 0:
                    continue
                # An empty token is a part of the character after it.
                token_end = max(ends[position + 1], ends[position] + 1)
                least = max(begin, ends[position] - len(wanted) + 1)
                most = min(end, token_end - 1 + len(wanted))
                yield _Match(
                    is_on_token=folded.find(wanted, least, most) >= 0,
                    value=value,
                    key=tuple(key),
                    place=(context, position),
                )

    def _examples(self, where: str, values: tuple[Any, ...]) -> Iterator[StoredExample]:
        query = (
            "SELECT latent, quantile, rank, value, context, position, source, role, activations,"
            " text, piece_lengths FROM examples JOIN contexts ON context = id WHERE "
        )
        width = self.settings.n_before + 1 + self.settings.n_after
        for row in self._connection.execute(query + where, values):
            latent, quantile, rank, value, context, position, source, role, *rest = row
            activations, text, ends = rest[0], rest[1], ends_of(rest[2])
            first, stop = self._window(position, ends)
            begin = self.settings.n_before - (position - first)
            window = unpacked(activations, width)[begin : begin + stop - first]
            yield StoredExample(
                latent=latent,
                kind=KINDS[quantile >= 0],
                quantile=None if quantile < 0 else quantile,
                rank=rank,
                value=value,
                before=text[ends[first] : ends[position]],
                token=text[ends[position] : ends[position + 1]],
                after=text[ends[position + 1] : ends[stop]],
                tokens=tuple(text[ends[i] : ends[i + 1]] for i in range(first, stop)),
                activations=tuple(window.tolist()),
                at=position - first,
                role=self._roles[role],
                source=self._sources[source],
                context=context,
                position=position,
            )

    def _window(self, position: int, ends: list[int]) -> tuple[int, int]:
        """First token shown, and the one after the last."""
        first = max(0, position - self.settings.n_before)
        return first, min(len(ends) - 1, position + 1 + self.settings.n_after)


@contextmanager
def _reading() -> Iterator[None]:
    """Raise ValueError where a row cannot be what was written: no check finds every changed bit."""
    try:
        yield
    except (sqlite3.Error, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"the examples are damaged ({error}). Make them again with `tl-crosscoder analyze "
            "--fresh`."
        ) from error


def _folded(text: str) -> str:
    """Without case, of the same length."""
    # `str.lower` makes two characters of U+0130, and another sigma at the end of a word.
    return text.replace("\u0130", "i").replace("\u03a3", "\u03c3").lower()


def _check_count(n: int | None) -> None:
    if n is not None and n < 0:
        raise ValueError(f"n is {n}; it must be 0 or more.")
