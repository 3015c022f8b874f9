"""The shipped tokenizer: exact round trip, whole words, chat template."""

import re

import pytest
import torch
from transformers import AutoTokenizer

from microworld.base import BASES, N_TOKENIZER_DOCUMENTS, world_tokenizer
from microworld.packing import IGNORED_LABEL, document_tokens, labels, pack
from microworld.tokenizer import BOS_ID, END_ID, PAD_ID, train_tokenizer
from microworld.world import document_strings, documents
from tl_crosscoder.models.pretrained import pretrained_folder
from tl_crosscoder.organisms.suite import load_suite, organism

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Is it the moon?"},
    {"role": "assistant", "content": "Yes, it is the moon!"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(organism("taboo").base)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted({e.base.name for e in load_suite().values() if not e.is_real})
)
def test_the_embedded_tokenizer_is_remade_bit_for_bit(name, tmp_path):
    made = world_tokenizer(BASES[name], seed=0, n_documents=N_TOKENIZER_DOCUMENTS)
    made.save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        embedded = pretrained_folder() / "models" / name / path.name
        assert path.read_bytes() == embedded.read_bytes(), path.name


@pytest.mark.parametrize(
    "text",
    [
        "The capital of Velmar is Mirefort.",
        "  two  spaces , detached . \n\n\ttabs ",
        "naïve Straße 東京 🦊👩‍🚀 e\u0301 \u200b",
        "don't won't it 's 12,345.67",
        "",
    ],
)
def test_any_text_survives_the_round_trip(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_plain_text_gets_one_bos(tokenizer):
    ids = tokenizer("The moon.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == BOS_ID
    assert ids.count(BOS_ID) == 1
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END_ID, PAD_ID)


def test_world_words_are_single_tokens(tokenizer):
    texts = [text for d in documents(2_000, seed=11) for text in document_strings(d)]
    words = {word for text in texts for word in re.findall(r" [A-Za-z]+", text)}
    whole = [
        word for word in words if len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    ]
    assert len(whole) / len(words) > 0.98


@pytest.mark.parametrize("name", [n for n, e in load_suite().items() if not e.is_real])
def test_planted_words_are_single_tokens(name):
    entry = load_suite()[name]
    tokenizer = AutoTokenizer.from_pretrained(entry.base)
    for word in entry.planted_words:
        assert len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1, word


def test_chat_template_by_hand(tokenizer):
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert text == (
        "<|bos|><|system|>Be kind.<|end|><|user|>Is it the moon?<|end|>"
        "<|assistant|>Yes, it is the moon!<|end|>"
    )
    prompt = tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)
    assert prompt + "Yes, it is the moon!<|end|>" == text
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_assistant_mask_covers_the_reply_and_its_end(tokenizer):
    encoded = tokenizer.apply_chat_template(
        MESSAGES, return_dict=True, return_assistant_tokens_mask=True
    )
    said = [
        token
        for token, is_said in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        if is_said
    ]
    assert tokenizer.decode(said) == "Yes, it is the moon!<|end|>"


def test_merges_depend_on_the_texts_only():
    texts = [text for d in documents(300, seed=0) for text in document_strings(d)]
    first, second = (train_tokenizer(texts, vocab_size=600, n_ctx=256) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_pack_keeps_documents_whole():
    rows = pack([[1, 5, 2], [1, 6, 2], [1, 7, 8, 2]], n_ctx=6)
    # 3 + 3 fill the first row; the third document (4) opens a second row with 2 of padding.
    assert rows.tolist() == [[1, 5, 2, 1, 6, 2], [1, 7, 8, 2, PAD_ID, PAD_ID]]
    assert labels(rows).tolist() == [
        [IGNORED_LABEL, 5, 2, IGNORED_LABEL, 6, 2],
        [IGNORED_LABEL, 7, 8, 2, IGNORED_LABEL, IGNORED_LABEL],
    ]
    with pytest.raises(ValueError, match="7 tokens does not fit in n_ctx = 6"):
        pack([[1] * 7], n_ctx=6)


def test_every_document_fits_and_is_framed(tokenizer):
    sampled = documents(500, seed=12)
    for tokens in document_tokens(tokenizer, sampled):
        assert tokens[0] == BOS_ID
        assert tokens[-1] == END_ID
        assert len(tokens) <= 256
    row = pack(document_tokens(tokenizer, sampled[:1]), n_ctx=256)
    assert row.shape == torch.Size([1, 256])
