"""Text as contexts of token ids without padding, and what is known of each token.

Contract: tokens are made once and both models read the same ids; of every token it is known
whether it counts and if not why, which source it comes from, and whose it is in a chat. Seven bytes
a token.
Limit: where documents are not packed, short contexts are padded on the right.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor
from tqdm.auto import tqdm

from tl_crosscoder.config.text import Masks
from tl_crosscoder.data.chat import ROLES, Encoded, encode_documents
from tl_crosscoder.data.documents import Document
from tl_crosscoder.models.tokenizer import own_bos_id, pad_id

MAX_SOURCES = 64
"""Firing is counted for each source and latent, so sources cannot be as many as documents."""
REASONS = ("counts", "bos", "first", "template", "norm", "padding")
"""Why a token does not count; the first that applies, in this order after `counts`."""
_MOST_SOURCES = 2**16 - 1
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """Contexts of token ids and what is known of each position."""

    tokens: Int[Tensor, "contexts pos"]
    dropped: UInt8[Tensor, "contexts pos"]
    """Index into `REASONS`: 0 where a token counts, else why it does not."""
    source_ids: UInt8[Tensor, "contexts pos"]
    """Index into `sources` of the document that a token belongs to."""
    role_ids: UInt8[Tensor, "contexts pos"]
    """Index into `ROLES`."""
    sources: tuple[str, ...]
    context_ids: Int[Tensor, " contexts"]
    """Which contexts of the whole text these are."""
    norm_limits: tuple[float, ...] | None = None
    """Tokens whose norm at a site is above its limit do not count either; known once models run."""

    def __len__(self) -> int:
        """Number of contexts."""
        return len(self.tokens)

    @property
    def context_size(self) -> int:
        """Tokens a context."""
        return self.tokens.shape[1]

    @property
    def mask(self) -> Bool[Tensor, "contexts pos"]:
        """True where a token counts."""
        return self.dropped == 0

    @property
    def n_tokens(self) -> int:
        """Tokens that count."""
        return int(self.mask.sum())

    @property
    def lengths(self) -> Int[Tensor, " contexts"]:
        """Tokens of each context, padding left out."""
        return (self.dropped != REASONS.index("padding")).sum(dim=1)

    @property
    def mask_counts(self) -> dict[str, int]:
        """How many tokens count, and how many do not for each reason."""
        return _counts(self.dropped, REASONS)

    @property
    def source_counts(self) -> dict[str, int]:
        """Tokens that count, by source."""
        return _counts(self.source_ids[self.mask], self.sources)

    @property
    def role_counts(self) -> dict[str, int]:
        """Tokens that count, by role; of the roles that occur."""
        return {k: n for k, n in _counts(self.role_ids[self.mask], ROLES).items() if n}

    def __getitem__(self, index: Any) -> "TokenizedText":
        """Some of the contexts."""
        if isinstance(index, int):
            index = slice(index, index + 1 or None)
        per_token = ("tokens", "dropped", "source_ids", "role_ids", "context_ids")
        return replace(self, **{name: getattr(self, name)[index] for name in per_token})

    def cut(self, n_positions: int) -> "TokenizedText":
        """The first positions of every context."""
        per_token = ("tokens", "dropped", "source_ids", "role_ids")
        return replace(self, **{name: getattr(self, name)[:, :n_positions] for name in per_token})

    def describe(self) -> str:
        """One line for a reader: how much text, from where, and what does not count."""
        n = self.n_tokens
        parts = ", ".join(f"{name} {k / max(1, n):.0%}" for name, k in self.source_counts.items())
        left_out = {k: v for k, v in self.mask_counts.items() if v and k != "counts"}
        reasons = ", ".join(f"{v:,} {k}" for k, v in left_out.items()) or "none"
        return f"{n:,} tokens in {len(self):,} contexts ({parts}); left out: {reasons}"


def tokenize(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    context_size: int,
    pack: bool = True,
    masks: Masks | None = None,
    max_tokens: int | None = None,
    show_progress: bool = False,
) -> TokenizedText:
    """Documents as contexts of `context_size` tokens, each beginning with BOS.

    Packed, one document follows the other, every one with a BOS, and the last partial context is
    dropped. Not packed, each document has a context of its own, cut or padded on the right. A
    tokenizer without BOS gets none. Chats go through the tokenizer's chat template.

    Args:
        documents: any iterable, read until `max_tokens` tokens count (None is all of it).
        tokenizer: of the models.
        context_size: positions a context.
        pack: see above.
        masks: which tokens do not count; `Masks()` by default. Its `max_norm_multiple` needs the
            models: see `harvest.with_norm_limits`.
        max_tokens: stop when so many tokens count.
        show_progress: with a progress bar.

    Raises:
        ValueError: chats without a template, ids that the tokenizer does not have, text shorter
            than one context, or no text.
    """
    if context_size < 2:
        raise ValueError(f"context_size is {context_size}; it must be 2 or more.")
    made = _Contexts(tokenizer, context_size=context_size, pack=pack, masks=masks or Masks())
    with progress_bar("Tokenizing" if show_progress else None) as bar:
        for encoded in _encoded(documents, tokenizer):
            made.add(encoded)
            bar.update(len(encoded.ids))
            if max_tokens is not None and made.n_counted >= max_tokens:
                break
    return made.result()


def tokenize_encoded(
    documents: Iterable[Encoded],
    tokenizer: Any,
    *,
    context_size: int,
    pack: bool,
    masks: Masks,
    max_tokens: int,
    progress: str | None = None,
) -> TokenizedText:
    """The same of documents that are tokens already, up to so many tokens that count."""
    made = _Contexts(tokenizer, context_size=context_size, pack=pack, masks=masks)
    with progress_bar(progress, total=max_tokens) as bar:
        for encoded in documents:
            before = made.n_counted
            made.add(encoded)
            bar.update(made.n_counted - before)
            if made.n_counted >= max_tokens:
                break
    return made.result()


def progress_bar(description: str | None, *, total: int | None = None) -> Any:
    """A bar that counts tokens; none without a description. TQDM_DISABLE switches it off too."""
    off = True if description is None else None
    return tqdm(desc=description, total=total, unit="tok", unit_scale=True, disable=off)


def _encoded(documents: Iterable[Document], tokenizer: Any) -> Iterator[Encoded]:
    stream = iter(documents)
    while batch := list(islice(stream, _BATCH)):
        yield from encode_documents(batch, tokenizer)


class _Contexts:
    """Collects encoded documents into contexts, in arrays of a few bytes a token."""

    def __init__(self, tokenizer: Any, *, context_size: int, pack: bool, masks: Masks) -> None:
        self.bos, self.filler = own_bos_id(tokenizer), pad_id(tokenizer)
        self.size, self.pack, self.masks = context_size, pack, masks
        self.n_seen = self.n_counted = 0
        self.documents_by_source: Counter[str] = Counter()
        self._sources: dict[str, int] = {}
        self._rows: list[tuple[np.ndarray, ...]] = []
        self._rest = np.zeros((4, 0), dtype=np.int32)

    def add(self, document: Encoded) -> None:
        self.documents_by_source[document.source] += 1
        source = self._sources.setdefault(document.source, min(len(self._sources), _MOST_SOURCES))
        n = len(document.ids)
        self.n_seen += n
        # Ids, roles, sources, and 1 where there is a token: padding has none.
        own = np.stack(
            [document.ids, document.role_ids, np.full(n, source), np.ones(n)], dtype=np.int32,
            casting="unsafe",
        )  # fmt: skip
        if not self.pack:
            self._append(self._padded(own[:, : self.size]))
            return
        self._rest = np.concatenate([self._rest, own], axis=1)
        while (row := self._next_packed()) is not None:
            self._append(row)

    def _next_packed(self) -> np.ndarray | None:
        """The next full context, which begins with BOS whether the document does or not."""
        if not self._rest.shape[1]:
            return None
        needs_bos = self.bos is not None and self._rest[0, 0] != self.bos
        n = self.size - needs_bos
        if self._rest.shape[1] < n:
            return None
        row, self._rest = self._rest[:, :n], self._rest[:, n:]
        if needs_bos:
            first = row[:, :1].copy()
            first[0] = self.bos
            row = np.concatenate([first, row], axis=1)
        return row

    def _padded(self, row: np.ndarray) -> np.ndarray:
        width = self.size - row.shape[1]
        padding = np.repeat([[self.filler], [0], [row[2, 0]], [0]], width, axis=1)
        return np.concatenate([row, padding.astype(np.int32)], axis=1)

    def _append(self, row: np.ndarray) -> None:
        dropped = self._dropped(row)
        # Copies of their own size: a view would keep the whole row of four integers a token.
        kinds = (np.int32, np.uint8, np.uint8, np.uint16)
        values = (row[0], dropped, row[1], row[2])
        self._rows.append(tuple(v.astype(k) for v, k in zip(values, kinds, strict=True)))
        self.n_counted += int((dropped == 0).sum())

    def _dropped(self, row: np.ndarray) -> np.ndarray:
        """Why each position does not count; the first reason of `REASONS` that applies."""
        reasons = {
            "bos": (row[0] == self.bos) & self.masks.drop_bos if self.bos is not None else False,
            "first": np.arange(self.size) < self.masks.n_first,
            "template": (row[1] == ROLES.index("template")) & self.masks.drop_template,
        }
        dropped = np.zeros(self.size, dtype=np.int32)
        for name, applies in reversed(reasons.items()):
            dropped[applies] = REASONS.index(name)
        dropped[row[3] == 0] = REASONS.index("padding")
        return dropped

    def result(self) -> TokenizedText:
        if not self._rows:
            raise ValueError(
                f"the text has only {self.n_seen:,} tokens, fewer than one context of {self.size}. "
                "Give more text or a smaller context_size."
            )
        tokens, dropped, role_ids, sources = (np.stack(c) for c in zip(*self._rows, strict=True))
        self._rows.clear()
        names, place = self._named_sources()
        return TokenizedText(
            tokens=torch.from_numpy(tokens),
            dropped=torch.from_numpy(dropped),
            role_ids=torch.from_numpy(role_ids),
            source_ids=torch.from_numpy(place[sources]),
            sources=names,
            context_ids=torch.arange(len(tokens)),
        )

    def _named_sources(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Sources in the order of the text; of more than `MAX_SOURCES`, the rarest are `other`."""
        names = list(self._sources)
        if len(names) > MAX_SOURCES:
            common = {s for s, _ in self.documents_by_source.most_common(MAX_SOURCES - 1)}
            names = [*(s for s in names if s in common), "other"]
        index = {name: i for i, name in enumerate(names)}
        place = [index.get(source, len(names) - 1) for source in self._sources]
        return tuple(names), np.array(place, dtype=np.uint8)


def _counts(ids: Tensor, names: Sequence[str]) -> dict[str, int]:
    counted = torch.bincount(ids.flatten().long(), minlength=len(names)).tolist()
    return dict(zip(names, counted, strict=True))
