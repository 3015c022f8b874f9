"""A crosscoder attached at one site by SAELens to the site's own model, of either kind."""

import gc
import weakref

import pytest
import torch
from models.random_models import random_crosscoder
from models.tiny_pairs import HOOK, TEXTS, hooked_transformer, save_model
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from tl_crosscoder import Crosscoder, ModelPair
from tl_crosscoder.analysis.saelens_evals import SiteSAE, sae_bridge
from tl_crosscoder.models.saelens import HookedSite
from tl_crosscoder.models.site import Site


def attachable(tokenizer, seed: int) -> HookedSAETransformer:
    plain = hooked_transformer(tokenizer, seed)
    model = HookedSAETransformer(plain.cfg, tokenizer=tokenizer)
    model.load_state_dict(plain.state_dict())
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(base, fine-tuned) of each kind."""
    root = tmp_path_factory.mktemp("models")
    folders = [save_model(root / f"llama-{seed}", "llama", seed=seed) for seed in (0, 1)]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    return {
        "hooked": (hooked_transformer(tokenizer, 1), attachable(tokenizer, 2)),
        "bridge": [TransformerBridge.boot_transformers(str(f), device="cpu") for f in folders],
        "folders": folders,
    }


@pytest.fixture(params=["hooked", "bridge"])
def kind(request):
    return request.param


@pytest.fixture
def pair(models, kind) -> ModelPair:
    return ModelPair(*models[kind], hook_name=HOOK)


def attached(pair: ModelPair, kind: str):
    """The fine-tuned model, to which SAELens attaches."""
    return sae_bridge(pair.models[1]) if kind == "bridge" else pair.models[1]


def dictionary(source) -> Crosscoder:
    return random_crosscoder(source.sites, 24, scale=0.3)


def codes_name(model, sae, kind: str, internal: str = "hook_sae_acts_post") -> str:
    """A bridge knows its canonical hook names only."""
    if kind == "hooked":
        return f"{sae.cfg.metadata.hook_name}.{internal}"
    return model.get_sae_hook_name(sae, internal)


@pytest.mark.parametrize("hook", [HOOK, "blocks.0.attn.hook_z"])
def test_the_cache_holds_the_crosscoders_codes(models, kind, hook):
    """At a hook with heads too; and with the error term the logits are as they were."""
    pair = ModelPair(*models[kind], hook_name=hook)
    crosscoder, model, tokens = dictionary(pair), attached(pair, kind), pair.to_tokens(TEXTS)
    x, plain = pair.activations(tokens), pair.logits(tokens)
    with torch.no_grad():
        codes, x_hat = crosscoder.encode(x), crosscoder(x)[:, :, 1]
    assert 0.1 < (codes > 0).float().mean() < 0.9
    site_sae = SiteSAE(crosscoder, HookedSite(pair, "finetuned"))
    name = codes_name(model, site_sae, kind)
    logits, cache = model.run_with_cache_with_saes(tokens, saes=[site_sae], use_error_term=True)
    assert torch.equal(cache[name], codes)
    torch.testing.assert_close(logits, plain, atol=1e-4, rtol=1e-4)
    spliced, cache = model.run_with_cache_with_saes(tokens, saes=[site_sae])
    assert torch.equal(cache[name], codes)
    torch.testing.assert_close(spliced, pair.run_with_patch(tokens, x_hat), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(spliced, plain, atol=1e-2)
    own = cache[codes_name(model, site_sae, kind, "hook_sae_input")]
    torch.testing.assert_close(own, x[:, :, 1])
    # SAELens has put new hook points in their places, and the pair finds them.
    assert torch.equal(pair.activations(tokens), x)
    assert torch.equal(pair.run_with_patch(tokens, x[:, :, 1]), plain)


def test_a_bridge_that_sae_lens_loaded_works_at_canonical_hook_names(models):
    base, folder = models["bridge"][0], models["folders"][1]
    model = SAETransformerBridge.boot_transformers(str(folder), device="cpu")
    pair = ModelPair(base, model, hook_name="blocks.1.hook_out")
    crosscoder, tokens = dictionary(pair), pair.to_tokens(TEXTS)
    codes = crosscoder.encode(pair.activations(tokens))
    site_sae = SiteSAE(crosscoder, HookedSite(pair, "finetuned"))
    _, cache = model.run_with_cache_with_saes(tokens, saes=[site_sae])
    assert torch.equal(cache["blocks.1.hook_out.hook_sae_acts_post"], codes)


def test_models_in_bfloat16_take_a_site_sae_in_bfloat16(models):
    """Codes are computed in float32, from activations that are bfloat16 anyway."""
    tokenizer = models["hooked"][0].tokenizer
    pair = ModelPair(
        hooked_transformer(tokenizer, 1, dtype=torch.bfloat16),
        attachable(tokenizer, 2).to(torch.bfloat16),
        hook_name=HOOK,
    )
    tokens = pair.to_tokens(TEXTS)
    site_sae = SiteSAE(dictionary(pair), HookedSite(pair, "finetuned")).to(torch.bfloat16)
    logits, cache = pair.models[1].run_with_cache_with_saes(tokens, saes=[site_sae])
    exact = site_sae.encoder.crosscoder.encode(pair.activations(tokens))
    assert torch.equal(cache[f"{HOOK}.hook_sae_acts_post"], exact.to(torch.bfloat16))
    assert logits.dtype == torch.bfloat16


def test_an_edit_of_a_latent_goes_on_in_the_model(pair, kind):
    crosscoder, model, tokens = dictionary(pair), attached(pair, kind), pair.to_tokens(TEXTS)
    site_sae = SiteSAE(crosscoder, HookedSite(pair, "finetuned"))
    with torch.no_grad():
        codes = crosscoder.encode(pair.activations(tokens))
        latent = int((codes > 0).sum(dim=(0, 1)).argmax())
        codes[..., latent] = 0
        expected = pair.run_with_patch(tokens, crosscoder.decode(codes)[..., 16:])

    def without(acts, hook):
        acts[..., latent] = 0
        return acts

    found = model.run_with_hooks_with_saes(
        tokens, saes=[site_sae], fwd_hooks=[(codes_name(model, site_sae, kind), without)]
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with model.saes(saes=[site_sae]):
        spliced = model(tokens)
    assert not torch.allclose(found, spliced, atol=1e-3)


def test_generation_without_cache_runs_the_others_on_the_whole_text(pair, kind):
    """With the error term nothing changes, so the texts are equal; a cache is refused."""
    model, tokens = attached(pair, kind), pair.to_tokens(TEXTS[1])
    site_sae = SiteSAE(dictionary(pair), HookedSite(pair, "finetuned"))
    how = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}
    plain = model.generate(tokens, use_past_kv_cache=False, **how)
    seen = []
    with model.saes(saes=[site_sae], use_error_term=True):
        site_sae.hook_sae_acts_post.add_hook(lambda acts, hook: seen.append(acts))  # noqa: ARG005
        found = model.generate(tokens, use_past_kv_cache=False, **how)
        site_sae.hook_sae_acts_post.remove_hooks()
        assert torch.equal(found, plain)
        with pytest.raises(ValueError, match=r"key-value cache of \d+ positions"):
            model.generate(tokens, use_past_kv_cache=True, **how)
    expected = site_sae.encoder.crosscoder.encode(pair.activations(plain[:, :-1]))
    torch.testing.assert_close(seen[-1], expected)


def test_unknown_activations_of_the_other_site_are_an_error(pair, models, kind):
    crosscoder, model, tokens = dictionary(pair), attached(pair, kind), pair.to_tokens(TEXTS)
    site_sae = SiteSAE(crosscoder, HookedSite(pair, "finetuned"))
    x = pair.activations(tokens)[:, :, 1]
    with pytest.raises(ValueError, match="outside of a forward pass of its model"):
        site_sae.encode(x)
    padded = torch.cat([torch.full_like(tokens[:, :1], pair.tokenizer.pad_token_id), tokens], 1)
    padded[0, 0] = 5
    with (
        model.saes(saes=[site_sae]),
        pytest.raises(ValueError, match="2 of 3 rows begin with padding"),
    ):
        model(padded)
    with pytest.raises(ValueError, match="outside of"):  # the failed pass left nothing behind
        site_sae.encode(x)
    own = pair.models[1]
    two = [Site(name=n, hook_name=f"blocks.{n}.hook_resid_post", model_name="m") for n in "12"]
    with pytest.raises(ValueError, match=r"\['2'\] are sites of the same loaded model"):
        HookedSite(ModelPair(own, own, sites=two), "1")
    outside = ModelPair(*models[kind], hook_name="hook_embed")
    with pytest.raises(ValueError, match="'hook_embed' is outside the blocks"):
        HookedSite(outside, "finetuned")
    if kind == "hooked":
        with pytest.raises(ValueError, match="Load a HookedTransformer as sae_lens"):
            sae_bridge(own)
    with pytest.raises(ValueError, match="Save the crosscoder"):
        site_sae.save_model("d")


def test_a_deleted_site_sae_leaves_no_hooks(pair):
    model = pair.models[1]
    before = len(model.embed._forward_pre_hooks), len(model.blocks[1]._forward_hooks)
    site_sae = HookedSite(pair, "finetuned")
    assert len(model.embed._forward_pre_hooks) == before[0] + 1
    gone = weakref.ref(site_sae)
    del site_sae
    gc.collect()
    assert gone() is None
    assert (len(model.embed._forward_pre_hooks), len(model.blocks[1]._forward_hooks)) == before
