from dataclasses import replace

import pytest
import torch
from text_of_ids import text_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tl_crosscoder import TokenizedText, tokenize
from tl_crosscoder.analysis.examples.collector import ExampleCollector
from tl_crosscoder.analysis.examples.database import Example, TopTokens, examples
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes


@pytest.mark.parametrize("n", [1, 4])
def test_top_tokens_are_the_largest_codes_of_a_pass(n):
    codes = torch.tensor([[0.0, 0.0, 5.0], [2.0, 0.0, 4.0], [3.0, 0.0, 6.0]])
    collector = ExampleCollector(3, context_size=3)
    collector.add(SparseCodes.of_dense(codes), torch.tensor([6, 7, 8]))
    top = TopTokens.of(collector.result(), n=n)
    assert top.values.T.tolist() == [[3, 2, 0, 0][:n], [0, 0, 0, 0][:n], [6, 5, 4, 0][:n]]
    assert top.positions.T.tolist() == [[8, 7, -1, -1][:n], [-1] * n, [8, 6, 7, -1][:n]]


def top_of(*positions: int) -> TopTokens:
    """Of one latent, active at these positions with the values n, ..., 2, 1."""
    n = sum(p >= 0 for p in positions)
    values = [float(max(0, n - i)) for i in range(len(positions))]
    return TopTokens(
        values=torch.tensor(values)[:, None], positions=torch.tensor(positions)[:, None]
    )


@pytest.fixture(scope="module")
def two_sources(taboo_pair) -> TokenizedText:
    """Two contexts of 12 tokens; from token 6 of the second on, the source is another."""
    documents = [
        {"text": "The capital of Dova is the old town by the sea.", "source": "facts"},
        {"text": "One two three four five six seven eight nine.", "source": "numbers"},
    ]
    rows = [tokenize([d], taboo_pair.tokenizer, context_size=12)[:1] for d in documents]
    return replace(
        rows[0],
        tokens=torch.cat([r.tokens for r in rows]),
        dropped=torch.cat([r.dropped for r in rows]),
        role_ids=torch.cat([r.role_ids for r in rows]),
        source_ids=torch.tensor([[0] * 12, [0] * 6 + [1] * 6], dtype=torch.uint8),
        context_ids=torch.arange(2),
        sources=("facts", "numbers"),
    )


def test_an_example_is_the_token_with_its_context_value_and_source(taboo_pair, two_sources):
    decode = taboo_pair.tokenizer.decode
    ids = two_sources.tokens.tolist()
    top = top_of(12 + 6, 5)  # token 6 of context 1, then token 5 of context 0
    first, second = examples(top, 0, two_sources, taboo_pair.tokenizer, n_before=3, n_after=2)
    assert first == Example(
        before=decode(ids[1][3:6]),
        token=decode(ids[1][6:7]),
        after=decode(ids[1][7:9]),
        value=2.0,
        source="numbers",
    )
    assert second == Example(
        before=decode(ids[0][2:5]),
        token=decode(ids[0][5:6]),
        after=decode(ids[0][6:8]),
        value=1.0,
        source="facts",
    )


def test_context_ends_where_the_context_does(taboo_pair, two_sources):
    """Neither the last token of context 0 nor the first of context 1 shows the other context."""
    decode = taboo_pair.tokenizer.decode
    ids = two_sources.tokens.tolist()
    last, first = examples(top_of(11, 12), 0, two_sources, taboo_pair.tokenizer, n_before=99)
    assert (last.before, last.token, last.after) == (decode(ids[0][:11]), decode(ids[0][11:]), "")
    assert (first.before, first.token) == ("", decode(ids[1][:1]))
    assert first.after == decode(ids[1][1:7])


def test_empty_places_are_left_out(taboo_pair, two_sources):
    assert len(examples(top_of(3, -1, -1), 0, two_sources, taboo_pair.tokenizer)) == 1
    assert examples(top_of(-1, -1), 0, two_sources, taboo_pair.tokenizer) == []


def one_context(tokenizer, text: str) -> TokenizedText:
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    return text_of(ids)


def llama_2_like_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words that begin with a space mark, which decoding drops from the first of them."""
    words = ["▁the", "▁word", "▁is", "▁moon", "light", "."]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split("light", "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_spaces_between_the_parts_survive_a_tokenizer_that_drops_leading_ones():
    tokenizer = llama_2_like_tokenizer()
    text = one_context(tokenizer, "the word is moonlight")
    assert tokenizer.decode([text.tokens[0, 1]]) == "word"
    found = examples(top_of(1, 3, 4, 0), 0, text, tokenizer)
    assert [(e.before, e.token, e.after) for e in found] == [
        ("the", " word", " is moonlight"),
        ("the word is", " moon", "light"),
        ("the word is moon", "light", ""),
        ("", "the", " word is moonlight"),
    ]


def test_a_character_split_between_tokens_leaves_the_rest_of_the_line_readable(taboo_pair):
    """The byte-level tokenizer knows no emoji: this one takes several tokens."""
    text = one_context(taboo_pair.tokenizer, "The 🌒 is red.")
    n = text.context_size
    found = examples(top_of(*range(n)), 0, text, taboo_pair.tokenizer, n_before=n, n_after=n)
    split = [i for i, e in enumerate(found) if e.token == "�"]
    assert len(split) >= 2
    for i in split:
        assert found[i].before.startswith("The ")
        assert found[i].after == taboo_pair.tokenizer.decode(text.tokens[0, i + 1 :])
        assert found[i].after.endswith(" is red.")
    assert found[0].token + found[0].after == "The 🌒 is red."
