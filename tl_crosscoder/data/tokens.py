"""Text as contexts of token ids, with what is known of each token.

Tokens are made once and every model reads the same ids `[contexts, pos]`. For each token
`TokenizedText` knows whether it is kept (trained on and measured) and if not why, its source, and
its role in a chat, in seven bytes. Limit: where documents are not packed, short contexts are padded
on the right.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from tl_crosscoder.config.inputs import Masks, OnBadDocument
from tl_crosscoder.data.chat import ROLES, EncodedDocument, encode_stream
from tl_crosscoder.data.documents import source_of
from tl_crosscoder.data.records import BadDocuments, Document
from tl_crosscoder.models.tokenizer import own_bos_id, pad_id
from tl_crosscoder.progress import progress

DROP_REASONS = ("kept", "bos", "first", "template", "norm", "padding", "nonfinite")
"""Why a token is dropped; the first reason that applies. 0 means that the token is kept."""
_MAX_SOURCES = 64
"""Sources that are told apart: firing is counted for each source and latent."""
_MAX_SOURCE_IDS = 2**16 - 1


@dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """Contexts of token ids and what is known of each position."""

    tokens: Int[Tensor, "contexts pos"]
    dropped: UInt8[Tensor, "contexts pos"]
    """Index into `DROP_REASONS`: 0 where a token is kept."""
    source_ids: UInt8[Tensor, "contexts pos"]
    """Index into `sources` of the document that a token belongs to."""
    role_ids: UInt8[Tensor, "contexts pos"]
    """Index into `ROLES`."""
    sources: tuple[str, ...]
    context_ids: Int[Tensor, " contexts"]
    """Positions of these contexts in the whole text."""
    norm_limits: tuple[float, ...] | None = None
    """Tokens whose norm at a site is above its limit are dropped as well, once models have run."""
    drops_nonfinite: bool = False
    """Whether tokens with NaN or infinity at a site are dropped as well, or refused."""

    def __len__(self) -> int:
        """Number of contexts."""
        return len(self.tokens)

    @property
    def context_size(self) -> int:
        """Tokens a context."""
        return self.tokens.shape[1]

    @property
    def mask(self) -> Bool[Tensor, "contexts pos"]:
        """True where a token is kept."""
        return self.dropped == 0

    @property
    def n_tokens(self) -> int:
        """Number of kept tokens."""
        return int(self.mask.sum())

    @property
    def lengths(self) -> Int[Tensor, " contexts"]:
        """Tokens of each context without padding."""
        return (self.dropped != DROP_REASONS.index("padding")).sum(dim=1)

    @property
    def mask_counts(self) -> dict[str, int]:
        """Number of kept tokens, and of dropped ones by reason."""
        return _counts(self.dropped, DROP_REASONS)

    @property
    def source_counts(self) -> dict[str, int]:
        """Number of kept tokens by source."""
        return _counts(self.source_ids[self.mask], self.sources)

    @property
    def role_counts(self) -> dict[str, int]:
        """Number of kept tokens by role, for the roles that occur."""
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
        """One line: how much text, from which sources, and what is dropped."""
        n = self.n_tokens
        parts = ", ".join(f"{name} {k / max(1, n):.0%}" for name, k in self.source_counts.items())
        dropped = {k: v for k, v in self.mask_counts.items() if v and k != DROP_REASONS[0]}
        reasons = ", ".join(f"{v:,} {k}" for k, v in dropped.items()) or "none"
        return f"{n:,} tokens in {len(self):,} contexts ({parts}); dropped: {reasons}"


def tokenize(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    context_size: int,
    pack: bool = True,
    masks: Masks | None = None,
    max_tokens: int | None = None,
    show_progress: bool = False,
    on_bad_document: OnBadDocument = "error",
) -> TokenizedText:
    """Documents as contexts of `context_size` tokens, each beginning with BOS.

    Packed, one document follows the other, every one with a BOS, and the last partial context is
    dropped. Not packed, each document has a context to itself, cut or padded on the right. A
    tokenizer without BOS gets none. Chats go through the tokenizer's chat template.

    Args:
        documents: any iterable, read until `max_tokens` tokens are kept (None reads all of it).
        tokenizer: of the models.
        context_size: positions a context.
        pack: see above.
        masks: which tokens are dropped; `Masks()` by default. Its `max_norm_multiple` needs the
            models: see `harvest.with_norm_limits`.
        max_tokens: kept tokens after which reading stops.
        show_progress: with a progress bar.
        on_bad_document: `skip` leaves out the documents that cannot be encoded, and counts them.

    Raises:
        ValueError: chats without a template, ids that the tokenizer does not have, text shorter
            than one context, or no text.
    """
    packer = Packer(tokenizer, context_size=context_size, pack=pack, masks=masks)
    description = "Tokenizing" if show_progress else None
    bad = BadDocuments(on_bad_document)
    try:
        encoded = encode_stream(documents, tokenizer, bad=bad)
        return packer.packed(encoded, max_tokens, description=description)
    finally:
        bad.warn("the text")


class Packer:
    """Packs encoded documents into contexts, in arrays of a few bytes a token; see `tokenize`."""

    def __init__(
        self, tokenizer: Any, *, context_size: int, pack: bool = True, masks: Masks | None = None
    ) -> None:
        if context_size < 2:
            raise ValueError(f"context_size is {context_size}; it must be 2 or more.")
        self.bos, self.filler = own_bos_id(tokenizer), pad_id(tokenizer)
        self.size, self.pack, self.masks = context_size, pack, masks or Masks()
        self.n_seen = self.n_kept = 0
        self._n_documents: Counter[str] = Counter()
        self._source_ids: dict[str, int] = {}
        self._contexts: list[tuple[np.ndarray, ...]] = []
        self._rest = np.zeros((3, 0), dtype=np.int32)
        """Ids, roles and sources that have not filled a context yet."""

    def packed(
        self,
        documents: Iterable[EncodedDocument],
        max_tokens: int | None,
        *,
        description: str | None,
    ) -> TokenizedText:
        """Documents up to `max_tokens` kept tokens. A description shows a progress bar."""
        how = {"desc": description, "total": max_tokens, "unit": "tok", "unit_scale": True}
        bar = progress(show=description is not None, **how)
        with bar:
            for document in documents:
                before = self.n_kept
                self._add(document)
                bar.update(self.n_kept - before)
                if max_tokens is not None and self.n_kept >= max_tokens:
                    break
        return self._text()

    def _add(self, document: EncodedDocument) -> None:
        name, n = source_of(document.document), len(document.ids)
        self._n_documents[name] += 1
        source = self._source_ids.setdefault(name, min(len(self._source_ids), _MAX_SOURCE_IDS))
        self.n_seen += n
        tokens = np.stack([document.ids, document.role_ids, np.full(n, source)]).astype(np.int32)
        if not self.pack:
            self._append(tokens[:, : self.size])
            return
        self._rest = np.concatenate([self._rest, tokens], axis=1)
        while (context := self._next_packed()) is not None:
            self._append(context)

    def _next_packed(self) -> np.ndarray | None:
        """The next full context; it begins with BOS even in the middle of a document."""
        rest = self._rest
        needs_bos = self.bos is not None and rest.shape[1] > 0 and rest[0, 0] != self.bos
        n = self.size - needs_bos
        if rest.shape[1] < n:
            return None
        context, self._rest = rest[:, :n], rest[:, n:]
        if needs_bos:
            bos = context[:, :1].copy()  # with the role and source of the token that follows
            bos[0] = self.bos
            context = np.concatenate([bos, context], axis=1)
        return context

    def _append(self, context: np.ndarray) -> None:
        n = context.shape[1]
        padded = np.repeat([[self.filler], [0], [context[2, 0]]], self.size, axis=1)
        padded[:, :n] = context
        ids, roles, sources = padded
        dropped = np.zeros(self.size, dtype=np.uint8)
        # Written from the last reason to the first, so that the first one stays; padding is apart.
        if self.masks.drop_template:
            dropped[roles == ROLES.index("template")] = DROP_REASONS.index("template")
        dropped[: self.masks.n_first] = DROP_REASONS.index("first")
        if self.masks.drop_bos and self.bos is not None:
            dropped[ids == self.bos] = DROP_REASONS.index("bos")
        dropped[n:] = DROP_REASONS.index("padding")
        # Copies in small types: views would keep the integers of 8 bytes alive.
        kinds = (np.int32, np.uint8, np.uint8, np.uint16)
        values = (ids, dropped, roles, sources)
        self._contexts.append(tuple(v.astype(k) for v, k in zip(values, kinds, strict=True)))
        self.n_kept += int((dropped == 0).sum())

    def _text(self) -> TokenizedText:
        if not self._contexts:
            raise ValueError(
                f"the text has only {self.n_seen:,} tokens, fewer than one context of {self.size}. "
                "Give more text or a smaller context_size."
            )
        columns = zip(*self._contexts, strict=True)
        tokens, dropped, role_ids, sources = (np.stack(column) for column in columns)
        self._contexts.clear()
        names, named = self._named_sources()
        return TokenizedText(
            tokens=torch.from_numpy(tokens),
            dropped=torch.from_numpy(dropped),
            role_ids=torch.from_numpy(role_ids),
            source_ids=torch.from_numpy(named[sources]),
            sources=names,
            context_ids=torch.arange(len(tokens)),
            drops_nonfinite=self.masks.on_nonfinite == "drop",
        )

    def _named_sources(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Names in the order of the text, the rare ones as `other`, and the name of each source."""
        names = list(self._source_ids)
        if len(names) > _MAX_SOURCES:
            common = {s for s, _ in self._n_documents.most_common(_MAX_SOURCES - 1)}
            names = [*(s for s in names if s in common), "other"]
        index = {name: i for i, name in enumerate(names)}
        named = [index.get(source, len(names) - 1) for source in self._source_ids]
        return tuple(names), np.array(named, dtype=np.uint8)


def _counts(ids: Tensor, names: Sequence[str]) -> dict[str, int]:
    counted = torch.bincount(ids.flatten().long(), minlength=len(names)).tolist()
    return dict(zip(names, counted, strict=True))
