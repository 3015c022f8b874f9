import pytest
import torch
from models.tiny_pairs import D_MODEL, HOOK, TEXTS

from tl_crosscoder import ModelPair, Site
from tl_crosscoder.models.pair import planned_sites


@pytest.fixture(scope="module")
def pair(site_folders) -> ModelPair:
    return ModelPair.from_pretrained(site_folders["base"], site_folders["sft"], hook_name=HOOK)


def test_it_is_the_finetuned_activation_less_the_base_s(pair):
    difference = pair.difference()
    tokens = pair.to_tokens(TEXTS)
    base, finetuned = pair.activations(tokens).unbind(2)
    assert torch.equal(difference.activations(tokens), finetuned - base)
    assert (difference.n_sites, difference.d_model, difference.n_ctx) == (1, D_MODEL, pair.n_ctx)
    assert difference.tokenizer is pair.tokenizer


def test_swapping_the_models_flips_the_sign(pair):  # spec: D3
    swapped = ModelPair(*reversed(pair.models), hook_name=HOOK)
    tokens = pair.to_tokens(TEXTS)
    expected = -pair.difference().activations(tokens)
    assert torch.equal(swapped.difference().activations(tokens), expected)
    chosen = pair.difference("base", minus="finetuned")
    assert torch.equal(chosen.activations(tokens), expected)


def test_its_site_survives_its_dict_and_finds_its_models_again(pair):
    (site,) = pair.difference().sites
    assert (site.name, site.hook_name, site.minus) == ("difference", HOOK, pair.sites[0])
    assert Site.from_dict(site.to_dict()) == site
    again = ModelPair.from_sites([site])
    assert again.sites == (site,)
    tokens = pair.to_tokens(TEXTS)
    assert torch.equal(again.activations(tokens), pair.difference().activations(tokens))


def test_a_site_without_the_new_fields_is_read_and_written_as_before():
    old = {
        "name": "finetuned", "d_model": 16, "hook_name": HOOK, "model_name": "m",
        "revision": None, "adapter": None, "scale": 0.5,
    }  # fmt: skip
    site = Site.from_dict(old)
    assert site.minus is None
    assert site.to_dict() == old


def test_only_the_two_models_of_a_difference_run(site_folders):
    three = ModelPair.from_pretrained(
        site_folders["base"], [site_folders[n] for n in ("sft", "rl")], hook_name=HOOK
    )
    difference = three.difference("finetuned_2", minus="finetuned")
    tokens = three.to_tokens(TEXTS)
    ran = []
    hook = ("hook_embed", lambda _, hook: ran.append(hook.name))
    with three.models[0].hooks(fwd_hooks=[hook]):
        found = difference.activations(tokens)
    assert not ran
    x = three.activations(tokens)
    assert torch.equal(found, x[:, :, 2] - x[:, :, 1])


def test_by_default_one_layer_is_compared_with_itself(site_folders):
    hooks = ["blocks.0.hook_resid_post", HOOK]
    many = ModelPair.from_pretrained(site_folders["base"], site_folders["sft"], hook_name=hooks)
    (site,) = many.difference().sites
    assert site.minus is not None
    assert site.hook_name == site.minus.hook_name == hooks[0]
    assert (site.model_name, site.minus.model_name) == tuple(
        str(site_folders[n]) for n in ("sft", "base")
    )


def test_what_cannot_be_subtracted_is_refused(site_folders, pair):
    unequal = ModelPair.from_pretrained(site_folders["base"], site_folders["wide"], hook_name=HOOK)
    with pytest.raises(ValueError, match=r"two sites of one width.*16.*32"):
        unequal.difference()
    one = ModelPair.from_sites(planned_sites([site_folders["base"]], HOOK))
    with pytest.raises(ValueError, match="one site only: there is nothing to subtract"):
        one.difference()
