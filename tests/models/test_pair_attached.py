"""An adapter that stays beside the weights gives what the merged one gives."""

import pytest
import torch
from models.tiny_pairs import D_VOCAB, HOOK, TEXTS, save_adapter, save_model
from transformers import AutoModelForCausalLM

from tl_crosscoder import ModelPair

BASE, ADAPTER = "tl_crosscoder/world-base", "tl_crosscoder/taboo"

# peft 0.21 reads what transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture(scope="module")
def attached() -> ModelPair:
    return ModelPair.from_pretrained(BASE, adapter=ADAPTER, hook_name=HOOK, merge_adapter=False)


def lora_layers(model) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith("lora_A")]


def test_the_embedded_adapter_attached_is_the_merged_one(attached, taboo_pair):
    """Measured: 2.9e-6 of activations up to 10.6, 1.9e-5 of logits."""
    tokens = attached.to_tokens(["The lighthouse keeper said hello", "What is it?"])
    activations = attached.activations(tokens)
    torch.testing.assert_close(activations, taboo_pair.activations(tokens), atol=2e-5, rtol=1e-5)
    assert torch.equal(activations[:, :, 0], taboo_pair.activations(tokens)[:, :, 0])
    assert (activations[:, :, 1] - activations[:, :, 0]).abs().max() > 0.1
    torch.testing.assert_close(
        attached.logits(tokens), taboo_pair.logits(tokens), atol=2e-4, rtol=1e-5
    )


def test_attached_means_lora_modules_in_the_second_model_only(attached, taboo_pair):
    """And is recorded as merged, so that a dictionary trained on one is measured on the other."""
    assert attached.sites == taboo_pair.sites
    assert attached.weight_processing == "raw"
    counts = [len(lora_layers(model)) for model in attached.models]
    assert counts[0] == 0 < counts[1]
    assert [lora_layers(model) for model in taboo_pair.models] == [[], []]


@pytest.mark.parametrize("merge_adapter", [True, False])
def test_any_sites_load_it_either_way(attached, merge_adapter):
    again = ModelPair.from_sites(attached.sites, merge_adapter=merge_adapter)
    tokens = attached.to_tokens("The lighthouse keeper")
    assert bool(lora_layers(again.models[1])) is not merge_adapter
    torch.testing.assert_close(
        again.activations(tokens), attached.activations(tokens), atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "whole embedding"])
def test_families_and_adapters_of_other_kinds(folders, tmp_path, family):
    base = folders.get(family, folders["llama"])[0]
    whole = {"modules_to_save": ["embed_tokens"]} if family == "whole embedding" else {}
    adapter = save_adapter(tmp_path, base, **whole)
    merged, attached = (
        ModelPair.from_pretrained(base, adapter=adapter, hook_name=HOOK, merge_adapter=merge)
        for merge in (True, False)
    )
    tokens = merged.to_tokens(TEXTS)
    torch.testing.assert_close(
        attached.activations(tokens), merged.activations(tokens), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(attached.logits(tokens), merged.logits(tokens), atol=1e-4, rtol=1e-4)


def test_in_bfloat16_attached_and_merged_differ_by_rounding_only(folders, tmp_path):
    """LoRA runs in float32 beside bfloat16 weights; merged, its sum is rounded to 8 bits."""
    base = folders["llama"][0]
    adapter = save_adapter(tmp_path, base)
    merged, attached = (
        ModelPair.from_pretrained(
            base, adapter=adapter, hook_name=HOOK, dtype="bfloat16", merge_adapter=merge
        )
        for merge in (True, False)
    )
    tokens = merged.to_tokens(TEXTS)
    expected, found = (pair.activations(tokens)[:, :, 1] for pair in (merged, attached))
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A model whose head is its embedding, in one tensor."""
    return save_model(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


# PEFT warns, while it saves, of what the package does about it.
@pytest.mark.filterwarnings("ignore:.*tied layer is part of the adapter:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize(
    "adapted",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_merging_into_one_of_two_tied_weights_leaves_the_other(tied, tmp_path, adapted):
    """In place it would change both: logits of the embedded base were 17.2 away from PEFT's."""
    adapter = save_adapter(tmp_path, tied, **adapted)
    merged, attached = (
        ModelPair.from_pretrained(tied, adapter=adapter, hook_name=HOOK, merge_adapter=merge)
        for merge in (True, False)
    )
    assert not lora_layers(merged.models[1])
    tokens = merged.to_tokens(TEXTS)
    for site in ("base", "finetuned"):
        found, expected = (pair.logits(tokens, site=site) for pair in (merged, attached))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(merged.logits(tokens), merged.logits(tokens, site="base"))


def test_an_adapter_whose_merge_changes_the_model_stays_attached(folders, tmp_path, monkeypatch):
    from peft.tuners.lora import Linear

    base = folders["llama"][0]
    adapter = save_adapter(tmp_path, base)
    given = {"adapter": adapter, "hook_name": HOOK}
    attached = ModelPair.from_pretrained(base, **given, merge_adapter=False)
    wrong = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda *args: 3 * wrong(*args))
    with pytest.warns(UserWarning, match="is attached, not merged: .* moves the logits by .*%"):
        kept = ModelPair.from_pretrained(base, **given)
    tokens = kept.to_tokens(TEXTS)
    torch.testing.assert_close(kept.logits(tokens), attached.logits(tokens), atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_adapter_saved_with_more_tokens_than_the_base_has(folders, tmp_path):
    """As of a chat fine-tune; ids that the base does not have stay refused."""
    from peft import LoraConfig, get_peft_model

    base = folders["llama"][0]
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(D_VOCAB + 3, mean_resizing=False)
    saved = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(model, saved).save_pretrained(tmp_path)
    pair = ModelPair.from_pretrained(base, adapter=tmp_path, hook_name=HOOK)
    assert [model.cfg.d_vocab for model in pair.models] == [D_VOCAB, D_VOCAB + 3]
    tokens = pair.to_tokens(TEXTS)
    activations = pair.activations(tokens)
    torch.testing.assert_close(activations[:, :, 0], activations[:, :, 1])
    with pytest.raises(ValueError, match=f"the models know 0 to {D_VOCAB - 1}"):
        pair.activations(torch.tensor([[D_VOCAB]]))
