from pathlib import Path

import pytest
import torch
from models.random_models import hooked_pair, random_crosscoder
from models.tiny_pairs import HOOK

from tl_crosscoder import ModelPair, ablated, tokenize
from tl_crosscoder.analysis.example_database import ExampleDatabase
from tl_crosscoder.analysis.examples import ExampleCollector, ExampleSettings
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.report.circuits import TokensHtml
from tl_crosscoder.report.token_panels import shown, token_namer
from tl_crosscoder.report.tokens import (
    compared_tokens,
    edited_tokens,
    example_tokens,
    latent_tokens,
    next_tokens,
)

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
