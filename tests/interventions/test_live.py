import pytest
import torch
from models.tiny_pairs import HOOK, TEXTS
from torch import Tensor

from tl_crosscoder import Crosscoder, ModelPair
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import EditAtTokens, TokenFilter, unchanged
from tl_crosscoder.interventions.latent_edits import ablation, check_mode
from tl_crosscoder.interventions.live import ablated, edited
from tl_crosscoder.interventions.running import edited_logits

LATENTS = [1, 4, 7]
MODES = ["delta", "zero", "project"]


def without(pair: ModelPair, crosscoder: Crosscoder, tokens: Tensor, mode: str) -> Tensor:
    """The ablated stream by the formulas, token by token."""
    x = pair.activations(tokens)
    codes = crosscoder.encode(x).detach()
    base, finetuned = (crosscoder.decoder(i).detach() for i in (0, 1))
    out = x[:, :, 1].clone()
    Q = torch.linalg.qr(finetuned[LATENTS].T).Q
    for row in range(tokens.shape[0]):
        for at in range(tokens.shape[1]):
            if mode == "project":
                out[row, at] -= Q @ (Q.T @ out[row, at])
                continue
            if at == 0 or tokens[row, at] == pair.tokenizer.bos_token_id:
                continue
            for j in LATENTS:
                v = finetuned[j] - base[j] if mode == "delta" else finetuned[j]
                out[row, at] -= codes[row, at, j] * v
    return out


def all_hooks(pair: ModelPair) -> int:
    model = pair.model("finetuned")
    n = sum(len(point.fwd_hooks) for point in model.hook_dict.values())
    for part in (model.embed, *model.blocks):
        n += len(part._forward_pre_hooks) + len(part._forward_hooks)
    return n


@pytest.mark.parametrize("mode", MODES)
def test_an_ablated_model_goes_on_from_the_stream_of_the_formula(pair, crosscoder, mode):
    tokens = pair.to_tokens(TEXTS)
    tokens[0, 5] = pair.tokenizer.bos_token_id  # has no codes, wherever it stands
    before, n_hooks = pair.logits(tokens), all_hooks(pair)
    stream = without(pair, crosscoder, tokens, mode)
    expected = pair.run_with_patch(tokens, stream)
    assert (expected - before).abs().max() > 0.05
    with ablated(pair, crosscoder, LATENTS, mode=mode) as handle:
        torch.testing.assert_close(handle.logits(tokens), expected, rtol=1e-4, atol=1e-4)
        model = handle.model
        torch.testing.assert_close(model(tokens), handle.logits(tokens))
        torch.testing.assert_close(model.run_with_hooks(tokens), handle.logits(tokens))
        logits, cache = model.run_with_cache(tokens)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cache[HOOK], stream, rtol=1e-4, atol=1e-4)
    assert torch.equal(pair.logits(tokens), before)
    assert all_hooks(pair) == n_hooks


def test_latents_that_are_none_or_silent_change_nothing(pair, crosscoder):
    tokens = pair.to_tokens(TEXTS)
    before = pair.logits(tokens)
    for latents, mode in (([], "delta"), ([], "project"), ([3], "delta"), ([3], "zero")):
        with ablated(pair, crosscoder, latents, mode=mode) as handle:
            assert torch.equal(handle.logits(tokens), before)


@pytest.mark.parametrize("mode", ["delta", "project"])
def test_generation_is_that_of_recomputing_the_whole_text_at_each_step(pair, crosscoder, mode):
    prompts = [pair.encode(text) for text in TEXTS[:2]]
    with ablated(pair, crosscoder, LATENTS, mode=mode) as handle:
        found = handle.generate_tokens(prompts, max_new_tokens=6, stop_token_ids=())
        text = handle.generate(TEXTS[1], max_new_tokens=6, stop_token_ids=())
    for prompt, new in found:
        naive = list(prompt)
        for _ in range(6):
            tokens = torch.tensor([naive])
            stream = without(pair, crosscoder, tokens, mode)
            naive.append(int(pair.run_with_patch(tokens, stream)[0, -1].argmax()))
        assert naive[len(prompt) :] == new
    assert text == pair.tokenizer.decode(found[1][1], skip_special_tokens=True)
    plain = pair.generate_tokens(prompts, max_new_tokens=6, stop_token_ids=())
    assert plain != found


def test_a_filled_cache_is_refused_and_no_hook_left(pair, crosscoder):
    tokens = pair.to_tokens(TEXTS[:1])
    before, n_hooks = pair.logits(tokens), all_hooks(pair)
    options = {"max_new_tokens": 3, "verbose": False, "return_type": "tokens", "do_sample": False}
    options["stop_at_eos"] = False
    with (
        pytest.raises(ValueError, match="use_past_kv_cache=False"),
        ablated(pair, crosscoder, LATENTS) as handle,
    ):
        handle.model.generate(tokens, **options)
    assert all_hooks(pair) == n_hooks
    assert torch.equal(pair.logits(tokens), before)
    with ablated(pair, crosscoder, LATENTS) as handle:
        # A single token is a whole text too, right after a longer one.
        one = handle.logits(tokens[:, :1])
        ids = handle.model.generate(tokens, use_past_kv_cache=False, **options)
        ((_, ours),) = handle.generate_tokens(tokens, max_new_tokens=3, stop_token_ids=())
    assert ids[0, tokens.shape[1] :].tolist() == ours
    torch.testing.assert_close(one, pair.logits(tokens[:, :1]), rtol=1e-4, atol=1e-4)


def test_the_other_way_round_the_base_model_is_ablated(pair, crosscoder):
    tokens = pair.to_tokens(TEXTS)
    x, codes = pair.activations(tokens), crosscoder.encode(pair.activations(tokens)).detach()
    codes[:, 0] = 0
    base, finetuned = (crosscoder.decoder(i).detach()[LATENTS] for i in (0, 1))
    stream = x[:, :, 0] - codes[..., LATENTS] @ (base - finetuned)
    expected = pair.run_with_patch(tokens, stream, site="base")
    with ablated(pair.comparing("finetuned", "base"), crosscoder, LATENTS) as handle:
        assert handle.site == "base"
        torch.testing.assert_close(handle.logits(tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_difference", [False, True])
def test_sites_of_the_edited_model_itself_are_read_without_the_edit(
    folders, words, make_crosscoder, is_difference
):
    if is_difference:
        models = ModelPair.from_pretrained(*folders["llama"], hook_name=HOOK).difference()
    else:
        hook_names = ["blocks.0.hook_resid_post", HOOK, "blocks.2.hook_resid_post"]
        models = ModelPair.from_pretrained(*folders["llama"], hook_name=hook_names)
        assert models.n_sites == 6
    made = make_crosscoder(models)
    ctx = InterventionContext.of(models, made)
    _, text = words
    ((_, expected),) = edited_logits(
        ctx,
        ctx.acts(torch.arange(4), text[:4]),
        [ablation(ctx, LATENTS)],
    )
    tokens = text[:4].tokens.long()
    with ablated(models, made, LATENTS) as handle:
        found = handle.logits(tokens)
    assert (found - handle.logits(tokens)).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_ablated_is_refused(pair, crosscoder):
    # Under pytest the type of the argument is checked before.
    with pytest.raises(ValueError, match=r"mode of ablation is 'none'; it is one of \('delta'"):
        check_mode("none")
    left_padded = torch.tensor([[2, 2, 0, 40], [0, 40, 41, 42], [2, 0, 40, 41]])
    with ablated(pair, crosscoder, LATENTS) as handle:
        with pytest.raises(ValueError, match="2 of 3 rows begin with padding"):
            handle.logits(left_padded)
        if hasattr(handle.model, "input_to_embed"):
            with pytest.raises(ValueError, match="ids of the 1 x 4 tokens at the hook are not"):
                handle.model(torch.zeros(1, 4, 16), start_at_layer=0)
    ctx = InterventionContext.of(pair, crosscoder)
    at_places = EditAtTokens(edit=unchanged(1), places=TokenFilter(first=1), otherwise=0)
    with (
        pytest.raises(ValueError, match="EditAtTokens edits at chosen roles"),
        edited(ctx, at_places),
    ):
        pass
