"""Text to ids, once for all models that are compared.

Contract: at most one BOS, decided here and never by a model's own default; ids of one text do not
depend on the other texts of a batch. Limit: no truncation; the caller cuts.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

_MOST_WAITING = 16
"""Tokens held back until a split character is whole; one has at most four bytes."""
PROBE_TEXT = "The 2 cats' naïve plan: run, hide & eat.\n"


class TokenIds:
    """Stands in for the tokenizer of models that have none: an id is its own text.

    Documents of `input_ids` need no more. Any other text is an error when it is read.
    """

    bos_token = eos_token = pad_token = chat_template = None
    bos_token_id = eos_token_id = pad_token_id = None
    is_fast = False
    name_or_path = ""

    def __init__(self, d_vocab: int) -> None:
        self.d_vocab, self.init_kwargs = d_vocab, {"bos_token": None}

    def __len__(self) -> int:
        """Number of ids."""
        return self.d_vocab

    def __call__(self, text: Any, **_: Any) -> Any:
        """Raise ValueError: there are no tokens in a text."""
        raise ValueError(
            f"the models have no tokenizer, so that the text {repr(text)[:60]} means nothing to "
            "them: give documents with input_ids, or name a tokenizer (tokenizer=, --tokenizer)."
        )

    def save_pretrained(self, folder: Any) -> None:
        """Raise ValueError: there is nothing that another tool would read."""
        raise ValueError(f"the models have no tokenizer to be saved in {folder}: name one.")

    def get_vocab(self) -> dict[str, int]:
        """Every id by its text."""
        return {str(i): i for i in range(self.d_vocab)}

    def get_added_vocab(self) -> dict[str, int]:
        """Nothing was added."""
        return {}

    def convert_ids_to_tokens(self, token: int) -> str:
        """The id as text."""
        return str(token)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """The ids, with spaces between."""
        return " ".join(map(str, ids))


def own_bos_id(tokenizer: Any) -> int | None:
    """The BOS id a tokenizer was made with, or None.

    TransformerLens writes the end-of-text token over a missing BOS (Qwen). That one differs between
    a base and a chat model and no text of theirs starts with it, so it does not count.
    """
    if tokenizer.init_kwargs.get("bos_token", tokenizer.bos_token) is None:
        return None
    return tokenizer.bos_token_id


@lru_cache(maxsize=4)
def tokenizer_sha256(tokenizer: Any) -> str:
    """A hash of what text becomes: of the vocabulary and of the ids of a probe text."""
    has_text = not isinstance(tokenizer, TokenIds)
    probe = encode(tokenizer, PROBE_TEXT, prepend_bos=True) if has_text else []
    content = [sorted(tokenizer.get_vocab().items()), probe]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def pad_id(tokenizer: Any) -> int:
    """What fills short rows. No activation at a real token depends on it."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)


def pad(
    rows: Sequence[list[int]], *, filler: int, device: torch.device
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Ids of several texts as one right-padded tensor, and which positions hold real tokens."""
    width = max(map(len, rows), default=0)
    padded = [row + [filler] * (width - len(row)) for row in rows]
    n_tokens = torch.tensor([len(row) for row in rows], device=device)
    tokens = torch.tensor(padded, dtype=torch.long, device=device)
    mask = torch.arange(width, device=device) < n_tokens[:, None]
    return tokens.reshape(mask.shape), mask


def encode(tokenizer: Any, text: str, *, prepend_bos: bool) -> list[int]:
    """Ids of one text.

    `prepend_bos` adds the tokenizer's BOS unless the text starts with it (chat templates) or the
    tokenizer has none. A BOS written in the text stays either way.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = own_bos_id(tokenizer)
    if prepend_bos and bos is not None and ids[:1] != [bos]:
        return [bos, *ids]
    return ids


def decode_continuation(tokenizer: Any, prompt: list[int], continuation: list[int]) -> str:
    """Text of a continuation, with the space before its first word that decoding it alone drops."""
    head = tokenizer.decode(prompt, skip_special_tokens=True)
    full = tokenizer.decode([*prompt, *continuation], skip_special_tokens=True)
    if full.startswith(head):
        return full[len(head) :]
    return tokenizer.decode(continuation, skip_special_tokens=True)


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """A text token by token: one string for each token, together the text.

    Decoded alone, a token loses the space before it in the tokenizers of Llama 2 and its kin, so a
    piece is what a token adds to the one before. A character that is split between tokens belongs
    to the token that completes it, and the others are empty.
    """
    pieces = []
    # ids[:read] are decoded; the tokens from `anchor` on give the spaces.
    anchor = read = 0
    done = ""
    for end in range(1, len(ids) + 1):
        text = _decoded(tokenizer, tuple(ids[anchor:end]))
        waits = end < len(ids) and end - read < _MOST_WAITING
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}") if waits else text
        pieces.append(whole[len(done) :])
        if whole == text:
            anchor, read = read, end
            done = _decoded(tokenizer, tuple(ids[anchor:end]))
        elif len(whole) > len(done):
            done = whole
    return pieces


# Pairs of tokens repeat: one in a hundred of the embedded text is new.
@lru_cache(maxsize=2**17)
def _decoded(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def token_text(tokenizer: Any, token: int) -> str:
    """One token, with the space before it that some tokenizers drop where it stands alone."""
    if isinstance(tokenizer, TokenIds):
        return str(token)
    head = encode(tokenizer, "a", prepend_bos=False)
    return decode_continuation(tokenizer, head, [token]) or tokenizer.decode([token])


def check_same_tokenizer(base: Any, finetuned: Any, *, labels: Sequence[str]) -> dict[str, int]:
    """Raise ValueError unless two tokenizers give the same ids, BOS included.

    End-of-text and padding ids may differ: instruction tuning changes the first, and padded
    positions are never read. One of them may have tokens added beyond the ids of the other, as chat
    fine-tunes do; these are returned with their ids.
    """
    advice = (
        "An activation pair is one token seen by both models: use models with one vocabulary, such "
        "as a base and its fine-tune, or say which tokenizer feeds both (tokenizer=, --tokenizer)."
    )
    vocabs = base.get_vocab(), finetuned.get_vocab()
    ids = [set(vocab.values()) for vocab in vocabs]
    added = {
        token: i
        for tokenizer, own, others in ((base, 0, 1), (finetuned, 1, 0))
        for token, i in tokenizer.get_added_vocab().items()
        if vocabs[own].get(token) == i and token not in vocabs[others] and i not in ids[others]
    }
    every = (vocabs[0].keys() | vocabs[1].keys()) - added.keys()
    odd = sorted(t for t in every if vocabs[0].get(t) != vocabs[1].get(t))
    if odd:
        ids = [vocab.get(odd[0], "absent") for vocab in vocabs]
        raise ValueError(
            f"the tokenizers differ in {len(odd)} tokens: {odd[0]!r} is {ids[0]} in the "
            f"{labels[0]} and {ids[1]} in the {labels[1]}, of {len(vocabs[0])} and "
            f"{len(vocabs[1])} tokens. {advice}"
        )
    probes = [encode(tokenizer, PROBE_TEXT, prepend_bos=True) for tokenizer in (base, finetuned)]
    if probes[0] != probes[1]:
        raise ValueError(
            f"the tokenizers encode {PROBE_TEXT!r} differently: {probes[0]} for the {labels[0]}, "
            f"{probes[1]} for the {labels[1]}. {advice}"
        )
    return added
