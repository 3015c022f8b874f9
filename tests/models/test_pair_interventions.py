import pytest
import torch
from models.tiny_pairs import D_MODEL, TEXTS

from tl_crosscoder.models.pair import ModelPair


@pytest.mark.parametrize("site", ["base", "finetuned"])
def test_patching_in_a_models_own_activation_changes_nothing(pair, tokens, site):
    own = pair.activations(tokens)[:, :, pair.site_index(site)]
    logits = pair.logits(tokens, site=site)
    assert torch.equal(pair.run_with_patch(tokens, own, site=site), logits)
    assert torch.equal(pair.run_with_patch(tokens, lambda act: act, site=site), logits)


def test_patching_in_the_base_stream_changes_the_finetuned_model_only_meanwhile(pair, tokens):
    before = pair.logits(tokens)
    patched = pair.run_with_patch(tokens, pair.activations(tokens)[:, :, 0])
    assert (patched - before).abs().max() > 1e-2
    assert torch.equal(pair.logits(tokens), before)


def test_the_finetuned_model_continues_from_the_last_layer_of_the_base(pairs):
    # After the last block only ln_final and unembed are left, and these differ.
    pair = ModelPair(*pairs["hooked"].models, hook_name="blocks.2.hook_resid_post")
    tokens = pair.to_tokens(TEXTS)
    finetuned = pair.models[1]
    stream = pair.activations(tokens)[:, :, 0]
    with torch.no_grad():
        expected = finetuned.unembed(finetuned.ln_final(stream))
    torch.testing.assert_close(pair.run_with_patch(tokens, stream), expected)


def test_patching_heads_restores_their_shape(pairs):
    pair = ModelPair(*pairs["llama"].models, hook_name="blocks.1.attn.hook_z")
    tokens = pair.to_tokens(TEXTS)
    own = pair.activations(tokens)[:, :, 1]
    torch.testing.assert_close(pair.run_with_patch(tokens, own), pair.logits(tokens))


def test_patched_lets_gradients_through(pair, tokens):
    shift = torch.zeros(D_MODEL, requires_grad=True)
    with pair.patched("finetuned", lambda act: act + shift) as model:
        model(tokens).logsumexp(dim=-1).sum().backward()
    assert shift.grad is not None
    assert shift.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["hooked", "llama"])
def test_a_patch_of_the_wrong_shape_is_refused_and_leaves_no_hook(pairs, kind):
    pair = pairs[kind]
    tokens = pair.to_tokens(TEXTS)
    before = pair.logits(tokens)
    with pytest.raises(ValueError, match=r"the patch at .* has shape \(3, 1, 16\) where the"):
        pair.run_with_patch(tokens, lambda act: act[:, :1])
    assert torch.equal(pair.logits(tokens), before)


def test_hooks_of_the_user_survive(pair, tokens):
    """A hook that was there before counts, and is still there afterwards."""
    hook_point = pair.models[1].hook_dict["blocks.0.hook_resid_post"]

    def zero(activation, hook):
        return activation * 0

    hook_point.add_hook(zero)
    zeroed = pair.logits(tokens)
    pair.activations(tokens)
    pair.run_with_patch(tokens, lambda act: act * 2)
    assert torch.equal(pair.logits(tokens), zeroed)
    hook_point.remove_hooks("fwd")
    assert not torch.equal(pair.logits(tokens), zeroed)
