import pytest
import torch
from models.tiny_pairs import HOOK, N_CTX, TEXTS, hooked_transformer, save_model, save_tokenizer
from transformers import AutoTokenizer

from tl_crosscoder.models import loading
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.site import Site


def zero(activation, hook):
    return torch.zeros_like(activation)


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_greedy_text_is_the_argmax_of_the_logits(pair, use_past_kv_cache):
    [(prompt, new)] = pair.generate_tokens(
        TEXTS[0],
        site="base",
        max_new_tokens=5,
        stop_token_ids=(),
        use_past_kv_cache=use_past_kv_cache,
    )
    ids = list(prompt)
    for _ in range(5):
        ids.append(int(pair.logits(torch.tensor([ids]), site="base")[0, -1].argmax()))
    assert [*prompt, *new] == ids


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_a_hook_acts_while_generating_and_not_after(pair, use_past_kv_cache):
    options = {"max_new_tokens": 6, "stop_token_ids": (), "use_past_kv_cache": use_past_kv_cache}
    plain = pair.generate_tokens(TEXTS, **options)
    lengths = []

    def watch(activation, hook):
        lengths.append(activation.shape[1])

    ablated = pair.generate_tokens(TEXTS[0], fwd_hooks=[(HOOK, zero), (HOOK, watch)], **options)
    n_prompt = len(ablated[0][0])
    # The cache makes later steps one token long; without it the whole text runs again.
    later = [1] * 5 if use_past_kv_cache else [n_prompt + i for i in range(1, 6)]
    assert lengths == [n_prompt, *later]
    assert ablated[0][1] != plain[0][1]
    assert pair.generate_tokens(TEXTS, **options) == plain


def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(pair):
    together = pair.generate(TEXTS, max_new_tokens=5)
    assert together == [pair.generate(text, max_new_tokens=5) for text in TEXTS]
    ids = [pair.encode(text) for text in TEXTS]
    assert pair.generate(ids, max_new_tokens=5) == together
    assert pair.generate(torch.tensor(ids[:1]), max_new_tokens=5) == together[:1]


def test_sampling_repeats_with_its_seed_and_leaves_the_global_generator_alone(pair):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    options = {"max_new_tokens": 12, "temperature": 1.0, "stop_token_ids": ()}
    first = pair.generate(TEXTS[0], seed=1, **options)
    assert torch.equal(torch.rand(3), expected)
    assert pair.generate(TEXTS[0], seed=1, **options) == first
    assert pair.generate(TEXTS[0], seed=2, **options) != first


def test_generation_stops_before_a_stop_token(pair):
    [(_, new)] = pair.generate_tokens(TEXTS[0], max_new_tokens=8, stop_token_ids=())
    stop = new[4]
    cut = new[: new.index(stop)]
    [(_, stopped)] = pair.generate_tokens(TEXTS[0], max_new_tokens=8, stop_token_ids=[stop])
    assert stopped == cut
    [(_, kept)] = pair.generate_tokens(
        TEXTS[0], max_new_tokens=8, stop_token_ids=[stop], with_stop=True
    )
    assert kept == [*cut, stop]


def test_text_is_the_continuation_with_its_leading_space(pairs):
    pair = pairs["llama"]
    [(prompt, new)] = pair.generate_tokens(TEXTS[0], max_new_tokens=6)
    whole = pair.tokenizer.decode([*prompt, *new], skip_special_tokens=True)
    assert TEXTS[0] + pair.generate(TEXTS[0], max_new_tokens=6) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fwd_hooks": [("blocks.1.resid_post", zero)]}, "nearest: 'blocks.1.hook_resid_post'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 after a prompt of"),
        ({"max_new_tokens": N_CTX}, f"the models' context of {N_CTX}"),
        ({"site": "tuned"}, "'tuned' is not in this pair"),
    ],
)
@pytest.mark.parametrize("kind", ["hooked", "llama"])
def test_bad_options_are_refused(pairs, kind, options, message):
    with pytest.raises(ValueError, match=message):
        pairs[kind].generate(TEXTS[0], **options)


@pytest.mark.parametrize("kind", ["hooked", "llama"])
@pytest.mark.parametrize("special", [0, 1, 2])
def test_a_prompt_that_ends_like_padding_is_read_to_its_end(pairs, kind, special):
    """HookedTransformer takes trailing ids of the padding token for padding."""
    pair = pairs[kind]
    prompt = [*pair.encode(TEXTS[0]), special]
    [(_, new)] = pair.generate_tokens([prompt], max_new_tokens=1, stop_token_ids=())
    assert new == [int(pair.logits(torch.tensor([prompt]))[0, -1].argmax())]


@pytest.mark.parametrize("kind", ["hooked", "llama"])
def test_one_token_for_beginning_end_and_padding(tmp_path, kind):
    """As GPT-2 has it: the BOS is read, though it looks like padding."""
    save_tokenizer(tmp_path, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>")
    if kind == "hooked":
        model = hooked_transformer(
            AutoTokenizer.from_pretrained(tmp_path), 0, default_prepend_bos=False
        )
    else:
        [how] = loading.options_of_each([None], device="cpu", dtype="float32")
        folder = save_model(tmp_path, has_tokenizer=False)
        model = loading.load_site(Site(name="base", hook_name=HOOK, model_name=str(folder)), how)
    pair = ModelPair(model, model, hook_name=HOOK)
    [(prompt, new)] = pair.generate_tokens(TEXTS[0], max_new_tokens=1, stop_token_ids=())
    assert prompt[0] == 0
    assert new == [int(pair.logits(torch.tensor([prompt]))[0, -1].argmax())]
