import shutil

import pytest
import torch
from models.tiny_pairs import HOOK, N_CTX, TEXTS, save_adapter, save_model, save_tokenizer
from transformers import AutoTokenizer

from tl_crosscoder.models import tokenizer as tokenization
from tl_crosscoder.models.pair import ModelPair

CHAT = "{% for m in messages %}<|im|>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("kind", ["hooked", "llama", "gemma2"])
def test_one_bos_and_right_padding_whatever_the_tokenizer_likes(pairs, kind):
    pair = pairs[kind]
    tokens, mask = pair.to_tokens_and_mask(TEXTS)
    assert (tokens[:, 0] == pair.tokenizer.bos_token_id).all()
    assert (tokens == pair.tokenizer.bos_token_id).sum() == len(TEXTS)
    assert torch.equal(tokens == pair.tokenizer.pad_token_id, ~mask)
    for row, text in enumerate(TEXTS):
        assert torch.equal(tokens[row][mask[row]], pair.models[1].to_tokens(text)[0])


def test_a_bos_in_the_text_is_neither_doubled_nor_dropped(pairs):
    pair = pairs["llama"]
    plain = pair.encode(TEXTS[0])
    assert plain[0] == 0
    assert pair.encode("<s>" + TEXTS[0]) == plain
    assert pair.encode("<s>" + TEXTS[0], prepend_bos=False) == plain
    assert pair.encode(TEXTS[0], prepend_bos=False) == plain[1:]


def test_a_chat_template_with_bos_gets_no_second_one(pairs):
    pair = pairs["llama"]
    pair.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    messages = [{"role": "user", "content": TEXTS[0]}]
    text = pair.tokenizer.apply_chat_template(messages, tokenize=False)
    assert pair.encode(text) == pair.encode(TEXTS[0])


def test_the_end_of_text_token_is_no_bos(pairs):
    """TransformerLens writes it over the missing BOS of a Qwen tokenizer."""
    pair = pairs["qwen3"]
    assert pair.tokenizer.bos_token == "</s>"
    assert tokenization.own_bos_id(pair.tokenizer) is None
    assert pair.encode(TEXTS[0]) == pair.encode(TEXTS[0], prepend_bos=False)
    assert pair.encode(TEXTS[0])[0] != pair.tokenizer.bos_token_id


def test_one_string_is_a_batch_of_one(pairs):
    assert torch.equal(pairs["llama"].to_tokens(TEXTS[0]), pairs["llama"].to_tokens(TEXTS[:1]))


def test_length_is_an_error_unless_cut(pairs):
    pair = pairs["llama"]
    with pytest.raises(ValueError, match=f"context of {N_CTX}; split the text, or cut it"):
        pair.to_tokens(TEXTS[0] * 20)
    cut = pair.to_tokens(TEXTS[0] * 20, max_tokens=N_CTX)
    assert cut[0].tolist() == pair.encode(TEXTS[0] * 20)[:N_CTX]
    with pytest.raises(ValueError, match="of at least one token"):
        pair.to_tokens([])


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (
            {"bos_token": "<s>", "eos_token": "<end>"},
            r"in 2 tokens: '</s>' is 1 in the A and absent .* of \d+ and \d+ tokens",
        ),
        ({"eos_token": "</s>", "bos_token": "<s>"}, "'</s>' is 1 in the A and 0 in the B"),
        ({"pad_token": "<s>", "eos_token": "</s>", "bos_token": None}, r"\[0, .* for the A, \["),
    ],
)
def test_tokenizers_that_differ_are_refused(tmp_path, special, message):
    save_tokenizer(tmp_path / "a", bos_token="<s>", eos_token="</s>")
    save_tokenizer(tmp_path / "b", **special)
    pair = [AutoTokenizer.from_pretrained(tmp_path / name) for name in "ab"]
    with pytest.raises(ValueError, match=message) as caught:
        tokenization.check_same_tokenizer(*pair, labels=["A", "B"])
    assert "--tokenizer" in str(caught.value)


def test_another_end_of_text_or_padding_is_the_same_tokenizer(tmp_path):
    """As between a base model and the chat model made from it."""
    save_tokenizer(tmp_path / "a", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    save_tokenizer(tmp_path / "b", bos_token="<s>", pad_token="</s>", eos_token="<pad>")
    pair = [AutoTokenizer.from_pretrained(tmp_path / name) for name in "ab"]
    tokenization.check_same_tokenizer(*pair, labels=["A", "B"])
    encoded = [tokenization.encode(t, tokenization.PROBE_TEXT, prepend_bos=True) for t in pair]
    assert encoded[0] == encoded[1]


def save_chat_tokenizer(folder, base):
    """That of a base, with a token and a template more."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|im|>"], special_tokens=True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return len(tokenizer) - 1


def test_tokens_that_a_fine_tune_added_are_named_and_refused(folders, pairs, tmp_path):
    base, tuned = folders["llama"]
    shutil.copytree(tuned, tmp_path / "chat")
    added = save_chat_tokenizer(tmp_path / "chat", base)
    said = rf"share {added} tokens, and 1 are in some of them alone \('<\|im\|>'\)"
    with pytest.warns(UserWarning, match=said):
        pair = ModelPair.from_pretrained(base, tmp_path / "chat", hook_name=HOOK)
    assert pair.tokenizer.chat_template == CHAT
    tokens = pair.to_tokens(TEXTS)
    assert torch.equal(pair.activations(tokens), pairs["llama"].activations(tokens))
    for call in (pair.to_tokens, lambda _: pair.activations(torch.tensor([[0, added]]))):
        with pytest.raises(ValueError, match=r"1 of these tokens are '<\|im\|>', .*--tokenizer"):
            call("<|im|>a")


def test_a_model_without_a_tokenizer_takes_that_of_the_other(folders, tmp_path):
    base = save_model(tmp_path / "base", has_tokenizer=False)
    tuned = folders["llama"][1]
    with pytest.warns(UserWarning, match=f"'{base}' has no tokenizer: that of '{tuned}' is taken"):
        pair = ModelPair.from_pretrained(base, tuned, hook_name=HOOK)
    assert pair.tokenizer_name == str(tuned)
    again = ModelPair.from_sites(pair.sites, tokenizer=pair.tokenizer_name)
    tokens = again.to_tokens(TEXTS)
    assert torch.equal(again.activations(tokens), pair.activations(tokens))
    with pytest.warns(UserWarning, match=r"has no tokenizer, and no other .*--tokenizer"):
        ModelPair.from_pretrained(base, base, hook_name=HOOK)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:the tokenizers share:UserWarning")
def test_the_chat_template_beside_an_adapter_is_taken(folders, tmp_path):
    base = folders["llama"][0]
    adapter = save_adapter(tmp_path, base)
    save_chat_tokenizer(adapter, base)
    with pytest.warns(UserWarning, match="has no chat template: tokenizer and template of the ad"):
        pair = ModelPair.from_pretrained(base, adapter=adapter, hook_name=HOOK)
    assert pair.tokenizer.chat_template == CHAT
