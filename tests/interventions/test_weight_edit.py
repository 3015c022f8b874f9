import pytest
import torch
from models.tiny_pairs import TEXTS, hooked_transformer

from tl_crosscoder import Crosscoder, ModelPair
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import orthonormal
from tl_crosscoder.interventions.weight_edit import (
    WeightEdit,
    ablation_weights,
    projection_weights,
)
from tl_crosscoder.models.hooked import replacing_hook

DIRECTIONS = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def gpt2(gpt2_folder):
    return ModelPair.from_pretrained(*[gpt2_folder] * 2, hook_name="blocks.1.hook_mlp_out")


@pytest.fixture
def hooked(pairs):
    """A model of our own, with biases that are not 0."""
    model = hooked_transformer(pairs["hooked"].tokenizer, 7)
    for name, parameter in model.named_parameters():
        if ".b_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def model_of(kind, *, pairs, hooked, gpt2):
    if kind == "hooked":
        return hooked
    return gpt2.models[1] if kind == "gpt2" else pairs[kind].models[1]


def logits(model, tokens, *hooks):
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=hooks)


@pytest.mark.parametrize("kind", ["hooked", "llama", "gpt2"])
@pytest.mark.parametrize("hook_name", ["blocks.1.hook_mlp_out", "blocks.2.hook_attn_out"])
def test_projected_weights_do_what_the_hook_does(pairs, hooked, gpt2, kind, hook_name):
    model = model_of(kind, pairs=pairs, hooked=hooked, gpt2=gpt2)
    tokens = pairs["llama"].to_tokens(TEXTS)
    Q = orthonormal(DIRECTIONS)
    before = logits(model, tokens)
    expected = logits(model, tokens, replacing_hook(hook_name, lambda x: x - x @ Q @ Q.T))
    assert (expected - before).abs().max() > 0.05
    edit = projection_weights(model, hook_name, DIRECTIONS, tokens=tokens)
    assert torch.equal(logits(model, tokens), before)
    with edit.applied(model) as edited:
        torch.testing.assert_close(logits(edited, tokens), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, tokens), before)
    part = hook_name.split("_")[1]
    n_expected = 1 if kind == "llama" else 2
    assert len(edit.parameters) == n_expected
    assert all(name.startswith(f"blocks.{hook_name[7]}.{part}.") for name in edit.parameters)


def test_projecting_out_an_axis_clears_a_column_by_hand(hooked, pairs):
    # Q = e_0: W (I - e_0 e_0') has 0 in the column of e_0 and is W elsewhere; so is the bias.
    axis = torch.eye(16)[:1]
    tokens = pairs["hooked"].to_tokens(TEXTS)
    edit = projection_weights(hooked, "blocks.1.hook_mlp_out", 5 * axis, tokens=tokens)
    for name, old in (("W_out", hooked.blocks[1].mlp.W_out), ("b_out", hooked.blocks[1].mlp.b_out)):
        new = edit.parameters[f"blocks.1.mlp.{name}"]
        assert torch.equal(new[..., 0], torch.zeros_like(new[..., 0]))
        torch.testing.assert_close(new[..., 1:], old[..., 1:].detach())


@pytest.mark.parametrize("kind", ["hooked", "llama"])
def test_a_saved_edit_goes_into_a_fresh_model(pairs, folders, hooked, tmp_path, kind):
    pair, hook_name = pairs[kind], "blocks.1.hook_mlp_out"
    tokens = pair.to_tokens(TEXTS)
    model = pair.models[1]
    edit = projection_weights(model, hook_name, DIRECTIONS, tokens=tokens)
    before = logits(model, tokens)
    with edit.applied(model):
        expected = logits(model, tokens)
    # The old weights are back after an error too.
    with pytest.raises(IndexError), edit.applied(model):
        logits(model, tokens + 10_000)
    assert torch.equal(logits(model, tokens), before)
    loaded = WeightEdit.load(edit.save(tmp_path / "edit.safetensors"))
    assert loaded.hook_name == hook_name
    assert all(torch.equal(loaded.parameters[n], t) for n, t in edit.parameters.items())
    if kind == "llama":
        fresh = ModelPair.from_pretrained(*folders["llama"], hook_name=hook_name).models[1]
    else:
        fresh = hooked_transformer(pair.tokenizer, 2)
    with loaded.applied(fresh):
        assert torch.equal(logits(fresh, tokens), expected)
    # TransformerLens takes the file's names itself.
    fresh.load_state_dict(dict(loaded.parameters), strict=False)
    assert torch.equal(logits(fresh, tokens), expected)
    with (
        pytest.raises(ValueError, match="Load the model that it was made for"),
        loaded.applied(hooked if kind == "llama" else pairs["llama"].models[1]),
    ):
        pass
    with pytest.raises(FileNotFoundError, match="save a WeightEdit first"):
        WeightEdit.load(tmp_path / "none.safetensors")


def test_a_norm_between_weights_and_hook_is_found_by_measuring(pairs):
    model, tokens = pairs["gemma2"].models[1], pairs["gemma2"].to_tokens(TEXTS)
    before = logits(model, tokens)
    with pytest.raises(ValueError, match=r"do not do what the hook at .*norm after the layer"):
        projection_weights(model, "blocks.1.hook_mlp_out", DIRECTIONS, tokens=tokens)
    assert torch.equal(logits(model, tokens), before)
    # Before the norm it is exact.
    projection_weights(model, "blocks.1.mlp.hook_out", DIRECTIONS, tokens=tokens)


def test_latents_are_projected_out_of_the_finetuned_model(pairs, make_crosscoder):
    pair = ModelPair(*pairs["hooked"].models, hook_name="blocks.1.hook_mlp_out")
    made: Crosscoder = make_crosscoder(pair)
    tokens = pair.to_tokens(TEXTS)
    edit = ablation_weights(InterventionContext.of(pair, made), [1, 4], tokens=tokens)
    rows = made.decoder(1)[[1, 4]]
    W = edit.parameters["blocks.1.mlp.W_out"]
    assert (W @ rows.T).abs().max() < 1e-5
    assert (pair.models[1].blocks[1].mlp.W_out @ rows.T).abs().max() > 0.1


def test_hooks_that_no_small_edit_replaces_are_refused(pairs, hooked):
    tokens = pairs["llama"].to_tokens(TEXTS)
    with pytest.raises(ValueError, match=r"stream is a sum .* Export the ablation as a hook"):
        projection_weights(hooked, "blocks.1.hook_resid_post", DIRECTIONS, tokens=tokens)
    with pytest.raises(ValueError, match=r"hook 'blocks\.9\.hook_mlp_out' is not in the model"):
        projection_weights(hooked, "blocks.9.hook_mlp_out", DIRECTIONS, tokens=tokens)
