"""Models in bfloat16 and in 4 bits.

Measured, |error| / |activation| at the residual stream of TinyStories-656K (trained, width 128), on
a CPU with bitsandbytes 0.50.2: bfloat16 0.5 %, nf4 8 % after the first block and 11 % after the
second.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from models.tiny_pairs import HOOK, N_LAYERS, TEXTS, save_adapter, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_crosscoder import tokenize
from tl_crosscoder.interventions.behaviour import Predictions
from tl_crosscoder.interventions.layer_scan import scan_layers
from tl_crosscoder.models import devices as precision_module
from tl_crosscoder.models.devices import precision, quantized_loading
from tl_crosscoder.models.pair import ModelPair

# peft 0.21 reads what transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install -c constraints.txt bitsandbytes",
)
# As wide as 4-bit weights need on a CPU, and no larger than keeps attention soft.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "initializer_range": 0.1}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(base, finetuned, adapter)."""
    root = tmp_path_factory.mktemp("wide")
    base = save_model(root / "base", seed=0, **WIDE)
    finetuned = save_model(root / "finetuned", seed=1, **WIDE)
    return base, finetuned, save_adapter(root / "adapter", base)


def loaded(wide, **options) -> ModelPair:
    base, _, adapter = wide
    return ModelPair.from_pretrained(base, adapter=adapter, hook_name=HOOK, **options)


def relative_error(found: ModelPair, expected: ModelPair) -> list[float]:
    """|found - expected| / |expected| of the activations of each site."""
    tokens = expected.to_tokens(TEXTS)
    pairs = zip(
        found.activations(tokens).unbind(2), expected.activations(tokens).unbind(2), strict=True
    )
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


def test_bfloat16_models_give_float32_activations(folders, pairs):
    pair = ModelPair.from_pretrained(*folders["llama"], hook_name=HOOK, dtype="bfloat16")
    assert next(iter(pair.models[0].parameters())).dtype == torch.bfloat16
    assert pair.weight_processing == "raw"
    assert pair.activations(pair.to_tokens(TEXTS)).dtype == torch.float32
    # 2^-9 = 0.002 a rounding, of which a few add up.
    assert max(relative_error(pair, pairs["llama"])) < 0.02


def test_a_dtype_that_is_none_is_refused(folders):
    for wrong in ("int8", torch.int64, "nf5"):
        with pytest.raises(ValueError, match=r"is not one: use .* or 'nf4' for 4-bit"):
            ModelPair.from_pretrained(*folders["llama"], hook_name=HOOK, dtype=wrong)


def test_without_bitsandbytes_and_a_merge_are_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(precision_module, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"'nf4' needs bitsandbytes, .*pip install bitsandbytes"):
        ModelPair.from_pretrained("no/such", "no/other", hook_name=HOOK, dtype="nf4")
    monkeypatch.setattr(precision_module, "find_spec", lambda _: "found")
    assert precision("nf4").is_4bit
    with pytest.raises(ValueError, match=r"merge_adapter=True on dtype 'nf4': .*rounds them again"):
        ModelPair.from_pretrained(
            "no/such", adapter="no/other", hook_name=HOOK, dtype="nf4", merge_adapter=True
        )


@needs_bitsandbytes
def test_a_4_bit_base_has_its_adapter_attached(wide):
    pair = loaded(wide, dtype="nf4")
    kinds = [{type(m).__name__ for m in model.modules()} for model in pair.models]
    assert all("Linear4bit" in kind for kind in kinds)
    assert any(name.endswith("lora_A") for name, _ in pair.models[1].named_modules())
    whole = loaded(wide)
    assert pair.sites == whole.sites
    assert min(relative_error(pair, whole)) > 0.03


def dequantised(layer) -> torch.Tensor:
    """A 4-bit weight by the definition: a byte is two codes, a block of 64 has one scale."""
    state = layer.weight.quant_state
    codes = torch.stack([layer.weight.data >> 4, layer.weight.data & 15], dim=-1).long().flatten()
    blocks = state.code[codes].view(-1, 64) * state.absmax.float()[:, None]
    return blocks.view(layer.out_features, layer.in_features)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore:adapter .* was trained on:UserWarning")  # a copy of it
def test_4_bit_activations_are_those_of_the_rounded_weights(wide, tmp_path):
    """Base and adapter: the rounded weights in float32, the adapter merged into them."""
    pair = loaded(wide, dtype="nf4")
    layers = {
        name.replace("._original_component", ""): module
        for name, module in pair.models[0].original_model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    model = AutoModelForCausalLM.from_pretrained(wide[0])
    n_rounded = 0
    for name, module in model.named_modules():
        if name in layers:
            module.weight.data = dequantised(layers[name])
            n_rounded += 1
    assert n_rounded == len(layers) == 7 * N_LAYERS
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(wide[0]).save_pretrained(tmp_path)
    expected = ModelPair.from_pretrained(tmp_path, adapter=wide[2], hook_name=HOOK)
    # bfloat16 arithmetic is what is left.
    assert max(relative_error(pair, expected)) < 0.02


@needs_bitsandbytes
def test_the_layers_of_4_bit_models_are_scanned(wide):
    pair = loaded(wide, dtype="nf4")
    text = tokenize([{"text": text} for text in TEXTS], pair.tokenizer, context_size=12, pack=False)
    scan = scan_layers(pair, Predictions.of(text))
    assert scan.changes
    assert scan.rows[0].passing_share > 0.01
    assert scan.rows[-1].passing_share == pytest.approx(1, abs=0.05)


@needs_bitsandbytes
def test_4_bit_models_of_any_kind_agree_with_their_sites(wide):
    base, finetuned, _ = wide
    pair = ModelPair.from_pretrained(base, finetuned, hook_name=HOOK, dtype="nf4")
    again = ModelPair.from_sites(pair.sites, dtype="nf4")
    tokens = pair.to_tokens(TEXTS)
    assert torch.equal(pair.activations(tokens), again.activations(tokens))
    assert isinstance(pair.generate(TEXTS[0], max_new_tokens=3), str)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore:adapter .* was trained on:UserWarning")  # a copy of it
def test_a_model_saved_in_4_bits_needs_no_dtype_for_it(wide, tmp_path):
    base, _, adapter = wide
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, **quantized_loading("cpu")
    )
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    pair = ModelPair.from_pretrained(tmp_path, adapter=adapter, hook_name=HOOK, dtype="bfloat16")
    expected = loaded(wide, dtype="nf4")
    tokens = pair.to_tokens(TEXTS)
    assert torch.equal(pair.activations(tokens), expected.activations(tokens))
    with pytest.raises(ValueError, match=r"merge_adapter=True on '.*': .*rounds them again"):
        ModelPair.from_pretrained(
            tmp_path, adapter=adapter, hook_name=HOOK, dtype="bfloat16", merge_adapter=True
        )


@needs_bitsandbytes
def test_gradients_flow_through_4_bit_weights(wide):
    """After a pass without gradients: some processors repack the weights in it."""
    pair = loaded(wide, dtype="nf4")
    tokens = pair.to_tokens(TEXTS[0])
    pair.logits(tokens)
    patch = pair.activations(tokens)[:, :, 1].requires_grad_()
    with pair.patched("finetuned", patch) as model:
        model(tokens, return_type="logits").float().square().sum().backward()
    assert patch.grad is not None
    assert patch.grad.abs().max() > 0


@needs_bitsandbytes
def test_widths_that_bitsandbytes_gets_wrong_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match=r"q_proj is 96 wide, .*multiples of 64"):
        ModelPair.from_pretrained(
            *["tl_crosscoder/world-base"] * 2, hook_name="blocks.1.hook_resid_post", dtype="nf4"
        )


@needs_bitsandbytes
def test_4_bit_weights_are_not_compared_with_whole_ones(wide):
    four, whole = loaded(wide, dtype="nf4"), loaded(wide, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"differ in dtype: .*bfloat16 with quantised weights"):
        ModelPair(four.models[0], whole.models[1], hook_name=HOOK)
