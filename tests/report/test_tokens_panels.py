import json
import re

import circuitsvis as cv
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tl_crosscoder.models.tokenizer import token_text
from tl_crosscoder.report.token_panels import (
    colored_tokens,
    colored_tokens_multi,
    next_log_probs,
    text_tokens,
    token_log_probs,
    token_namer,
)

TOKENS = ["The", " cat", " sat"]


def props_of(theirs) -> dict:
    """What circuitsvis hands its component."""
    return json.loads(re.search(r"^\s*(\{.*\})\s*$", theirs.cdn_src, re.MULTILINE).group(1))


def assert_equal_props(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name in ("values", "topKLogProbs", "correctTokenLogProb", "minValue", "maxValue"):
            value = pytest.approx(torch.tensor(value).flatten().tolist(), rel=1e-5)
            assert torch.tensor(ours[name]).flatten().tolist() == value
        else:
            assert ours[name] == value


def test_props_are_those_of_circuitsvis():
    values = torch.tensor([0.5, -2.0, 1.0])
    theirs = cv.tokens.colored_tokens(TOKENS, values, min_value=-2.0, max_value=2.0)
    assert_equal_props(dict(colored_tokens(TOKENS, values).props), props_of(theirs))

    both = torch.stack([values, values / 4], dim=1)
    theirs = cv.tokens.colored_tokens_multi(TOKENS, both, ["a", "b"])
    # Bounds are ours: one scale for all, the largest of all.
    bounds = {"positiveBounds": [2.0, 2.0], "negativeBounds": [-2.0, -2.0]}
    ours = dict(colored_tokens_multi(TOKENS, both, ["a", "b"]).props)
    assert_equal_props(ours, props_of(theirs) | bounds)

    generator = torch.Generator().manual_seed(0)
    ids, logits = torch.randint(300, (140,), generator=generator), torch.randn(140, 300)
    log_probs = logits.log_softmax(dim=-1)
    theirs = cv.logits.token_log_probs(ids, log_probs, lambda i: f"t{i}", top_k=4)
    names = [f"t{i}" for i in ids.tolist()]
    ours = token_log_probs(names, ids, logits, to_string=lambda i: f"t{i}", k=4)
    assert ours.component == "TokenLogProbs"
    assert_equal_props(dict(ours.props), props_of(theirs))


def test_log_probabilities_by_hand():
    # Logits 0 and ln 3 are probabilities 1/4 and 3/4, equal ones halves; the last predicts nothing.
    logits = torch.tensor([[0.0, 3.0], [1.0, 1.0], [9.0, 0.0]])
    logits[0, 1] = torch.tensor(3.0).log()
    expected = torch.tensor([0.75, 0.5]).log()
    torch.testing.assert_close(next_log_probs(torch.tensor([0, 1, 0]), logits), expected)
    panel = token_log_probs(
        ["a", "b", "a"], torch.tensor([0, 1, 0]), logits, to_string="ab".__getitem__, k=1
    )
    assert panel.props["correctTokenRank"] == [0, 0]
    assert panel.props["topKTokens"][0] == ["b"]
    assert panel.props["correctTokenLogProb"] == pytest.approx(expected.tolist(), rel=1e-5)


def test_nothing_has_full_colour_where_all_is_zero():
    # circuitsvis divides by the bound, of which it keeps six decimals.
    assert colored_tokens(["a", "b"], [0.0, 0.0]).props["maxValue"] == 1e-6
    assert colored_tokens(["a"], [3.0], bound=6.0).props["minValue"] == -6.0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="3 tokens have 2 values"):
        colored_tokens(TOKENS, [1.0, 2.0])
    with pytest.raises(ValueError, match="0 tokens have 0 values"):
        colored_tokens([], [])
    with pytest.raises(ValueError, match=r"token 1, ' cat', has a value that is not finite \(nan"):
        colored_tokens(TOKENS, [1.0, float("nan"), float("inf")])
    with pytest.raises(ValueError, match="bound is 0"):
        colored_tokens(TOKENS, [1.0] * 3, bound=0)
    with pytest.raises(ValueError, match="1 labels for 2 values"):
        colored_tokens_multi(TOKENS, torch.zeros(3, 2), ["a"])
    with pytest.raises(ValueError, match="nothing predicts the first"):
        next_log_probs(torch.tensor([1]), torch.zeros(1, 3))
    ids, how = torch.arange(3), {"to_string": str}
    with pytest.raises(ValueError, match=r"k is 6: .* must be in \[1, 5\]"):
        token_log_probs(TOKENS, ids, torch.zeros(3, 5), k=6, **how)
    with pytest.raises(ValueError, match="2 tokens have 3 ids"):
        token_log_probs(TOKENS[:2], ids, torch.zeros(3, 5), k=2, **how)


def test_parts_of_a_character_are_called_by_their_bytes(taboo_pair):
    tokenizer = taboo_pair.tokenizer
    ids = tokenizer(" moon😀", add_special_tokens=False)["input_ids"]
    # U+1F600 is F0 9F 98 80; the token that completes it is the character.
    assert text_tokens(tokenizer, ids) == [" moon", "<0xF0>", "<0x9F>", "<0x98>", "😀"]
    name = token_namer(tokenizer)
    assert [name(i) for i in ids] == [" moon", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert name(len(tokenizer)) == f"[{len(tokenizer)}]"


def test_bytes_of_the_other_kind_of_tokenizer():
    vocab = {"<unk>": 0, "▁a": 1, **{f"<0x{b:02X}>": 2 + b for b in range(256)}}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    ids = [1, *(2 + b for b in "é".encode())]
    # é is C3 A9.
    assert text_tokens(tokenizer, ids) == [" a", "<0xC3>", "é"]
    assert [token_namer(tokenizer)(i) for i in ids] == [" a", "<0xC3>", "<0xA9>"]
    assert token_text(tokenizer, 1) == " a"
