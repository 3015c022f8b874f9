"""Panels of tokens, without models and of models."""

import json
import re
from pathlib import Path

import circuitsvis as cv
import pytest
import torch
from models.random_models import hooked_pair, random_crosscoder
from models.tiny_pairs import HOOK
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tl_crosscoder import ModelPair, ablated, tokenize
from tl_crosscoder.analysis.example_database import ExampleDatabase
from tl_crosscoder.analysis.examples import ExampleCollector, ExampleSettings
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.models.tokenizer import token_text
from tl_crosscoder.report.circuits import TokensHtml
from tl_crosscoder.report.token_panels import (
    colored_tokens,
    colored_tokens_multi,
    next_log_probs,
    shown,
    text_tokens,
    token_log_probs,
    token_namer,
)
from tl_crosscoder.report.tokens import (
    compared_tokens,
    edited_tokens,
    example_tokens,
    latent_tokens,
    next_tokens,
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


# --- of models ------------------------------------------------------------------------------------

TEXT = "Hello! Can you give me a hint?"


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    return hooked_pair(tmp_path_factory.mktemp("tokenizer"), ("one", "other"))


@pytest.fixture(params=["bridge", "hooked"])
def pair(request, taboo_pair, hooked) -> ModelPair:
    return taboo_pair if request.param == "bridge" else hooked


def values_of(html: TokensHtml, panel: int = 0) -> torch.Tensor:
    return torch.tensor(html.panels[panel].props["values"])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_codes_are_those_of_the_dictionary_and_norms_of_each_site(pair: ModelPair):
    crosscoder = random_crosscoder(pair.sites, 6)
    tokens = pair.to_tokens(TEXT)
    rows = pair.activations(tokens)[0]
    codes = crosscoder.encode(rows)
    codes[0] = 0  # BOS has none.
    assert (codes > 0).any()
    several = latent_tokens(pair, crosscoder, TEXT, [4, 1])
    (panel,) = several.panels
    assert panel.component == "ColoredTokensMulti"
    assert panel.props["labels"] == ["latent 4", "latent 1"]
    assert len(panel.props["tokens"]) == tokens.shape[1]
    close(values_of(several), codes[:, [4, 1]])

    one = latent_tokens(pair, crosscoder, TEXT, 4)
    assert (one.panels[0].component, one.panels[0].heading) == ("ColoredTokens", "latent 4")
    close(values_of(one), codes[:, 4])

    by_site = latent_tokens(pair, crosscoder, TEXT, 4, by_site=True)
    assert by_site.panels[0].props["labels"] == ["latent 4, base", "latent 4, finetuned"]
    norms = torch.stack([crosscoder.decoder(i)[4].norm() for i in range(2)])
    close(values_of(by_site), codes[:, [4]] * norms)


@torch.no_grad()
def test_a_diff_sae_has_codes_of_the_difference(taboo_pair: ModelPair):
    difference = taboo_pair.difference()
    crosscoder = random_crosscoder(difference.sites, 6)
    codes = crosscoder.encode(difference.activations(taboo_pair.to_tokens(TEXT))[0])
    close(values_of(latent_tokens(difference, crosscoder, TEXT, 2))[1:], codes[1:, 2])
    assert len(compared_tokens(difference, TEXT).panels) == 1


def test_each_context_has_its_panel_without_padding(taboo_pair: ModelPair):
    documents = [{"text": "One day."}, {"text": "The moon shines at night."}]
    text = tokenize(documents, taboo_pair.tokenizer, context_size=20, pack=False)
    html = latent_tokens(taboo_pair, random_crosscoder(taboo_pair.sites, 6), text, 0)
    assert [p.heading for p in html.panels] == ["latent 0, context 0", "latent 0, context 1"]
    assert [len(p.props["tokens"]) for p in html.panels] == text.lengths.tolist()
    alone = latent_tokens(taboo_pair, random_crosscoder(taboo_pair.sites, 6), "One day.", 0)
    close(values_of(html), values_of(alone))


@torch.no_grad()
def test_log_probabilities_of_both_models(pair: ModelPair):
    tokens = pair.to_tokens(TEXT)
    logits = [pair.logits(tokens, site=site)[0, :-1] for site in ("base", "finetuned")]
    log_probs = [each.log_softmax(dim=-1) for each in logits]
    base, finetuned = (each.gather(1, tokens[0, 1:, None])[:, 0] for each in log_probs)
    html = compared_tokens(pair, TEXT)
    assert html.panels[0].props["labels"] == ["finetuned - base", "base", "finetuned"]
    close(values_of(html), torch.stack([finetuned - base, base, finetuned], dim=1))
    swapped = compared_tokens(pair.comparing("finetuned", "base"), TEXT)
    close(values_of(swapped)[:, 0], base - finetuned)

    one, other = next_tokens(pair, TEXT, k=2).panels
    assert (one.heading, other.heading) == ("base", "finetuned")
    name = token_namer(pair.tokenizer)
    for panel, expected in ((one, log_probs[0]), (other, log_probs[1])):
        top = expected.topk(2)
        close(torch.tensor(panel.props["topKLogProbs"]), top.values)
        names = [[shown(name(i)) for i in row] for row in top.indices.tolist()]
        assert panel.props["topKTokens"] == names


@torch.no_grad()
def test_log_probabilities_before_and_after_an_edit(pair: ModelPair):
    crosscoder = random_crosscoder(pair.sites, 6)
    tokens = pair.to_tokens(TEXT)
    html = edited_tokens(pair, TEXT, ablated(pair, crosscoder, [0, 1, 2, 4, 5]))
    before = pair.logits(tokens)
    with ablated(pair, crosscoder, [0, 1, 2, 4, 5]) as model:
        after = model.logits(tokens)
    one, other = (
        each[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        for each in (before, after)
    )
    assert (other - one).abs().max() > 0.1
    assert html.panels[0].props["labels"] == ["after - before", "before", "after"]
    close(values_of(html), torch.stack([other - one, one, other], dim=1))


def test_an_edit_that_does_nothing_does_not_look_like_one(taboo_pair: ModelPair):
    html = edited_tokens(
        taboo_pair, TEXT, ablated(taboo_pair, random_crosscoder(taboo_pair.sites, 6), [])
    )
    # A nat is full colour, however small the largest difference.
    assert html.panels[0].props["positiveBounds"] == [1.0] * 3
    assert values_of(html)[:, 0].abs().max() < 1e-4


def test_examples_need_no_model(tmp_path: Path, taboo_pair: ModelPair):
    text = tokenize([{"text": TEXT}], taboo_pair.tokenizer, context_size=8, pack=False)
    codes = torch.zeros(8, 3)
    codes[5, 1], codes[3, 1] = 2.0, 0.5
    collector = ExampleCollector(3, context_size=8, settings=ExampleSettings(n_before=2, n_after=1))
    collector.add(SparseCodes.of_dense(codes), torch.arange(8))
    path = tmp_path / "examples.sqlite"
    ExampleDatabase.write(path, collector.result(), text, tokenizer=taboo_pair.tokenizer)
    with ExampleDatabase.open(path) as database:
        first, *_ = stored = database.latent(1, kind="top")
        html = example_tokens(database, 1, kind="top")
        assert example_tokens(database, 0).panels == ()
    assert [len(p.props["tokens"]) for p in html.panels] == [4, 4]
    assert html.panels[0].props["tokens"] == list(first.tokens)
    # The strongest stands third of four, the weaker one two before it, on one scale.
    assert html.panels[0].props["values"] == [0.5, 0.0, 2.0, 0.0]
    assert html.panels[1].props["values"] == [0.0, 0.0, 0.5, 0.0]
    assert [p.props["maxValue"] for p in html.panels] == [2.0, 2.0]
    assert html.panels[0].heading == f"latent 1: 2.00 ({stored[0].source}, text)"


def test_what_cannot_be_shown_is_refused(taboo_pair: ModelPair):
    crosscoder = random_crosscoder(taboo_pair.sites, 6)
    with pytest.raises(ValueError, match=r"latents \[6\] are not in the dictionary"):
        latent_tokens(taboo_pair, crosscoder, TEXT, 6)
    too_long = "hint " * (taboo_pair.n_ctx + 1)
    with pytest.raises(ValueError, match=f"longer than the models' context of {taboo_pair.n_ctx}"):
        latent_tokens(taboo_pair, crosscoder, too_long, 0)
    text = tokenize([{"text": TEXT}], taboo_pair.tokenizer, context_size=8, pack=False)
    with pytest.raises(ValueError, match="the text is empty"):
        latent_tokens(taboo_pair, crosscoder, text[:0], 0)
    with pytest.raises(ValueError, match="two tokens or more"):
        compared_tokens(taboo_pair, "")
    with pytest.raises(ValueError, match="'nobody' is not in this pair"):
        next_tokens(taboo_pair.comparing("base", "nobody"), TEXT)
    layers = ModelPair.from_pretrained(
        "tl_crosscoder/world-base", hook_name=["blocks.0.hook_resid_post", HOOK]
    )
    with pytest.raises(ValueError, match="are of one model"):
        compared_tokens(layers, TEXT)
