"""Contexts of token ids, and which of their tokens are kept."""

import copy

import pytest
import torch

from tl_crosscoder import tokenize
from tl_crosscoder.config.inputs import Masks
from tl_crosscoder.data.tokens import DROP_REASONS


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_contexts_are_full_begin_with_bos_and_keep_every_token_in_order(taboo_pair):
    tokenizer = taboo_pair.tokenizer
    bos = tokenizer.bos_token_id
    texts = ["The moon shines at night. " * 5, "A river runs to the sea. " * 7]
    documents = [{"text": t, "source": s} for t, s in zip(texts, "ab", strict=True)]
    made = tokenize(documents, tokenizer, context_size=16)
    assert made.tokens.shape[1] == 16
    assert (made.tokens[:, 0] == bos).all()
    stream = [t for text in texts for t in [bos, *ids(tokenizer, text)]]
    kept = [t for row in made.tokens.tolist() for t in row if t != bos]
    assert kept == [t for t in stream if t != bos][: len(kept)]
    assert len(kept) > len(stream) - 20
    assert not made.mask[made.tokens == bos].any()
    assert made.n_tokens == int(made.mask.sum()) == len(kept)
    for row, origins in zip(made.tokens.tolist(), made.source_ids.tolist(), strict=True):
        if bos in row[1:]:
            at = row.index(bos, 1)
            assert set(origins[:at]) == {0}
            assert set(origins[at:]) == {1}


def test_chats_go_through_the_template_with_one_bos(taboo_pair):
    tokenizer = taboo_pair.tokenizer
    chat = [{"role": "user", "content": "Give me a hint."}, {"role": "assistant", "content": "No."}]
    made = tokenize([{"messages": chat}] * 4, tokenizer, context_size=8)
    text = tokenizer.decode(made.tokens[0])
    assert text.count(tokenizer.bos_token) == 1
    assert text.startswith(tokenizer.bos_token + "<|user|>")


def test_a_tokenizer_without_bos_gets_none(taboo_pair):
    tokenizer = copy.deepcopy(taboo_pair.tokenizer)
    tokenizer.bos_token = tokenizer.init_kwargs["bos_token"] = None
    text = "The moon shines at night. " * 5
    made = tokenize([{"text": text}], tokenizer, context_size=8)
    assert made.tokens[0].tolist() == ids(tokenizer, text)[:8]
    assert made.mask[:, 1:].all()
    assert not made.mask[:, 0].any()


def test_text_that_cannot_be_tokenised_is_refused(taboo_pair):
    tokenizer = copy.deepcopy(taboo_pair.tokenizer)
    for size, message in (
        (512, r"only \d+ tokens, fewer than one context of 512"),
        (1, "is 1; it"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize([{"text": "Too short."}], tokenizer, context_size=size)
    chat = {"messages": [{"role": "system", "content": "Be kind."}], "source": "a"}
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match=r"refuses a chat of 'a' .*not supported.*\['system'\]"):
        tokenize([chat], tokenizer, context_size=4)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        tokenize([chat], tokenizer, context_size=4)


def test_rare_sources_become_one(taboo_pair):
    text = "The moon shines at night. "
    documents = [{"text": text, "source": f"url {i // 2}"} for i in range(200)]
    documents += [{"text": text, "source": "common"}] * 5
    made = tokenize(documents, taboo_pair.tokenizer, context_size=8)
    assert len(made.sources) == 64
    assert made.sources[-1] == "other"
    assert "common" in made.sources
    assert made.source_ids.max() == 63


def test_indexing_keeps_tokens_masks_and_sources_together(texts):
    text, _ = texts
    some = text[torch.tensor([5, 2])]
    assert torch.equal(some.tokens[1], text.tokens[2])
    assert torch.equal(some.source_ids[0], text.source_ids[5])
    assert some.sources == text.sources


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
    assert counts["kept"] == text.n_tokens
    assert "template" not in text.role_counts
    nothing = Masks(drop_bos=False, n_first=0)
    text = tokenize([{"messages": chat}] * 9, taboo_pair.tokenizer, context_size=8, masks=nothing)
    assert text.n_tokens == text.tokens.numel()


def test_documents_that_are_not_packed_have_one_context_each(taboo_pair):
    documents = [{"text": "The moon. " * n, "source": str(n)} for n in (1, 9, 3)]
    how = {"context_size": 12, "pack": False}
    text = tokenize(documents, taboo_pair.tokenizer, **how)
    assert len(text) == 3
    alone = [tokenize([d], taboo_pair.tokenizer, **how).tokens for d in documents]
    assert torch.equal(text.tokens, torch.cat(alone))
    assert text.lengths[1] == 12
    assert 3 <= text.lengths[0] < text.lengths[2] < 12
    padding = text.dropped == DROP_REASONS.index("padding")
    assert int(padding.sum()) == 36 - int(text.lengths.sum())
    assert not (text.mask & padding).any()
