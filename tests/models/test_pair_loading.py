import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from models.tiny_pairs import D_MODEL, FAMILIES, HOOK, TEXTS, save_adapter, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tl_crosscoder.models.pair import ModelPair

# peft 0.21 reads what transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_of_transformers(folders, pairs, family):
    """hidden_states[i + 1] of transformers is the output of block i."""
    pair = pairs[family]
    assert pair.weight_processing == "raw"
    assert [site.model_name for site in pair.sites] == [str(f) for f in folders[family]]
    tokens = pair.to_tokens(TEXTS[0])
    for i, folder in enumerate(folders[family]):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            hidden = model(tokens, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(pair.activations(tokens)[:, :, i], hidden)


def test_an_adapter_is_merged_into_a_second_copy_of_the_base(folders, tmp_path):
    base = folders["llama"][0]
    adapter = save_adapter(tmp_path / "adapter", base)
    pair = ModelPair.from_pretrained(base, adapter=adapter, hook_name=HOOK)
    tokens = pair.to_tokens(TEXTS)
    alone = ModelPair.from_pretrained(base, base, hook_name=HOOK).activations(tokens)
    activations = pair.activations(tokens)
    assert torch.equal(activations[:, :, 0], alone[:, :, 0])
    assert (activations[:, :, 1] - alone[:, :, 1]).abs().max() > 1e-2
    assert pair.sites[1].adapter == str(adapter)
    assert pair.sites[1].model_name == str(base)
    assert pair.sites[0].adapter is None
    assert str(adapter) in repr(pair)


def test_an_adapter_that_adds_nothing_gives_the_base_bit_for_bit(folders, tmp_path):
    base = folders["llama"][0]
    adapter = save_adapter(tmp_path / "adapter", base, is_zero=True)
    pair = ModelPair.from_pretrained(base, adapter=adapter, hook_name=HOOK)
    activations = pair.activations(pair.to_tokens(TEXTS))
    assert torch.equal(activations[:, :, 0], activations[:, :, 1])


@pytest.mark.parametrize("wrong", ["missing/folder/here", "./missing", "/missing"])
def test_a_missing_folder_is_named(folders, wrong):
    with pytest.raises(FileNotFoundError, match=f"folder '{wrong}' does not exist"):
        ModelPair.from_pretrained(wrong, wrong, hook_name=HOOK)
    with pytest.raises(FileNotFoundError, match="check the path of a PEFT adapter"):
        ModelPair.from_pretrained(folders["llama"][0], adapter=wrong, hook_name=HOOK)


def test_a_folder_without_a_model_or_without_a_whole_adapter_is_named(folders, tmp_path):
    base, empty = folders["llama"][0], tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"is not a model: it has no config\.json"):
        ModelPair.from_pretrained(empty, empty, hook_name=HOOK)
    with pytest.raises(FileNotFoundError, match=r"PEFT adapter: it has no adapter_config.json"):
        ModelPair.from_pretrained(base, adapter=empty, hook_name=HOOK)
    adapter = save_adapter(tmp_path / "adapter", base)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="PEFT adapter: it has no adapter_model file"):
        ModelPair.from_pretrained(base, adapter=adapter, hook_name=HOOK)


@pytest.mark.filterwarnings("default:Found missing adapter keys")
def test_an_adapter_for_another_base_is_refused(folders, tmp_path):
    wide = save_model(tmp_path / "wide", hidden_size=2 * D_MODEL)
    deep = save_model(tmp_path / "deep", num_hidden_layers=4)
    base = folders["llama"][0]
    adapters = [save_adapter(tmp_path / f"for-{name.name}", name) for name in (wide, base, deep)]
    for adapter, wrong_base in zip(adapters, [base, deep, base], strict=True):
        with pytest.raises(ValueError, match="does not fit base model") as caught:
            ModelPair.from_pretrained(wrong_base, adapter=adapter, hook_name=HOOK)
        assert "It was trained on" in str(caught.value)


@pytest.mark.parametrize(
    ("trained_on", "message"),
    [
        (
            {"base_model_name_or_path": "owner/other"},
            "trained on 'owner/other', but is put on '/",
        ),
        ({"base_model_name_or_path": "/elsewhere/{name}"}, None),
        ({"base_model_name_or_path": "/cache/models--owner--{name}/snapshots/0123"}, None),
        ({"base_model_name_or_path": None}, None),
        ({"revision": "v2"}, r"trained on '.*' at revision 'v2', but is put on '.*': unless"),
        ({"revision": "main"}, None),
    ],
)
def test_an_adapter_of_another_base_of_equal_shapes_is_named(
    folders, tmp_path, trained_on, message
):
    base = folders["llama"][0]
    path = save_adapter(tmp_path, base) / "adapter_config.json"
    said = {k: v and v.format(name=base.name) for k, v in trained_on.items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    expected = nullcontext() if message is None else pytest.warns(UserWarning, match=message)
    with expected:
        ModelPair.from_pretrained(base, adapter=tmp_path, hook_name=HOOK)


def test_an_adapter_of_prompts_is_refused(folders, tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    base = folders["llama"][0]
    model = AutoModelForCausalLM.from_pretrained(base)
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(model, prompt).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"PROMPT_TUNING, which changes no weights"):
        ModelPair.from_pretrained(base, adapter=tmp_path, hook_name=HOOK)


def test_a_folder_of_weights_that_do_not_open_is_explained(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(ValueError, match="could not be loaded"):
        ModelPair.from_pretrained(tmp_path, tmp_path, hook_name=HOOK)


def with_weights(folder, model, **changes):
    """A copy of a saved model with some tensors replaced, or left out where they are None."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("is_adapted", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, r"missing model\.layers\.1\.mlp\.up_proj\.w"),
        (
            {"lm_head.weight": None, "model.norm.weight": None},
            "missing lm_head.*, model.norm.weight",
        ),
        (
            {"model.norm.weight": torch.ones(5)},
            rf"another shape model.norm.* \[5\] for \[{D_MODEL}",
        ),
        (
            {"model.layers.9.gone": torch.ones(2)},
            "without a place in the model model.layers.9",
        ),
    ],
)
def test_a_model_that_is_not_whole_is_refused(folders, tmp_path, changes, message, is_adapted):
    """transformers would fill what is missing with random numbers, other ones in each run."""
    base = folders["llama"][0]
    wrong = with_weights(tmp_path / "wrong", base, **changes)
    pair = (
        {"adapter": save_adapter(tmp_path / "adapter", base)} if is_adapted else {"finetuned": base}
    )
    with pytest.raises(ValueError, match=f"'{wrong}' could not be loaded: .*{message}") as caught:
        ModelPair.from_pretrained(wrong, hook_name=HOOK, **pair)
    assert "random numbers" in str(caught.value)


def test_weights_beside_the_decoder_are_left_out_and_named(folders, pairs, tmp_path):
    """As the value head of a trainer."""
    base, tuned = folders["llama"]
    tuned = with_weights(tmp_path / "tuned", tuned, **{"v_head.summary.weight": torch.ones(1, 4)})
    with pytest.warns(UserWarning, match=r"CausalLM uses, left out: v_head\.summary\.weight"):
        pair = ModelPair.from_pretrained(base, tuned, hook_name=HOOK)
    tokens = pair.to_tokens(TEXTS)
    assert torch.equal(pair.activations(tokens), pairs["llama"].activations(tokens))


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_model_that_needs_a_library_names_it(folders, tmp_path):
    config = json.loads((folders["llama"][0] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    shutil.copytree(folders["llama"][0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"could not be loaded: .*bitsandbytes"):
        ModelPair.from_pretrained(tmp_path, tmp_path, hook_name=HOOK)


def test_importing_the_pair_does_not_import_transformer_lens():
    code = "import sys, tl_crosscoder.models.pair; sys.exit('transformer_lens' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
