"""The papers' set-ups in configs/: each is a run that loads, with the papers' figures in it."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tl_crosscoder import RunConfig
from tl_crosscoder.config.presets import L1, BatchTopK
from tl_crosscoder.crosscoder.config import AuxK, CrosscoderTrainingConfig
from tl_crosscoder.models.site import sites_of
from tl_crosscoder.train.presets import recipe_of

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
DELTA = [name for name in FILES if name.startswith("delta_")]
MINDER = ["minder_gemma2_2b_batchtopk", "minder_gemma2_2b_l1"]
SHAPES = {
    "meta-llama/Llama-3.1-8B-Instruct": (4096, 32),
    "meta-llama/Llama-3.2-1B-Instruct": (2048, 16),
    "unsloth/Qwen2.5-7B-Instruct": (3584, 28),
    "google/gemma-2-9b-it": (3584, 42),
    "google/gemma-2-2b": (2304, 26),
}
"""Width and number of layers of the bases."""
every_file = pytest.mark.parametrize("name", FILES)


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def config_of(name: str) -> RunConfig:
    return RunConfig.from_yaml(FOLDER / f"{name}.yaml")


def dictionary_of(name: str) -> CrosscoderTrainingConfig:
    """The dictionary of a run, from the widths above in place of models."""
    config = config_of(name)
    d_model = SHAPES[str(config.base)][0]
    plan = config.plan(d_model=d_model)
    recipe = recipe_of(config.preset, n_steps=plan.n_steps)
    sites = tuple(replace(site, d_model=d_model) for site in sites_of(config))
    return CrosscoderTrainingConfig(
        d_in=sum(site.d_model for site in sites),
        d_sae=plan.d_sae,
        sites=sites,
        sparsity=recipe.sparsity,
        partitions=recipe.partitions,
        delta_loss=recipe.delta_loss,
        compute_dtype=config.compute_dtype,
        auxk=AuxK(weight=config.auxk_weight) if config.auxk_weight else None,
        reconstruction=config.reconstruction,
    )


def test_there_are_ten_organisms_and_two_dictionaries_of_a_chat_model():
    assert len(DELTA) == 10
    assert sorted(set(FILES) - set(DELTA)) == MINDER
    families = {"em": 6, "sdf": 2, "subliminal": 1, "taboo": 1}
    assert {f: sum(f"_{f}_" in name for name in DELTA) for f in families} == families


@every_file
def test_a_run_compares_two_models_in_the_middle_on_a_mixture(name):
    config = config_of(name)
    base, finetuned = sites_of(config)
    assert base.adapter is None
    assert finetuned.label != base.label
    middle = SHAPES[str(config.base)][1] // 2
    assert base.hook_name == finetuned.hook_name == f"blocks.{middle}.hook_resid_post"
    assert config.output == f"runs/{name}"
    assert config.text is None
    assert sum(source.weight for source in config.mixture) == pytest.approx(1)
    assert len({source.name for source in config.mixture}) == len(config.mixture)


@every_file
def test_the_header_says_how_to_run_it_and_where_the_ids_come_from(name):
    text = text_of(name)
    assert f"#   tl-crosscoder train --config configs/{name}.yaml\n" in text
    assert "# Source of " in text
    assert re.search(r" at [0-9a-f]{7}\b", text), "a source is pinned to a commit"


def test_no_two_files_compare_the_same_models():
    pairs = {tuple(site.label for site in sites_of(config_of(name))) for name in DELTA}
    assert len(pairs) == len(DELTA)


def test_the_readme_has_a_row_for_every_file():
    rows = re.findall(r"^\| `(\w+)\.yaml` \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == FILES


@pytest.mark.parametrize("name", DELTA)
def test_a_delta_crosscoder_is_the_paper_s(name):
    config, cfg = config_of(name), dictionary_of(name)
    assert config.plan(d_model=1).n_steps == 50_000
    assert config.batch_size == 4096
    assert config.context_size == 1024
    assert (config.lr, config.dtype, config.compute_dtype) == (1e-4, "bfloat16", "bfloat16")
    d_model = SHAPES[str(config.base)][0]
    assert (cfg.d_in, cfg.d_sae) == (2 * d_model, 5 * d_model)
    shared, delta = cfg.partitions
    assert (shared.name, shared.share, shared.k) == ("shared", 0.2, 400)
    assert (delta.name, delta.share, delta.k) == ("delta", 0.8, 200)
    assert cfg.delta_loss is not None
    assert (cfg.delta_loss.weight, cfg.delta_loss.partition) == (0.005, "delta")
    assert cfg.auxk is not None
    assert cfg.auxk.weight == 1 / 32
    # A tenth of the tokens is contrastive, and the header makes them.
    *_, contrastive = config.mixture
    assert (contrastive.text, contrastive.weight) == (f"contrastive/{name}.jsonl", 0.1)
    header = f"#   tl-crosscoder contrastive --config configs/{name}.yaml \\\n#     --output {{}}\n"
    assert header.format(contrastive.text) in text_of(name)


@pytest.mark.parametrize("name", MINDER)
def test_a_dictionary_of_the_chat_model_is_the_paper_s(name):
    config, cfg = config_of(name), dictionary_of(name)
    assert (cfg.d_in, cfg.d_sae) == (2 * 2304, 32 * 2304)
    assert cfg.d_sae == 73_728
    # 100M tokens of each text: 200M pairs in batches of 2,048.
    assert config.plan(d_model=1).n_steps == math.floor(200e6 / 2048) == 97_656
    assert config.lr == 1e-4
    assert not config.normalize
    assert [source.weight for source in config.mixture] == [0.5, 0.5]


def test_one_has_k_100_and_one_the_penalty_of_the_paper():
    batchtopk, l1 = map(config_of, MINDER)
    assert batchtopk.preset == BatchTopK(k=100)
    # The paper's mean over two sites is half of our sum: its 4.1e-2 counts twice, as its 1/32 does.
    assert (batchtopk.reconstruction, l1.reconstruction) == ("norm", "norm")
    assert l1.preset == L1(coefficient=2 * 4.1e-2)
    assert batchtopk.auxk_weight == 2 / 32
    assert dictionary_of("minder_gemma2_2b_l1").auxk is None
