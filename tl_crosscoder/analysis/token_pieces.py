"""`TokenPieces`: a text token by token, as strings that together are the text.

Contract: one string a token; decoded alone, a token loses the space before it in the tokenizers of
Llama 2 and its kin, so a piece is what a token adds to the one before. Limit: a character that is
split between tokens belongs to the one that completes it, and the others are empty.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

_UNREADABLE = "\N{REPLACEMENT CHARACTER}"
_MOST_WAITING = 16
"""Tokens held back in the hope of a whole character; one has at most four bytes."""


class TokenPieces:
    """Decodes contexts with one tokenizer; pairs of tokens seen before are not decoded again."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Pairs repeat: one in a hundred of the embedded text is new.
        self._decode = lru_cache(maxsize=2**18)(self._decoded)

    def of(self, ids: Sequence[int]) -> list[str]:
        """One string for each token."""
        pieces = []
        anchor = read = 0  # decoded so far: ids[:read]; the tokens from `anchor` on give the spaces
        said = ""
        for end in range(1, len(ids) + 1):
            text = self._decode(tuple(ids[anchor:end]))
            waits = end < len(ids) and end - read < _MOST_WAITING
            whole = text.rstrip(_UNREADABLE) if waits else text
            pieces.append(whole[len(said) :])
            if whole == text:
                anchor, read = read, end
                said = self._decode(tuple(ids[anchor:end]))
            elif len(whole) > len(said):
                said = whole
        return pieces

    def _decoded(self, ids: tuple[int, ...]) -> str:
        return self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
