"""What tokens are called: pieces of a text, and single tokens of a vocabulary.

Contract: a token that is part of a character, which decodes to nothing or to a replacement
character, is called by its bytes, `<0xF0><0x9F>`, whether its tokenizer writes them so (Llama 2,
Gemma) or as letters (GPT-2, Llama 3). Limit: these two ways to write bytes.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from tl_crosscoder.analysis.lens import token_text
from tl_crosscoder.analysis.token_pieces import TokenPieces

_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}


def text_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """One string for each token of a text."""
    pieces = TokenPieces(tokenizer).of(ids)
    return [
        piece or vocabulary_name(tokenizer, token) for piece, token in zip(pieces, ids, strict=True)
    ]


def token_namer(tokenizer: Any) -> Callable[[int], str]:
    """A function from ids to strings, which keeps what it has found."""

    @cache
    def name(token: int) -> str:
        # Models may have more logits than their tokenizer has tokens.
        if token >= len(tokenizer):
            return f"[{token}]"
        text = token_text(tokenizer, token)
        is_part = not text or "\N{REPLACEMENT CHARACTER}" in text
        return vocabulary_name(tokenizer, token) if is_part else text

    return name


def vocabulary_name(tokenizer: Any, token: int) -> str:
    """A token as the vocabulary has it, bytes as `<0xF0>`."""
    name: str = tokenizer.convert_ids_to_tokens(token)
    if not all(letter in _BYTES for letter in name) or name.startswith("<0x"):
        return name
    return "".join(f"<0x{_BYTES[letter]:02X}>" for letter in name)
