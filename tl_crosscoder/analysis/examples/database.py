"""The tokens on which each latent is most active, with their context.

`TopTokens` are the first few examples of every latent, `[n, d_sae]`, in memory; all of them, with
quantile samples, are in the `ExampleDatabase`. Limit: contexts are looked up in the tokenised text,
which has to be at hand.

`ExampleDatabase`: the examples of all latents with their text, in one SQLite file.

Contract: opening reads a row; the examples of a latent are a few pages that lie together; a
search finds the latents whose examples contain a text. Nothing else is needed to read it: neither
the models nor the tokenizer. Limit: an example shows `n_before` tokens and `n_after`, as collected,
and a search looks no further.
"""

import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.examples.collector import KINDS, CollectedExamples, ExampleSettings
from tl_crosscoder.analysis.examples.file import (
    Matches,
    ends_of,
    find,
    has_index,
    open_examples,
    unpacked,
    write_examples,
)
from tl_crosscoder.data.tokens import TokenizedText

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class TopTokens:
    """The n most active tokens of every latent, best first."""

    values: Float[Tensor, "n d_sae"]
    """Codes; 0 where a latent was active on fewer than n tokens."""
    positions: Int[Tensor, "n d_sae"]
    """Index into the flattened `[contexts, pos]` of the text; -1 where the value is 0."""

    @classmethod
    def of(cls, collected: CollectedExamples, *, n: int) -> "TopTokens":
        """The first n of each latent from what a pass collected."""
        values = torch.zeros(n, collected.d_sae)
        positions = torch.full((n, collected.d_sae), -1)
        is_top = (collected.kinds == KINDS.index("top")) & (collected.ranks < n)
        at = collected.ranks[is_top].long(), collected.latents[is_top].long()
        values[at] = collected.values[is_top]
        positions[at] = collected.positions[is_top].long()
        return cls(values=values, positions=positions)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One token in context."""

    before: str
    token: str
    after: str
    value: float
    """The latent's code at the token."""
    source: str
    """Where the text comes from."""


def examples(
    top: TopTokens,
    latent: int,
    text: TokenizedText,
    tokenizer: Any,
    *,
    n_before: int = 12,
    n_after: int = 6,
) -> list[Example]:
    """The stored tokens of a latent as text, best first; context ends at the context's borders."""
    found = []
    for value, position in zip(
        top.values[:, latent].tolist(), top.positions[:, latent].tolist(), strict=True
    ):
        if position < 0:
            break
        context, at = divmod(position, text.context_size)
        start = max(0, at - n_before)
        ids = text.tokens[context, start : at + 1 + n_after].tolist()
        before, token, after = _decode_parts(tokenizer, ids, at - start)
        found.append(
            Example(
                before=before,
                token=token,
                after=after,
                value=value,
                source=text.sources[int(text.source_ids[context, at])],
            )
        )
    return found


def _decode_parts(tokenizer: Any, ids: list[int], at: int) -> tuple[str, str, str]:
    """Text before, of and after one token; together the text of all.

    Decoded alone, a part loses the space before its first word in the tokenizers of Llama 2 and
    its kin, so parts are differences of prefixes. Where a character is split between tokens
    there is no such difference, and the part stands alone.
    """
    ends = (at, at + 1, len(ids))
    before, through, whole = (tokenizer.decode(ids[:end]) for end in ends)
    token = through[len(before) :] if through.startswith(before) else tokenizer.decode([ids[at]])
    after = whole[len(through) :] if whole.startswith(through) else tokenizer.decode(ids[at + 1 :])
    return before, token, after


_KEY = "latent = ? AND kind = ? AND quantile = ? AND rank = ?"


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
    """The same text token by token."""
    activations: tuple[float, ...]
    """The latent's code at each of `tokens`; 0 too where a token does not count."""
    at: int
    """Which of `tokens` it is."""
    role: str
    """Whose the token is in a chat."""
    source: str
    """Where the text comes from."""
    context: int
    """Index of the context in the text."""
    position: int
    """Of the token in its context."""


@dataclass(frozen=True, kw_only=True)
class StoredContext:
    """A context of which at least one token is an example."""

    context: int
    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """One string for each token; together the text."""


@dataclass(frozen=True, kw_only=True)
class SearchHit:
    """A latent with examples that contain a text."""

    latent: int
    n_matching: int
    """Tokens among its examples with the text in their window."""
    n_on_token: int
    """Those where the text lies on the token itself, not only near it."""
    n_tokens: int
    """Tokens among its examples."""
    example: StoredExample
    """The largest code of those on the token, or of all that match."""


class ExampleDatabase:
    """Examples in a file, open to read; close it, or use it in a `with` statement."""

    def __init__(self, connection: sqlite3.Connection, meta: Mapping[str, Any]) -> None:
        self._connection = connection
        self.d_sae: int = meta["d_sae"]
        self.settings = ExampleSettings(**meta["settings"])
        """As collected."""
        self.about: dict[str, Any] = meta["about"]
        """What whoever wrote it said of it."""
        self.is_indexed = has_index(connection)
        """False where SQLite has no trigrams: a search then reads all text, with the same hits."""
        self._sources, self._roles = meta["sources"], meta["roles"]

    @staticmethod
    def write(
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
        """
        write_examples(Path(path), collected, text, tokenizer=tokenizer, about=about or {})
        return Path(path)

    @classmethod
    def open(cls, path: str | Path) -> "ExampleDatabase":
        """Open what `write` wrote, to read only.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file, of another version, or cut short.
        """
        return cls(*open_examples(Path(path)))

    def close(self) -> None:
        """No more reading; twice is once."""
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
        kinds = KINDS if kind is None else (kind,)
        where = "latent = ? AND kind BETWEEN ? AND ? ORDER BY kind, quantile DESC, rank LIMIT ?"
        first, last = KINDS.index(kinds[0]), KINDS.index(kinds[-1])
        return [*self._examples(where, (int(latent), first, last, -1 if n is None else n))]

    def context(self, context: int) -> StoredContext:
        """The whole context of an example. Raises ValueError where it has none."""
        query = "SELECT text, piece_lengths, token_ids FROM contexts WHERE id = ?"
        row = self._connection.execute(query, (int(context),)).fetchone()
        if row is None:
            raise ValueError(
                f"context {context} is not in this database: it holds those of its examples, "
                "named by their `context`."
            )
        text, lengths, ids = row
        ends = ends_of(lengths)
        return StoredContext(
            context=context,
            text=text,
            token_ids=tuple(np.frombuffer(ids, "<i4").tolist()),
            tokens=_pieces(text, ends, 0, len(ends) - 1),
        )

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
        found = find(self._connection, text, self._window, is_indexed=self.is_indexed)
        hits = sorted(found, key=lambda j: (-len(found[j].on_token), -len(found[j].near), j))
        return [self._hit(latent, found[latent]) for latent in hits[:n]]

    def to_frame(self, latent: int) -> "pd.DataFrame":
        """Examples of a latent, one a row; what is known of them all is in `attrs`."""
        import pandas as pd

        columns = list(StoredExample.__dataclass_fields__)
        frame = pd.DataFrame([asdict(e) for e in self.latent(latent)], columns=columns)
        frame.attrs.update(self.about)
        return frame

    def _hit(self, latent: int, matches: Matches) -> SearchHit:
        query = "SELECT n_tokens FROM latents WHERE id = ?"
        return SearchHit(
            latent=latent,
            n_matching=len(matches.near),
            n_on_token=len(matches.on_token),
            n_tokens=self._connection.execute(query, (latent,)).fetchone()[0],
            example=next(self._examples(_KEY, matches.best)),
        )

    def _examples(self, where: str, values: tuple[Any, ...]) -> Iterator[StoredExample]:
        query = (
            "SELECT latent, kind, quantile, rank, value, context, position, source, role,"
            " activations, text, piece_lengths FROM examples JOIN contexts ON context = id WHERE "
        )
        for row in self._connection.execute(query + where, values):
            latent, kind, quantile, rank, value, context, position, source, role, *rest = row
            activations, text, ends = rest[0], rest[1], ends_of(rest[2])
            first, stop = self._window(position, ends)
            begin = self.settings.n_before - (position - first)
            width = self.settings.n_before + 1 + self.settings.n_after
            window = unpacked(activations, width)[begin : begin + stop - first]
            yield StoredExample(
                latent=latent,
                kind=KINDS[kind],
                quantile=None if quantile < 0 else quantile,
                rank=rank,
                value=value,
                before=text[ends[first] : ends[position]],
                token=text[ends[position] : ends[position + 1]],
                after=text[ends[position + 1] : ends[stop]],
                tokens=_pieces(text, ends, first, stop),
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


def _pieces(text: str, ends: list[int], first: int, stop: int) -> tuple[str, ...]:
    return tuple(text[ends[i] : ends[i + 1]] for i in range(first, stop))


def _check_count(n: int | None) -> None:
    if n is not None and n < 0:
        raise ValueError(f"n is {n}; it must be 0 or more.")
