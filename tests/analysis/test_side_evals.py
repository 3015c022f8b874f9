from dataclasses import replace

import datasets
import pytest
import torch
from models.random_models import random_crosscoder
from models.tiny_pairs import CORPUS, D_MODEL, HOOK, TEXTS, hooked_transformer, save_model
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids
from transformers import AutoTokenizer

from tl_crosscoder import Crosscoder, ModelPair, tokenize
from tl_crosscoder.analysis.measurement import measure
from tl_crosscoder.analysis.saelens_evals import SiteSAE, site_evals
from tl_crosscoder.crosscoder.config import CrosscoderConfig
from tl_crosscoder.models.saelens import SiteView
from tl_crosscoder.models.site import Site

SIDES = ["base", "finetuned"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    root = tmp_path_factory.mktemp("sides")
    folders = [save_model(root / f"llama-{seed}", "llama", seed=seed) for seed in (0, 1)]
    hooked = [hooked_transformer(AutoTokenizer.from_pretrained(folders[0]), s) for s in (1, 2)]
    return {
        "llama": ModelPair.from_pretrained(*folders, hook_name=HOOK),
        "hooked": ModelPair(*hooked, hook_name=HOOK),
    }


@pytest.fixture(params=["hooked", "llama"])
def pair(request, pairs):
    return pairs[request.param]


@pytest.fixture(scope="module")
def text(pairs):
    """Contexts of 12 tokens, of which SAELens and we leave out the same ones."""
    tokenizer = pairs["llama"].tokenizer
    packed = tokenize([{"text": t} for t in CORPUS], tokenizer, context_size=12)
    special = torch.tensor(get_special_token_ids(tokenizer))
    return replace(packed, dropped=torch.isin(packed.tokens, special).byte())


def dictionary(source, **fields) -> Crosscoder:
    return random_crosscoder(source.sites, 20, scale=0.3, **fields)


def exact_dictionary(source) -> Crosscoder:
    """relu(x) - relu(-x) = x: a latent for each coordinate and sign."""
    d_in = sum(site.d_model for site in source.sites)
    made = Crosscoder(CrosscoderConfig(d_in=d_in, d_sae=2 * d_in, sites=source.sites))
    weights = {n: torch.zeros_like(t) for n, t in made.state_dict().items()}
    weights["W_dec"] = torch.cat([torch.eye(d_in), -torch.eye(d_in)])
    weights["W_enc"] = weights["W_dec"].T.contiguous()
    made.load_state_dict(weights)
    return made


@pytest.mark.parametrize("site", SIDES)
def test_a_view_is_the_model_of_its_side(pair, site):
    tokens, view = pair.to_tokens(TEXTS), SiteView(pair, site)
    at = SIDES.index(site)
    expected = pair.logits(tokens, site=site)
    assert torch.equal(view(tokens), expected)
    assert torch.equal(view(TEXTS), expected)
    logits, loss = view(tokens, return_type="both", loss_per_token=True)
    by_hand = -expected.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(view(tokens, return_type="loss"), by_hand.mean())
    _, cache = view.run_with_cache(tokens, names_filter=["hook_side"])
    x = pair.activations(tokens)
    assert torch.equal(cache["hook_side"], x[:, :, at])
    assert torch.equal(torch.stack(view.acts, dim=2), x)

    def doubled(activation, hook):
        return 2 * activation

    edited = view.run_with_hooks(tokens, fwd_hooks=[("hook_side", doubled)])
    assert torch.equal(edited, pair.run_with_patch(tokens, 2 * x[:, :, at], site=site))
    assert not torch.allclose(edited, logits)
    with pytest.raises(ValueError, match="stop_at_hook=True"):
        view(tokens, stop_at_layer=1)


@pytest.mark.parametrize(("kind", "apply_b_dec_to_input"), [("llama", False), ("hooked", True)])
def test_metrics_are_those_of_our_own_measures(pairs, text, kind, apply_b_dec_to_input):
    pair = pairs[kind]
    crosscoder = dictionary(pair, apply_b_dec_to_input=apply_b_dec_to_input)
    found = site_evals(pair, crosscoder, text, batch_size=4)
    assert found.n_tokens == text.n_tokens < text.tokens.numel()
    ours = measure(pair, crosscoder, text).reconstruction
    tokens, keep = text.tokens.long(), text.mask
    x = pair.activations(tokens)
    x_hat = crosscoder(x).detach()
    for site, at in (("base", 0), ("finetuned", 1)):
        row = found.row(site)
        assert row.explained_variance == pytest.approx(ours.fve[site], rel=1e-4)
        assert row.l0 == pytest.approx(ours.l0)
        error = (x - x_hat)[:, :, at].pow(2).sum(dim=-1)
        assert row.mse == pytest.approx(error[keep].mean().item(), rel=1e-4)
        own = x[:, :, at]
        spliced = torch.where(keep[..., None], x_hat[:, :, at], own)
        log_p = {
            name: pair.run_with_patch(tokens, stream, site=site).log_softmax(dim=-1)
            for name, stream in (("as it is", own), ("x̂", spliced), ("zeros", 0 * own))
        }
        ce = {
            name: -p[:, :-1].gather(-1, tokens[:, 1:, None])[keep[:, :-1]].mean().item()
            for name, p in log_p.items()
        }
        assert row.ce_loss_without_sae == pytest.approx(ce["as it is"], rel=1e-4)
        assert row.ce_loss_with_sae == pytest.approx(ce["x̂"], rel=1e-4)
        assert row.ce_loss_with_ablation == pytest.approx(ce["zeros"], rel=1e-4)
        score = (ce["zeros"] - ce["x̂"]) / (ce["zeros"] - ce["as it is"])
        assert row.ce_loss_score == pytest.approx(score, rel=1e-3)
        p = log_p["as it is"]
        kl = (p.exp() * (p - log_p["x̂"])).sum(dim=-1)[keep].mean().item()
        assert row.kl_div_with_sae == pytest.approx(kl, rel=1e-3)
        assert kl > 0.01


def test_an_exact_dictionary_loses_nothing(pairs, text):
    pair = pairs["llama"]
    for row in site_evals(pair, exact_dictionary(pair), text).rows:
        assert row.explained_variance == pytest.approx(1.0)
        assert row.ce_loss_score == pytest.approx(1.0)
        assert row.kl_div_with_sae == pytest.approx(0.0, abs=1e-6)
        assert row.l0 == 2 * D_MODEL


def test_any_list_of_sites_has_sides(pairs, text):
    base, finetuned = pairs["hooked"].models
    hooks = {"a": "blocks.0.hook_resid_post", "b": "blocks.1.mlp.hook_post", "c": HOOK}
    sites = [Site(name=name, hook_name=hook, model_name="m") for name, hook in hooks.items()]
    models = ModelPair(base, base, finetuned, sites=sites)
    crosscoder = dictionary(models)
    found = site_evals(models, crosscoder, text, sites=("b", "c"))
    ours = measure(models, crosscoder, text).reconstruction
    assert [row.site for row in found.rows] == ["b", "c"]
    for row in found.rows:
        assert row.explained_variance == pytest.approx(ours.fve[row.site], rel=1e-4)


@pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples")
@pytest.mark.filterwarnings("ignore:Dataset is not tokenized")
def test_a_store_of_sae_lens_feeds_a_side(pairs):
    pair = pairs["llama"]
    view = SiteView(pair, "finetuned")
    sae = SiteSAE(dictionary(pair), view)
    dataset = datasets.Dataset.from_dict({"text": CORPUS * 3})
    store = ActivationsStore.from_sae(
        view, sae, dataset, context_size=12, streaming=False, store_batch_size_prompts=3
    )
    config = EvalConfig(
        n_eval_reconstruction_batches=2, compute_ce_loss=True, compute_variance_metrics=True,
        compute_featurewise_weight_based_metrics=True,
    )  # fmt: skip
    metrics, by_latent = run_evals(sae, store, view, ActivationScaler(), eval_config=config)
    loss = metrics["model_performance_preservation"]
    assert loss["ce_loss_with_sae"] > loss["ce_loss_without_sae"]
    assert metrics["reconstruction_quality"]["mse"] > 0
    norms = sae.encoder.crosscoder.encoder("finetuned").norm(dim=0)
    torch.testing.assert_close(torch.tensor(by_latent["encoder_norm"]), norms)


def test_what_is_not_the_stream_is_refused(pairs, text, tmp_path):
    pair = pairs["hooked"]
    crosscoder = dictionary(pair)
    view = SiteView(pair, "base")
    sae = SiteSAE(crosscoder, view)
    tokens = pair.to_tokens(TEXTS)
    x = pair.activations(tokens)
    with pytest.raises(ValueError, match="not the stream of site 'base'"):
        sae.encode(x[:, :, 0])
    view(tokens)
    assert torch.equal(sae.encode(x[:, :, 0]), crosscoder.encode(x))
    torch.testing.assert_close(sae(x[:, :, 0]), crosscoder(x)[:, :, 0])
    for wrong in (x[:, :, 1], x[:, :, 0] + 1e-3, x[:2, :, 0]):
        with pytest.raises(ValueError, match="not the stream of site 'base'"):
            sae.encode(wrong)
    with pytest.raises(ValueError, match="Save the crosscoder"):
        sae.save_model(tmp_path)


def test_what_has_no_side_or_no_full_contexts_is_refused(pairs, text):
    pair = pairs["hooked"]
    with pytest.raises(ValueError, match="a diff-SAE has no site of one model"):
        site_evals(pair, dictionary(pair.difference()), text)
    padded = tokenize([{"text": "A dog"}], pair.tokenizer, context_size=12, pack=False)
    with pytest.raises(ValueError, match="some padded"):
        site_evals(pair, dictionary(pair), padded)
    with pytest.raises(ValueError, match="trained on"):
        site_evals(pairs["llama"], dictionary(pair), text)
    with pytest.raises(ValueError, match="site 'sft' is not in this pair"):
        site_evals(pair, dictionary(pair), text, sites=("sft",))
