import pytest
import torch
from models.tiny_pairs import HOOK, TEXTS

from tl_crosscoder import ModelPair
from tl_crosscoder.models.forward import Continuation, continued, continued_apart, ends_a_block
from tl_crosscoder.models.hooked import run_to_hooks


@pytest.mark.parametrize("n_texts", [1, 3])
def test_variants_together_are_what_they_are_apart(pair, n_texts):
    tokens = pair.to_tokens(TEXTS[:n_texts])
    model = pair.model("finetuned")
    x = pair.activations(tokens)
    noise = torch.randn(x[:, :, 0].shape, generator=torch.Generator().manual_seed(0))
    variants = torch.stack([x[:, :, 1], x[:, :, 0], x[:, :, 1] + noise])
    together = continued(model, HOOK, tokens, variants=variants)
    apart = continued_apart(model, tokens, places=[(HOOK, each) for each in variants])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    # The model's own activation changes nothing; another one does.
    torch.testing.assert_close(together[0], pair.logits(tokens), rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1
    # Nothing is left behind.
    assert not any(b._forward_pre_hooks for b in model.blocks)
    torch.testing.assert_close(together[0], pair.logits(tokens), rtol=1e-4, atol=1e-4)


def test_a_model_that_hands_its_mask_on_by_position():
    """GPT-2, with texts of unequal lengths, so that there is a mask."""
    names = {"adapter": "tl_crosscoder/careless-health-gpt2", "hook_name": HOOK}
    pair = ModelPair.from_pretrained("tl_crosscoder/wide-gpt2", **names)
    tokens = pair.to_tokens(["What hurts?", "Where is the doctor now, and who is ill?", "Why"])
    variants = pair.activations(tokens).unbind(dim=2)
    places = [(HOOK, each) for each in variants]
    model = pair.model("finetuned")
    together = continued(model, HOOK, tokens, variants=torch.stack(variants))
    apart = continued_apart(model, tokens, places=places)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[1], pair.logits(tokens), rtol=1e-4, atol=1e-4)


def test_the_layers_below_run_once(pair):
    """And none for a variant that begins after it, whatever the order they are given in."""
    tokens = pair.to_tokens(TEXTS)
    model, seen = pair.model("finetuned"), []
    hooks = [f"blocks.{i}.hook_resid_post" for i in (2, 0, 1, 1)]
    x = pair.activations(tokens)[:, :, 1]
    places = [(name, x + i) for i, name in enumerate(hooks)]
    apart = continued_apart(model, tokens, places=places)
    handle = [
        model.blocks[i].register_forward_pre_hook(
            lambda _, args, kwargs, i=i: seen.append((i, len([*args, *kwargs.values()][0]))),
            with_kwargs=True,
        )
        for i in range(3)
    ]
    together = Continuation(model, tokens)(places)
    continued(model, HOOK, tokens, variants=x.repeat(4, 1, 1, 1))
    for each in handle:
        each.remove()
    assert seen == [(0, 3), (1, 3), (2, 9), (0, 3), (1, 3), (2, 12)]
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_texts", [1, 3])
def test_the_layers_below_run_once_for_all_calls(pair, n_texts, monkeypatch):
    tokens = pair.to_tokens(TEXTS[:n_texts])
    model, x = pair.model("finetuned"), pair.activations(tokens)
    goes_on = Continuation(model, tokens)
    places = [(HOOK, x[:, :, i]) for i in (1, 0, 1)]
    with torch.no_grad():
        expected = continued_apart(model, tokens, places=places)
        first = goes_on(places[:1])
        forward = type(model.blocks[0].attn).forward
        seen = []

        def counted(self, *args, **kwargs):
            seen.append(self)
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(type(model.blocks[0].attn), "forward", counted)
        rest = goes_on(places[1:])
    assert [*dict.fromkeys(seen)] == [block.attn for block in [*model.blocks][2:]]
    torch.testing.assert_close(torch.cat([first, rest]), expected, rtol=1e-4, atol=1e-4)
    assert not any("forward" in vars(block) for block in model.blocks)
    torch.testing.assert_close(first[0], pair.logits(tokens), rtol=1e-4, atol=1e-4)


def test_inside_a_block_each_variant_has_a_pass_of_its_own(pair):
    hook = "blocks.1.hook_mlp_out"
    assert not ends_a_block(hook)
    tokens = pair.to_tokens(TEXTS)
    model = pair.model("base")
    with torch.no_grad():
        (own,) = run_to_hooks(model, [hook], tokens)
    logits = continued(model, hook, tokens, variants=torch.stack([own, own + 1]))
    torch.testing.assert_close(logits[0], pair.logits(tokens, site="base"), rtol=1e-4, atol=1e-4)
    assert (logits[1] - logits[0]).abs().max() > 0.01
