import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tl_crosscoder.models.tokenizer import token_pieces


def llama_2_like_tokenizer() -> PreTrainedTokenizerFast:
    """Words that begin with a space mark, which decoding drops from the first of them."""
    words = {w: i for i, w in enumerate(["▁the", "▁moon", "light", "."])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="."))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_pieces_keep_the_spaces_that_decoding_one_token_drops():
    tokenizer = llama_2_like_tokenizer()
    assert tokenizer.decode([1]) == "moon"
    assert token_pieces(tokenizer, [0, 1, 2, 0, 3]) == ["the", " moon", "light", " the", "."]
    assert token_pieces(tokenizer, []) == []


@pytest.mark.parametrize(
    "text",
    ["\N{CRESCENT MOON}" * 9 + " ÉTÉ", "\N{REPLACEMENT CHARACTER}" * 20 + " the moon", "é", " é "],
)
def test_pieces_of_split_characters_are_together_the_text(taboo_pair, text):
    """Characters of several tokens, and text that looks as if one never came to its end."""
    tokenizer = taboo_pair.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids) > len(text.split())
    assert "".join(pieces) == text
