import pytest
import torch
from models.tiny_pairs import HOOK, N_CTX, TEXTS

from tl_crosscoder import ModelPair
from tl_crosscoder.baselines.logit_amplification import (
    amplified_logits,
    amplified_text,
    amplified_tokens,
)
from tl_crosscoder.models.site import Site


@pytest.fixture
def tokens(pair):
    return pair.to_tokens(TEXTS)


def test_logits_by_hand(pair, tokens):
    at = (0, 3, 7)
    l0, l1 = (pair.logits(tokens, site=site)[at].item() for site in ("base", "finetuned"))
    found = amplified_logits(pair, tokens, alpha=0.5)
    assert found.shape == (*tokens.shape, pair.d_vocab)
    assert found[at].item() == pytest.approx(l1 + 0.5 * (l1 - l0), rel=1e-4)
    assert torch.equal(amplified_logits(pair, tokens, alpha=0), pair.logits(tokens))
    base = pair.logits(tokens, site="base")
    assert torch.equal(amplified_logits(pair, tokens, alpha=-1), base)


def test_the_other_way_round_is_beyond_the_base(pairs):
    pair = pairs["hooked"]
    tokens = pair.to_tokens(TEXTS)
    # l0 + b (l0 - l1) = l1 + a (l1 - l0) with a = -1 - b.
    back = amplified_logits(pair.comparing("finetuned", "base"), tokens, alpha=0.5)
    torch.testing.assert_close(back, amplified_logits(pair, tokens, alpha=-1.5))


@pytest.mark.parametrize(("alpha", "site"), [(0.0, "finetuned"), (-1.0, "base")])
def test_greedy_text_of_the_ends_is_that_of_the_models(pair, alpha, site):
    options = {"max_new_tokens": 8, "stop_token_ids": ()}
    found = amplified_tokens(pair, TEXTS, alpha=alpha, **options)
    assert found == pair.generate_tokens(TEXTS, site=site, **options)
    text = amplified_text(pair, TEXTS[0], alpha=alpha, max_new_tokens=8)  # stops at its own ids
    assert text == pair.generate(TEXTS[0], site=site, max_new_tokens=8)


def test_greedy_text_is_that_of_a_naive_loop(pair):
    found = amplified_tokens(pair, TEXTS, alpha=2.0, max_new_tokens=6, stop_token_ids=())
    for text, (prompt, new) in zip(TEXTS, found, strict=True):
        ids = pair.encode(text)
        assert prompt == ids
        for _ in range(6):
            l0, l1 = (
                pair.logits(torch.tensor([ids]), site=site)[0, -1] for site in ("base", "finetuned")
            )
            ids = [*ids, int((l1 + 2 * (l1 - l0)).argmax())]
        assert new == ids[len(prompt) :]
    plain = pair.generate_tokens(TEXTS, max_new_tokens=6, stop_token_ids=())
    assert [new for _, new in found] != [new for _, new in plain]


def test_text_ends_before_a_stop_id(pairs):
    pair = pairs["llama"]
    options = {"alpha": 1.0, "max_new_tokens": 6}
    # Two prompts of one length: they run together, and one ends before the other.
    prompts = [pair.encode(TEXTS[0])[:5], pair.encode(TEXTS[2])[:5]]
    whole = [new for _, new in amplified_tokens(pair, prompts, stop_token_ids=(), **options)]
    stop = whole[0][2]
    cut = [new for _, new in amplified_tokens(pair, prompts, stop_token_ids=[stop], **options)]
    ends = [new.index(stop) if stop in new else 6 for new in whole]
    assert cut == [new[:end] for new, end in zip(whole, ends, strict=True)]
    assert ends[0] <= 2
    assert ends[1] > ends[0]


def test_sampling_is_seeded_and_leaves_the_global_generator_alone(pairs):
    pair = pairs["hooked"]
    state = torch.get_rng_state()
    sampled = [
        amplified_tokens(
            pair, TEXTS[:1] * 2, alpha=1.0, max_new_tokens=8, temperature=1.5, seed=seed,
            stop_token_ids=(),
        )
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert sampled[0] == sampled[1] != sampled[2]
    assert sampled[0][0] != sampled[0][1]  # the same prompt twice, each drawn for itself


def test_sampling_follows_the_amplified_distribution(pairs):
    """Share of the likeliest token in 400 draws, within four standard errors."""
    pair = pairs["llama"]
    prompt = pair.encode(TEXTS[1])
    p = (amplified_logits(pair, torch.tensor([prompt]), alpha=1.0)[0, -1] / 2).softmax(dim=-1)
    drawn = amplified_tokens(
        pair, [prompt] * 400, alpha=1.0, max_new_tokens=1, temperature=2.0, stop_token_ids=()
    )
    share = sum(new == [int(p.argmax())] for _, new in drawn) / 400
    q = p.max().item()
    assert abs(share - q) < 4 * (q * (1 - q) / 400) ** 0.5


def test_what_cannot_be_written_is_refused(pairs):
    pair = pairs["hooked"]
    for wrong in ({"max_new_tokens": 0}, {"max_new_tokens": N_CTX}):
        with pytest.raises(ValueError, match=f"context of {N_CTX}"):
            amplified_tokens(pair, TEXTS, alpha=1.0, **wrong)
    with pytest.raises(ValueError, match="must have a token"):
        amplified_tokens(pair, [""], alpha=1.0, prepend_bos=False, max_new_tokens=1)
    with pytest.raises(ValueError, match="temperature=-1"):
        amplified_tokens(pair, TEXTS, alpha=1.0, temperature=-1.0, max_new_tokens=1)
    model = pair.models[0]
    sites = [Site(name=f"l{i}", hook_name=HOOK.replace("1", i), model_name="m") for i in "01"]
    one_model = ModelPair(model, model, sites=sites)
    with pytest.raises(ValueError, match="are of one model"):
        amplified_logits(one_model, pair.to_tokens(TEXTS), alpha=1.0)
