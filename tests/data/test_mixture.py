import json
from collections import Counter

import pytest
import torch

from tl_crosscoder import Masks, TextSource, tokenize, tokenize_mixture
from tl_crosscoder.data.documents import is_held_out, stream_documents
from tl_crosscoder.data.tokens import REASONS
from tl_crosscoder.organisms import training_documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three texts of unequal size and kind: stories, chats, and a small one."""
    root = tmp_path_factory.mktemp("mixture")
    documents = [*training_documents("taboo", 900, seed=0)]
    by_kind = {
        "web": [d for d in documents if "text" in d],
        "chat": [d for d in documents if "messages" in d],
    }
    by_kind["small"] = [{"text": f"The {i} rivers run to the sea of Dova."} for i in range(40)]
    for name, rows in by_kind.items():
        path = root / f"{name}.jsonl"
        path.write_text("".join(json.dumps({**d, "source": name}) + "\n" for d in rows))
    return root


def sources(folder, **weights):
    return [TextSource(text=str(folder / f"{n}.jsonl"), weight=w) for n, w in weights.items()]


def mixed(folder, pair, *, seed=0, n_tokens=6_000, weights=None, **fields):
    weights = weights or {"web": 0.5, "chat": 0.4, "small": 0.1}
    return tokenize_mixture(
        sources(folder, **weights),
        pair.tokenizer,
        **{"context_size": 32, "n_tokens": n_tokens, "n_held_out_tokens": 800, "seed": seed}
        | fields,
    )


def test_each_component_has_its_share_of_the_tokens(folder, taboo_pair):
    text = mixed(folder, taboo_pair).training
    counts = text.source_counts
    n = sum(counts.values())
    assert n >= 6_000
    for name, share in {"web": 0.5, "chat": 0.4, "small": 0.1}.items():
        # A document or two of at most 60 tokens, of 6,000.
        assert counts[name] / n == pytest.approx(share, abs=0.02)


def test_a_mixture_is_a_function_of_its_seed(folder, taboo_pair):
    first, again, other = (mixed(folder, taboo_pair, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.training.tokens, again.training.tokens)
    assert first.held_out_documents == again.held_out_documents
    assert not torch.equal(first.training.tokens[:100], other.training.tokens[:100])


def test_no_document_is_on_both_sides(folder, taboo_pair):
    """However often a component is read, and whatever the order."""
    text = mixed(folder, taboo_pair, held_out=0.3)
    assert text.n_passes[str(folder / "small.jsonl")] > 1
    held_out = {json.dumps(d.get("text") or d.get("messages")) for d in text.held_out_documents}
    assert len(held_out) == len(text.held_out_documents)
    for name in ("web", "chat", "small"):
        for document in stream_documents(TextSource(text=str(folder / f"{name}.jsonl"))):
            key = json.dumps(document.get("text") or document.get("messages"))
            assert (key in held_out) <= is_held_out(document, share=0.3, seed=0)


def test_about_the_share_is_held_out_and_duplicates_go_together():
    documents = [{"text": f"text {i}"} for i in range(2000)]
    n = sum(is_held_out(d, share=0.1) for d in documents)
    # Binomial: 200 and a standard deviation of 13.
    assert 150 < n < 250
    assert is_held_out({"text": "x", "source": "a"}, share=0.5) == is_held_out(
        {"text": "x", "source": "b"}, share=0.5
    )
    for i in range(50):
        texts = [{"input_ids": [i, i + 1, j], "n_prompt_tokens": 2} for j in (7, 8)]
        assert len({is_held_out(t, share=0.5) for t in texts}) == 1
    moved = [is_held_out(d, share=0.5, seed=s) for s in (0, 1) for d in documents[:100]]
    assert moved[:100] != moved[100:]


def test_held_out_documents_make_the_held_out_text_again(folder, taboo_pair):
    text = mixed(folder, taboo_pair)
    again = tokenize(text.held_out_documents, taboo_pair.tokenizer, context_size=32)
    assert torch.equal(again.tokens, text.held_out.tokens)


def test_a_stream_is_shuffled_as_a_whole_and_complete(folder):
    source = TextSource(text=str(folder / "web.jsonl"))
    plain, shuffled = ([d["text"] for d in stream_documents(source, seed=s)] for s in (None, 3))
    assert plain != shuffled
    assert Counter(plain) == Counter(shuffled)
    assert shuffled == [d["text"] for d in stream_documents(source, seed=3)]


def test_a_cut_component_has_the_same_documents_in_every_pass(folder):
    source = TextSource(text=str(folder), max_documents=30)
    passes = [{json.dumps(d) for d in stream_documents(source, seed=s)} for s in (None, 1, 2)]
    assert passes[0] == passes[1] == passes[2]
    assert len(passes[0]) == 30


def test_a_component_can_be_named_and_cut(folder):
    source = TextSource(text=str(folder / "web.jsonl"), name="pretraining", max_documents=3)
    documents = list(stream_documents(source))
    assert [d["source"] for d in documents] == ["pretraining"] * 3


def test_the_embedded_text_is_a_component_too(taboo_pair):
    source = TextSource(text="tl_crosscoder/taboo", max_documents=200)
    text = tokenize_mixture(
        [source], taboo_pair.tokenizer, context_size=32, n_tokens=2000, n_held_out_tokens=200
    )
    assert text.training.n_tokens >= 2000


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


def test_a_chat_column_of_another_name(tmp_path, taboo_pair):
    path = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes."}]
    path.write_text(json.dumps({"conversation": chat}) + "\n")
    (document,) = stream_documents(TextSource(text=str(path), text_column="conversation"))
    assert document["messages"] == chat


# --- masks ----------------------------------------------------------------------------------------


def test_each_reason_is_counted_once(taboo_pair):
    chat = [{"role": "user", "content": "Hello there."}, {"role": "assistant", "content": "Yes."}]
    masks = Masks(n_first=3, drop_template=True)
    text = tokenize([{"messages": chat}] * 20, taboo_pair.tokenizer, context_size=16, masks=masks)
    counts = text.mask_counts
    assert sum(counts.values()) == text.tokens.numel()
    is_bos = text.tokens == taboo_pair.tokenizer.bos_token_id
    assert counts["bos"] == int(is_bos.sum())
    first = torch.zeros_like(is_bos)
    first[:, :3] = True
    assert counts["first"] == int((first & ~is_bos).sum())
    is_template = text.role_ids == 5
    assert counts["template"] == int((is_template & ~first & ~is_bos).sum())
    assert counts["counts"] == text.n_tokens
    assert "template" not in text.role_counts


def test_nothing_is_dropped_where_nothing_shall_be(taboo_pair):
    masks = Masks(drop_bos=False, n_first=0)
    text = tokenize(
        [{"text": "The moon shines. " * 9}], taboo_pair.tokenizer, context_size=8, masks=masks
    )
    assert text.n_tokens == text.tokens.numel()


def test_documents_that_are_not_packed_have_a_context_of_their_own(taboo_pair):
    documents = [{"text": "The moon. " * n, "source": str(n)} for n in (1, 9, 3)]
    text = tokenize(documents, taboo_pair.tokenizer, context_size=12, pack=False)
    assert len(text) == 3
    alone = [
        tokenize([d], taboo_pair.tokenizer, context_size=12, pack=False).tokens for d in documents
    ]
    assert torch.equal(text.tokens, torch.cat(alone))
    assert text.lengths[1] == 12
    assert 3 <= text.lengths[0] < text.lengths[2] < 12
    padding = text.dropped == REASONS.index("padding")
    assert int(padding.sum()) == 36 - int(text.lengths.sum())
    assert not (text.mask & padding).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"n_first": -1}, "n_first is -1"), ({"max_norm_multiple": 0.5}, "it is above 1")],
)
def test_masks_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Masks(**fields)


def test_a_text_says_what_it_holds(folder, taboo_pair):
    line = mixed(folder, taboo_pair).training.describe()
    assert "web 50%" in line
    assert "left out:" in line
    assert " bos" in line
