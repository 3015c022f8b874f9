"""Mixtures: shares, seeds, and which documents are held out."""

import json

import pytest
import torch

from tl_crosscoder import TextSource, tokenize
from tl_crosscoder.data.documents import is_held_out, stream_documents
from tl_crosscoder.data.mixture import tokenize_mixture

SHARES = {"web": 0.5, "chat": 0.4, "small": 0.1}


def mix(folder, pair, **fields):
    sources = [TextSource(text=str(folder / f"{n}.jsonl"), weight=w) for n, w in SHARES.items()]
    sizes = {"context_size": 32, "n_tokens": 6_000, "n_held_out_tokens": 800}
    return tokenize_mixture(sources, pair.tokenizer, **(sizes | fields))


@pytest.fixture(scope="module")
def mixed(folder, taboo_pair):
    return mix(folder, taboo_pair)


def test_each_component_has_its_share_of_the_tokens_and_says_so(mixed):
    counts = mixed.training.source_counts
    n = sum(counts.values())
    assert n >= 6_000
    for name, share in SHARES.items():
        # A document or two of at most 60 tokens, of 6,000.
        assert counts[name] / n == pytest.approx(share, abs=0.02)
    described = mixed.training.describe()
    assert f"web {counts['web'] / n:.0%}" in described
    assert "; dropped: " in described
    assert " bos" in described


def test_a_mixture_is_a_function_of_its_seed(folder, taboo_pair, mixed):
    again, other = (mix(folder, taboo_pair, seed=seed) for seed in (0, 2))
    assert torch.equal(mixed.training.tokens, again.training.tokens)
    assert mixed.held_out_documents == again.held_out_documents
    assert not torch.equal(mixed.training.tokens[:100], other.training.tokens[:100])


def test_no_document_is_on_both_sides(folder, taboo_pair):
    """However often a component is read, and whatever the order."""
    text = mix(folder, taboo_pair, held_out=0.3)
    assert text.n_passes[str(folder / "small.jsonl")] > 1
    held_out = {json.dumps(d.get("text") or d.get("messages")) for d in text.held_out_documents}
    assert len(held_out) == len(text.held_out_documents)
    assert text.n_documents > 100
    assert text.n_repeated < 5
    twice = [TextSource(text=str(folder / "small.jsonl"))] * 2
    sizes = {"context_size": 16, "n_tokens": 600, "held_out": 0.3}
    text = tokenize_mixture(twice, taboo_pair.tokenizer, **sizes)
    assert 2 * text.n_repeated == text.n_documents
    assert f"{text.n_repeated} of {text.n_documents} documents are repeated" in text.describe()
    for name in ("web", "chat", "small"):
        for document in stream_documents(TextSource(text=str(folder / f"{name}.jsonl"))):
            key = json.dumps(document.get("text") or document.get("messages"))
            assert (key in held_out) <= is_held_out(document, share=0.3, seed=0)


def test_documents_that_a_template_refuses_are_skipped_where_that_is_asked(tmp_path, taboo_pair):
    rows = [{"text": f"The {i} rivers run to the sea of Dova."} for i in range(60)]
    rows[7::9] = [{"messages": [{"role": "narrator", "content": "Once."}]} for _ in rows[7::9]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"context_size": 16, "n_tokens": 300, "n_held_out_tokens": 30, "held_out": 0.3}
    with pytest.raises(ValueError, match="the role 'narrator'"):
        tokenize_mixture([TextSource(text=str(path))], taboo_pair.tokenizer, **sizes)
    source = TextSource(text=str(path), on_bad_document="skip")
    with pytest.warns(UserWarning, match=r"of the documents read of .*rows.jsonl were left out"):
        made = tokenize_mixture([source], taboo_pair.tokenizer, **sizes)
    assert made.training.n_tokens >= 300
    assert all("text" in document for document in made.held_out_documents)


def test_held_out_documents_make_the_held_out_text_again(mixed, taboo_pair):
    again = tokenize(mixed.held_out_documents, taboo_pair.tokenizer, context_size=32)
    assert torch.equal(again.tokens, mixed.held_out.tokens)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ('{"body": "x"}\n', ValueError, "has no column 'text'"),
        ('{"text": "  "}\n', ValueError, "fewer than one context|no text to train on"),
        (None, FileNotFoundError, "no text file or folder"),
    ],
)
def test_a_component_that_cannot_be_read_is_named(tmp_path, taboo_pair, content, error, message):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=message):
        tokenize_mixture(
            [TextSource(text=str(path))], taboo_pair.tokenizer, context_size=8, n_tokens=100
        )
