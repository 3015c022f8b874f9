"""What a run takes, before anything is downloaded: by hand on the embedded pair, and from a config
of Gemma-2-2B's sizes without weights."""

from dataclasses import replace

import pytest
from transformers import Gemma2Config

from tl_crosscoder import RunConfig, preset
from tl_crosscoder.config.training import HarvestConfig
from tl_crosscoder.run.estimate import estimate, estimate_harvest

PAIR = RunConfig(
    base="tl_crosscoder/world-base",
    adapter="tl_crosscoder/taboo",
    hook_name="blocks.2.hook_resid_post",
    text="tl_crosscoder/taboo",
    output="unused",
    n_tokens=200_000,
    batch_size=1024,
    n_calibration_tokens=50_000,
    n_measured_tokens=50_000,
)
# Four matrices of 96 x 96, three of 96 x 256, two norms of 96.
LAYER = 4 * 96 * 96 + 3 * 96 * 256 + 2 * 96
# Four layers, an embedding of 1,504 that is the head too, a last norm.
WORLD_BASE = 4 * LAYER + 1504 * 96 + 96
CROSSCODER = 2 * 192 * 1536 + 192 + 1536


@pytest.fixture(scope="module")
def gemma_2_2b(tmp_path_factory) -> str:
    """The config.json of Gemma-2-2B and nothing else."""
    folder = tmp_path_factory.mktemp("gemma")
    config = Gemma2Config(
        hidden_size=2304,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        intermediate_size=9216,
        vocab_size=256_000,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return str(folder)


def test_parameters_are_counted_up_to_the_hook():
    base, finetuned = estimate(PAIR).models
    assert base.n_parameters == WORLD_BASE == 587_616
    assert (base.n_layers, base.n_layers_run, base.d_model) == (4, 3, 96)
    # Two FLOPs a weight; scores and their sums, each 2 x 128 x 96 in three layers.
    assert base.flops_per_token == 2 * 3 * LAYER + 2 * 2 * 128 * 96 * 3
    assert finetuned.flops_per_token == base.flops_per_token


def test_memory_and_disk_by_hand():
    found = estimate(PAIR)
    # 32 contexts, 4 heads, 128 x 128 scores: in float32, their softmax, and that again.
    assert found.memory_bytes == {
        "models": 2 * 4 * WORLD_BASE,
        "forward pass": 32 * 4 * 128 * 128 * 12,
        "crosscoder": 4 * 4 * CROSSCODER,
        "batch": 4 * 1024 * (1536 + 3 * 192),
        "mixing buffer": 256 * 128 * 192 * 4,
        "text": 7 * 200_000,
    }
    assert found.disk_bytes == {
        "dictionary": 4 * CROSSCODER,
        "checkpoints": 2 * 3 * 4 * CROSSCODER,
    }
    where = {"base": PAIR.base, "adapter": PAIR.adapter, "hook_name": PAIR.hook_name}
    config = HarvestConfig(**where, output="unused", n_tokens=300_000, store="bfloat16")
    cache = estimate_harvest(config)
    # A row in bfloat16; id, role, source and two masks.
    assert cache.disk_bytes == {"cache": 300_000 * (192 * 2 + 8)}


def test_parts_of_a_batch_and_small_buffers():
    memory = estimate(replace(PAIR, n_accumulated=4, buffer_contexts=4)).memory_bytes
    assert memory["batch"] == 4 * 256 * (1536 + 3 * 192)
    # A buffer holds two batches at least: 2 x 1,024 tokens are 16 contexts and one.
    assert memory["mixing buffer"] == 17 * 128 * 192 * 4


def test_flops_are_those_of_the_models_and_of_the_step():
    found = estimate(PAIR)
    per_model = 2 * 3 * LAYER + 147_456
    assert found.flops == {
        "harvest": 300_000 * 2 * per_model,
        "dense products": 200_000 * 2 * 192 * 1536,
        # Four products with 16 latents each.
        "sparse products": 200_000 * 4 * 2 * 192 * 16,
        "AuxK": round(200_000 * 5 * 2 * 192 * 0.3 * 1536),
    }
    without = estimate(replace(PAIR, auxk_weight=0.0))
    assert without.flops["AuxK"] == 0
    assert "AuxK" not in str(without)


@pytest.mark.parametrize(
    "fields",
    [{"preset": preset("l1")}, {"preset": preset("batchtopk", k=97)}, {"kernels": "dense"}],
)
def test_a_dense_step_has_six_products(fields):
    # 97 of 1,536 latents are more than a sixteenth.
    found = estimate(replace(PAIR, **fields))
    assert found.flops["dense products"] == 200_000 * 6 * 2 * 192 * 1536
    assert found.flops["sparse products"] == 0
    assert found.memory_bytes["batch"] == 4 * 1024 * (6 * 1536 + 3 * 192)


def test_several_hooks_of_one_model_run_it_once_and_a_difference_is_one_site_wide():
    config = replace(PAIR, adapter=None, hook_name="blocks.0.hook_resid_post,blocks.1.hook_mlp_out")
    found = estimate(config)
    (model,) = found.models
    assert (model.n_layers_run, found.d_in) == (2, 192)
    found = estimate(replace(PAIR, preset=preset("diff-sae"), expansion=2))
    assert (found.d_in, found.d_sae, len(found.models)) == (96, 192, 2)


def test_a_hook_after_the_blocks_runs_them_all_and_the_head():
    base, _ = estimate(replace(PAIR, hook_name="ln_final.hook_normalized")).models
    assert base.n_layers_run == 4
    assert base.flops_per_token == 2 * (4 * LAYER + 1504 * 96) + 4 * 128 * 96 * 4


def test_four_bit_weights_need_no_bitsandbytes_to_be_estimated():
    base, _ = estimate(replace(PAIR, dtype="nf4")).models
    # Half a byte a weight of the layers and four bytes for 64 of them; the rest in bfloat16.
    assert base.memory_bytes == round(4 * LAYER * (1 / 2 + 4 / 64)) + 2 * (1504 * 96 + 96)


def test_a_real_model_is_counted_without_weights(gemma_2_2b):
    config = replace(
        PAIR,
        base=gemma_2_2b,
        finetuned=gemma_2_2b,
        adapter=None,
        hook_name="blocks.13.hook_resid_post",
        dtype="bfloat16",
        d_sae=73_728,
        preset=preset("batchtopk", k=100),
    )
    found = estimate(config)
    assert found.models[0].n_parameters == 2_614_341_888
    assert (found.models[0].n_layers_run, found.d_in, found.d_sae) == (14, 4608, 73_728)
    assert found.memory_bytes["models"] == 2 * found.models[0].n_parameters * len(found.models)
    assert found.n_parameters == 2 * 4608 * 73_728 + 4608 + 73_728


def test_of_the_hub_the_config_alone_is_fetched(gemma_2_2b, monkeypatch):
    asked = []

    def fetch(repo, filename, *, revision):
        asked.append((repo, filename, revision))
        return f"{gemma_2_2b}/config.json"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    config = replace(PAIR, base="google/gemma-2-2b", revision="main", dtype="bfloat16")
    found = estimate(config)
    assert asked == [("google/gemma-2-2b", "config.json", "main")] * 2
    # Two bytes a parameter, once: the adapter's base is the same.
    assert found.download_bytes == 2 * 2_614_341_888
    assert "5.23 GB" in str(found)


def test_it_is_shown_as_a_table_of_the_models_and_a_line_a_cost():
    found = estimate(PAIR)
    assert [m.download_bytes for m in found.models] == [0, None]
    _, header, base, adapter, crosscoder, *costs = str(found).splitlines()
    assert header.split() == ["model", "parameters", "run", "download", "memory"]
    assert base.split()[:6] == ["tl_crosscoder/world-base", "588", "k", "3", "of", "4"]
    assert "+ tl_crosscoder/taboo" in adapter
    assert " adapter " in adapter
    assert "crosscoder: 1,536 latents on 192 inputs" in crosscoder
    assert [line.split(":")[0] for line in costs if line[0] != " "] == ["memory", "disk", "FLOPs"]


def test_without_a_hook_point_a_layer_scan_comes_first():
    """At the last layer that it may recommend of four; 32 documents of at most 128 tokens."""
    named, found = estimate(PAIR), estimate(replace(PAIR, hook_name=None))
    # Both models through all layers and the head twice, and the fine-tuned one four times half.
    whole = 2 * (4 * LAYER + 1504 * 96) + 4 * 128 * 96 * 4
    assert found.flops == {"layer scan": 32 * 128 * (2 + 2 + 2) * whole} | named.flops
    assert found.models == named.models
    said = " ".join(str(found).split())
    assert "a layer scan on 32 documents comes first and recommends one" in said
    assert "What follows is for blocks.2.hook_resid_post" in said


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"hook_name": "blocks.4.hook_resid_post"}, ValueError, "layers are blocks.0 to blocks.3"),
        ({"base": "nobody/nothing"}, ValueError, "'nobody/nothing' is not in the hub's cache"),
        ({"base": "tl_crosscoder/nothing"}, FileNotFoundError, "does not come with the package"),
        ({"dtype": "int8"}, ValueError, "dtype 'int8' is not one"),
        ({"adapter": None}, ValueError, "give exactly one of finetuned"),
    ],
)
def test_what_cannot_be_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        estimate(replace(PAIR, **fields))


def test_a_folder_without_a_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ValueError, match="no_such_model"):
        estimate(replace(PAIR, base=str(tmp_path)))
