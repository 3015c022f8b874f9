"""Tokens and numbers as panels of circuitsvis, without models; and names of tokens.

Contract: one string a token, as `text_tokens` gives them, and one number (or one for each label) a
token in; a `TokenPanel` with the props of circuitsvis's function of that name out. circuitsvis puts
tokens into the page as HTML and as text, so `shown` makes strings that are equal in both. A token
that is a piece of a character is called by its bytes, `<0xF0><0x9F>`, whether its tokenizer writes
them so (Llama 2, Gemma) or as letters (GPT-2, Llama 3). Limit: values are finite, with six digits.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tl_crosscoder.models.tokenizer import token_pieces, token_text
from tl_crosscoder.report.circuits import TokenPanel

_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}


def text_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """One string for each token of a text."""
    pieces = token_pieces(tokenizer, ids)
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
    """Name of a token in the vocabulary, bytes as `<0xF0>`."""
    name: str = tokenizer.convert_ids_to_tokens(token)
    if not all(letter in _BYTES for letter in name) or name.startswith("<0x"):
        return name
    return "".join(f"<0x{_BYTES[letter]:02X}>" for letter in name)


_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=[A-Za-z0-9#])")
"""Where HTML would begin a tag or a character reference; it does not before a word joiner."""
_KEPT = ("\N{ZERO WIDTH JOINER}", "\N{ZERO WIDTH NON-JOINER}")
"""Format characters that emoji and several scripts are written with."""
_EMPTY = "∅"
_LEAST = 1e-6
"""circuitsvis keeps six decimals of a bound, and divides by it."""
_N_POSITIONS = 128
"""Positions whose log-probabilities are in memory at a time."""


def shown(token: str) -> str:
    """Visible form of a token: control, format and rare space characters by name or symbol.

    A new line is `↵` and breaks the line; an override of the direction of text is `[U+202E]`.
    """
    if not token:
        return _EMPTY
    is_blank = all(c in _KEPT for c in token)
    text = "".join(c if c in _KEPT and not is_blank else _visible(c) for c in token)
    # A mark that combines with the character before has none here.
    text = "◌" + text if unicodedata.category(text[0]).startswith("M") else text
    return _MARKUP.sub("\\g<0>\N{WORD JOINER}", text)


def _visible(character: str) -> str:
    code, category = ord(character), unicodedata.category(character)
    if character == "\n":
        return "↵\n"
    if code < 0x20 or code == 0x7F:
        return chr(0x2400 + code) if code < 0x20 else "␡"
    if category in ("Cc", "Cf", "Cs", "Zl", "Zp") or (category == "Zs" and character != " "):
        return f"[U+{code:04X}]"
    return character


def colored_tokens(
    tokens: Sequence[str],
    values: Float[Tensor, " pos"] | Sequence[float],
    *,
    heading: str = "",
    bound: float | None = None,
) -> TokenPanel:
    """Tokens on a background by their value: blue above zero, red below.

    Args:
        tokens: one string each.
        values: one number each, shown where the pointer is.
        heading: above the tokens.
        bound: the size of a value with full colour; None is the largest.

    Raises:
        ValueError: not one finite value a token, or a bound of 0 or less.
    """
    numbers = torch.as_tensor(values, dtype=torch.float32)
    _check(tokens, numbers)
    bound = _bound(numbers, bound)
    ready = [shown(token) for token in tokens]
    props = {"tokens": ready, "values": _plain(numbers), "minValue": -bound, "maxValue": bound}
    return TokenPanel(component="ColoredTokens", props=props, heading=heading, text="".join(ready))


def colored_tokens_multi(
    tokens: Sequence[str],
    values: Float[Tensor, "pos n_labels"],
    labels: Sequence[str],
    *,
    heading: str = "",
    bound: float | None = None,
) -> TokenPanel:
    """Tokens with several values each; a choice by label says which of them colours the tokens.

    All values have one scale, so that their colours compare. Raises ValueError as `colored_tokens`,
    and where there is not one label a column.
    """
    _check(tokens, values)
    if len(labels) != values.shape[1] or not labels:
        raise ValueError(
            f"there are {len(labels)} labels for {values.shape[1]} values a token: give one each, "
            "and at least one."
        )
    bound = _bound(values, bound)
    ready = [shown(token) for token in tokens]
    props = {
        "tokens": ready,
        "values": _plain(values),
        "labels": list(labels),
        "positiveBounds": [bound] * len(labels),
        "negativeBounds": [-bound] * len(labels),
    }
    text = "".join(ready)
    return TokenPanel(component="ColoredTokensMulti", props=props, heading=heading, text=text)


@torch.no_grad()
def token_log_probs(
    tokens: Sequence[str],
    ids: Int[Tensor, " pos"],
    logits: Float[Tensor, "pos d_vocab"],
    *,
    to_string: Callable[[int], str],
    k: int = 10,
    heading: str = "",
) -> TokenPanel:
    """Each token by its log-probability, with the k likeliest where the pointer is.

    The first token is not shown: nothing predicts it. Ranks begin with 0.

    Args:
        tokens: one string each.
        ids: of the tokens.
        logits: next-token logits at each token.
        to_string: name of a token of the vocabulary.
        k: how many of the likeliest tokens.
        heading: above the tokens.

    Raises:
        ValueError: fewer than two tokens, other numbers of tokens, ids and logits, or a k out of
            range.
    """
    d_vocab = logits.shape[1]
    if not 1 <= k <= d_vocab:
        raise ValueError(f"k is {k}: the number of likeliest tokens must be in [1, {d_vocab}].")
    if len(tokens) != len(ids):
        raise ValueError(f"{len(tokens)} tokens have {len(ids)} ids: give one each.")
    correct, top, top_ids, ranks = [], [], [], []
    for log_probs, own in _predictions(ids, logits):
        found, best = log_probs.gather(1, own), log_probs.topk(k, dim=-1)
        correct.append(found[:, 0])
        ranks.append((log_probs > found).sum(dim=-1))
        top.append(best.values)
        top_ids.append(best.indices)
    ready = [shown(token) for token in tokens]
    props = {
        "prompt": ready,
        "topKLogProbs": _plain(torch.cat(top)),
        "topKTokens": [[shown(to_string(i)) for i in row] for row in torch.cat(top_ids).tolist()],
        "correctTokenRank": torch.cat(ranks).tolist(),
        "correctTokenLogProb": _plain(torch.cat(correct)),
    }
    text = "".join(ready[1:])
    return TokenPanel(component="TokenLogProbs", props=props, heading=heading, text=text)


@torch.no_grad()
def next_log_probs(
    ids: Int[Tensor, " pos"], logits: Float[Tensor, "pos d_vocab"]
) -> Float[Tensor, " pos_minus_1"]:
    """Log-probability, in nats, of each token but the first, on the CPU."""
    found = [log_probs.gather(1, own)[:, 0] for log_probs, own in _predictions(ids, logits)]
    return torch.cat(found).cpu()


def _predictions(
    ids: Int[Tensor, " pos"], logits: Float[Tensor, "pos d_vocab"]
) -> Iterator[tuple[Float[Tensor, "n d_vocab"], Int[Tensor, "n 1"]]]:
    """Log-probabilities at some positions at a time, and the tokens that followed."""
    if len(ids) < 2 or len(ids) != len(logits):
        raise ValueError(
            f"{len(ids)} tokens with logits at {len(logits)}: give logits at each, and two tokens "
            "or more, since nothing predicts the first."
        )
    following = ids[1:, None].to(logits.device)
    parts = zip(logits[:-1].split(_N_POSITIONS), following.split(_N_POSITIONS), strict=True)
    for part, own in parts:
        yield part.float().log_softmax(dim=-1), own


def _check(tokens: Sequence[str], values: Tensor) -> None:
    if len(tokens) != len(values) or not len(tokens):
        raise ValueError(
            f"{len(tokens)} tokens have {len(values)} values: give one each, and at least one."
        )
    bad = (~values.isfinite().reshape(len(tokens), -1).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"token {bad[0]}, {tokens[bad[0]]!r}, has a value that is not finite "
            f"({values[bad[0]].tolist()}): leave such tokens out."
        )


def _bound(values: Tensor, bound: float | None) -> float:
    if bound is not None and not bound >= _LEAST:
        raise ValueError(f"bound is {bound}; it must be {_LEAST} or more.")
    return _rounded(max(values.abs().max().item(), _LEAST) if bound is None else bound)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _plain(values: Tensor) -> list:
    rows = values.tolist()
    if values.dim() == 1:
        return [_rounded(v) for v in rows]
    return [[_rounded(v) for v in row] for row in rows]
