"""The same promises on real, trained models, where a wrong position or BOS shows in the text."""

import pytest

from tl_crosscoder.models.pair import ModelPair

TEXTS = ["Once upon a time, there was a little girl", "Lily and Tom"]


@pytest.fixture(scope="module", params=["stories260K", "TinyStories-656K"])
def pair(request, shared_models):
    """A model against itself: the null of every comparison."""
    folder = shared_models / request.param
    return ModelPair.from_pretrained(folder, folder, hook_name="blocks.1.hook_resid_post")


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_text_is_that_of_transformers(pair, use_past_kv_cache):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(pair.sites[0].model_name)
    for text in TEXTS:
        tokens = pair.to_tokens(text)
        expected = reference.generate(tokens, max_new_tokens=20, do_sample=False)[0]
        [(prompt, new)] = pair.generate_tokens(
            text, max_new_tokens=20, use_past_kv_cache=use_past_kv_cache
        )
        assert [*prompt, *new] == expected.tolist()[: len(prompt) + len(new)]
        whole = pair.tokenizer.decode([*prompt, *new], skip_special_tokens=True)
        head = pair.tokenizer.decode(prompt, skip_special_tokens=True)
        assert head + pair.generate(text, max_new_tokens=20) == whole
