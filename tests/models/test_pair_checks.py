import copy

import pytest
import torch
from models.tiny_pairs import HOOK, TEXTS, hooked_transformer, save_model

from tl_crosscoder.models.hooked import weight_processing
from tl_crosscoder.models.pair import ModelPair


@pytest.mark.parametrize("kind", ["hooked", "llama"])
@pytest.mark.parametrize(
    ("hook_name", "message"),
    [
        (
            "blocks.1.resid_post",
            "'blocks.1.resid_post' is not in the base .*; nearest: 'blocks.1.hook_resid_post'",
        ),
        (
            ("hook_embed", "blocks.9.hook_resid_post"),
            r"'blocks.9.* is not in the base@.* List them with model.hook_dict",
        ),
        ("???", r"'\?\?\?' is not in the base model '.*'\. List them"),
        ("blocks.1.hook_attn_in", "gives nothing to compare"),
        ("blocks.1.attn.hook_pattern", r"its shape is .* for tokens of shape \(1, 2\)"),
    ],
)
def test_hooks_that_cannot_be_compared_are_refused(pairs, kind, hook_name, message):
    with pytest.raises(ValueError, match=message) as caught:
        ModelPair(*pairs[kind].models, hook_name=hook_name)
    assert "\n" not in str(caught.value)


def test_logits_of_a_padded_vocabulary_stand_beside_those_of_the_other_model(pairs, tokenizer):
    larger = hooked_transformer(tokenizer, 0, d_vocab=400)
    pair = ModelPair(pairs["hooked"].models[0], larger, hook_name=HOOK)
    tokens = pair.to_tokens(TEXTS)
    base, finetuned = (pair.logits(tokens, site=site) for site in ("base", "finetuned"))
    assert base.shape == finetuned.shape == (*tokens.shape, 300)
    assert torch.equal(finetuned, larger(tokens, padding_side="right")[..., :300])


def test_models_of_another_dtype_are_refused(pairs, tokenizer):
    """Or on another device."""
    base = pairs["hooked"].models[0]
    rounded = hooked_transformer(tokenizer, 0, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype: .*float32, .*bfloat16. Load both in one"):
        ModelPair(base, rounded, hook_name=HOOK)
    elsewhere = hooked_transformer(tokenizer, 0).to("meta")
    with pytest.raises(ValueError, match=r"device: .* cpu, .* meta"):
        ModelPair(base, elsewhere, hook_name=HOOK)


def test_a_tokenizer_is_needed_and_can_be_given(tokenizer):
    bare = [hooked_transformer(None, seed) for seed in (0, 1)]
    assert len(ModelPair(*bare, hook_name=HOOK).tokenizer) == bare[0].cfg.d_vocab
    with pytest.raises(ValueError, match=r"carries no tokenizer; name one .*--tokenizer"):
        ModelPair(bare[0], hooked_transformer(tokenizer, 1), hook_name=HOOK)
    pair = ModelPair(*bare, hook_name=HOOK, tokenizer=tokenizer)
    assert pair.tokenizer is tokenizer
    assert pair.activations(pair.to_tokens(TEXTS)).shape[2] == 2
    assert isinstance(pair.generate(TEXTS[0], max_new_tokens=3), str)


def test_other_tokenizers_are_refused_unless_one_is_named(folders, pairs):
    models = pairs["llama"].models[0], pairs["qwen3"].models[1]
    with pytest.raises(ValueError, match=r"the tokenizers differ in"):
        ModelPair(*models, hook_name=HOOK)
    tokenizer = pairs["llama"].tokenizer
    assert ModelPair(*models, hook_name=HOOK, tokenizer=tokenizer).tokenizer is tokenizer


def processed(model):
    """The same model with layer norms folded and weights centred, whichever kind it is."""
    if hasattr(model, "enable_compatibility_mode"):
        model.enable_compatibility_mode(disable_warnings=True)
    else:
        model.process_weights_()
    return model


@pytest.mark.parametrize("kind", ["hooked", "llama"])
def test_raw_against_processed_weights_is_refused(folders, tokenizer, kind):
    def load(seed):
        if kind == "hooked":
            return hooked_transformer(tokenizer, seed)
        return ModelPair.from_pretrained(*folders["llama"], hook_name=HOOK).models[seed]

    raw, folded = load(0), processed(load(1))
    with pytest.raises(ValueError, match=r"weight processing: .*is_folded=False.*is_folded=True"):
        ModelPair(raw, folded, hook_name=HOOK)
    pair = ModelPair(processed(load(0)), folded, hook_name=HOOK)
    assert pair.weight_processing == "processed"
    tokens = pair.to_tokens(TEXTS)
    assert torch.equal(pair.run_with_patch(tokens, lambda act: act), pair.logits(tokens))


@pytest.mark.parametrize(
    ("options", "is_folded", "is_centred"),
    [
        ({"fold_ln": False, "center_writing_weights": True}, False, True),
        ({"fold_ln": True, "center_writing_weights": False}, True, False),
        ({"fold_ln": False, "center_writing_weights": False}, False, False),
    ],
)
def test_centring_alone_is_measured(tokenizer, options, is_folded, is_centred):
    """No attribute of a HookedTransformer says that its weights were centred."""
    model = hooked_transformer(tokenizer, 0, normalization_type="LN")
    model.process_weights_(center_unembed=False, **options)
    found = weight_processing(model)
    assert (found.is_folded, found.is_centred) == (is_folded, is_centred)
    assert found.name == ("processed" if is_folded or is_centred else "raw")


def test_bfloat16_does_not_hide_centring(tokenizer):
    model = hooked_transformer(tokenizer, 0, normalization_type="LN")
    raw = copy.deepcopy(model).to(torch.bfloat16)
    model.process_weights_()
    assert weight_processing(model.to(torch.bfloat16)).is_centred
    assert not weight_processing(raw).is_centred


def test_two_bridges_over_one_module_are_refused(tmp_path):
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path / "model")
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    boot = [
        TransformerBridge.boot_transformers(str(folder), hf_model=module, device="cpu")
        for _ in range(2)
    ]
    with pytest.raises(ValueError, match=r"two bridges over one Hugging Face module"):
        ModelPair(*boot, hook_name=HOOK)
