"""Settings: what is chosen where nothing is given, what is refused, and how files are read."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import numpy as np
import pytest

from tl_crosscoder import RunConfig, TrainConfig, preset
from tl_crosscoder.config.causal import CausalQuestion
from tl_crosscoder.config.inputs import ContrastiveConfig, ModelsConfig
from tl_crosscoder.config.presets import L1, BatchTopK, Matryoshka
from tl_crosscoder.config.settings import Settings
from tl_crosscoder.config.training import HarvestConfig
from tl_crosscoder.config.yaml import read_yaml
from tl_crosscoder.crosscoder.config import AuxK
from tl_crosscoder.integrations.config import JudgeConfig

RUN = {"base": "b", "finetuned": "f", "hook_name": "h", "text": "t", "output": "o"}


def test_the_learning_rate_rises_stays_and_falls():
    config = TrainConfig(n_tokens=100, batch_size=1, lr=1.0, lr_warmup_steps=10, lr_decay_share=0.2)
    plan = config.plan(d_model=8)
    rates = [plan.learning_rate(s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)  # (0 + 1) / 10
    assert rates[9:80] == [1.0] * 71
    # The last 20 steps fall linearly: step 80 has 20 left of 21, step 99 has 1.
    assert rates[80] == pytest.approx(20 / 21)
    assert rates[99] == pytest.approx(1 / 21)


def test_without_warm_up_and_decay_it_is_constant():
    config = TrainConfig(n_tokens=50, batch_size=1, lr=0.5, lr_warmup_steps=0, lr_decay_share=0)
    assert {config.plan(d_model=8).learning_rate(s) for s in range(50)} == {0.5}


def test_what_is_not_given_follows_from_width_and_text():
    plan = TrainConfig().plan(d_model=96, n_text_tokens=30_000)
    assert (plan.n_tokens, plan.batch_size, plan.d_sae) == (300_000, 600, 1536)
    plan = TrainConfig().plan(d_model=96, n_text_tokens=3_000)
    assert (plan.n_tokens, plan.batch_size, plan.d_sae) == (30_000, 64, 300)
    assert plan.lr_warmup_steps == 46  # a tenth of 30,000 // 64 = 468 steps
    plan = TrainConfig(d_sae=7, lr_warmup_steps=9).plan(d_model=96, n_text_tokens=10**9)
    assert (plan.n_tokens, plan.d_sae, plan.lr_warmup_steps) == (2_000_000, 7, 9)
    assert TrainConfig(expansion=3).plan(d_model=96).d_sae == 288
    # At least four latents for each active one.
    assert TrainConfig(n_tokens=100).plan(d_model=96, k=9).d_sae == 36


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (TrainConfig, {"batch_size": 0}, "batch_size is 0"),
        (TrainConfig, {"lr": -1.0}, "lr is -1"),
        (TrainConfig, {"lr_decay_share": 2.0}, r"it must be in \[0, 1\]"),
        (TrainConfig, {"d_sae": 0}, "d_sae is 0"),
        (TrainConfig, {"lr": float("nan")}, "lr is nan; it must be above 0"),
        (TrainConfig, {"lr": float("inf")}, "lr is inf; it must be above 0 and finite"),
        (TrainConfig, {"lr_warmup_steps": -1}, "lr_warmup_steps is -1; it must be 0 or more"),
        (TrainConfig, {"auxk_weight": -0.1}, "auxk_weight is -0.1; it must be 0 or more"),
        (TrainConfig, {"dead_after_tokens": 0}, "dead_after_tokens is 0; it must be above 0"),
        (TrainConfig, {"seed": -1}, "seed is -1; it must be 0 or more"),
        (L1, {"warm_up_share": -0.5}, r"warm_up_share is -0.5; it must be in \[0, 1\]"),
        (Matryoshka, {"prefix_shares": (0.5, 1.0)}, r"0.5, 1.0\); it must be in \(0, 1\)"),
        (AuxK, {"weight": -1.0}, "weight is -1.0; it must be 0 or more"),
        (BatchTopK, {"k": float("nan")}, "k is nan; it must be above 0"),
        (TrainConfig, {"n_tokens": 10, "batch_size": 20}, "less than one batch"),
        (HarvestConfig, {"shard_tokens": 0}, "shard_tokens is 0"),
        (HarvestConfig, {"n_first": -1}, "n_first is -1"),
        (HarvestConfig, {"max_norm_multiple": 0.5}, "it must be above 1"),
        (HarvestConfig, {"max_norm_multiple": float("nan")}, "it must be above 1"),
        (HarvestConfig, {"max_documents": -1}, "max_documents is -1; it must be above 0"),
        (RunConfig, {"held_out": float("nan")}, "held_out is nan"),
        (RunConfig, {"n_measured_tokens": 0}, "n_measured_tokens is 0"),
        (RunConfig, {"n_calibration_tokens": 0}, "n_calibration_tokens is 0"),
        (RunConfig, {"held_out": 1.0}, "held_out is 1.0"),
        (RunConfig, {"context_size": 1}, "context_size is 1"),
        (ContrastiveConfig, {"max_new_tokens": 0}, "max_new_tokens is 0; it must be above 0"),
        (ContrastiveConfig, {"n_prompts": -1}, "n_prompts is -1"),
        (ContrastiveConfig, {"temperature": -1.0}, "temperature is -1.0; it must be 0 or more"),
        (ContrastiveConfig, {"temperature": float("nan")}, "temperature is nan"),
        (
            ContrastiveConfig,
            {"temperature": 0.0, "n_prompts": 65},
            "64 built-in prompts .* n_prompts is 65",
        ),
    ],
)
def test_values_that_cannot_be_are_refused(kind, fields, message):
    output = {"output": "o"} if issubclass(kind, ModelsConfig) else {}
    with pytest.raises(ValueError, match=message):
        kind(**output, **fields)


def every_settings(kind: type = Settings) -> Iterator[type]:
    for own in kind.__subclasses__():
        yield own
        yield from every_settings(own)


def test_every_number_of_every_settings_class_has_a_range():
    kinds = {k for k in every_settings() if is_dataclass(k) and k.__module__.startswith("tl_c")}
    assert {RunConfig, HarvestConfig, JudgeConfig, CausalQuestion, AuxK, BatchTopK, L1} <= kinds
    for kind in kinds:
        hints = get_type_hints(kind, include_extras=True)
        for name in (field.name for field in fields(kind)):
            is_number = re.search(r"\b(int|float)\b", str(hints[name]))
            assert not is_number or "Range(" in str(hints[name]), (kind, name)


def test_values_are_read_in_python_as_they_are_from_files():
    """As they are where nobody checks annotations: in the tests that comes first."""

    def made(**values):
        config = object.__new__(TrainConfig)
        for field in fields(TrainConfig):
            object.__setattr__(config, field.name, values.get(field.name, field.default))
        config.__post_init__()
        return config

    config = made(n_tokens=1e6, d_sae=np.int64(8), lr="1e-4", batch_size=64)
    read = [config.n_tokens, config.d_sae, config.lr, config.batch_size]
    assert read == [1_000_000, 8, 1e-4, 64]
    assert [type(value) for value in read] == [int, int, float, int]
    for name, value in {"normalize": "no", "batch_size": 1.5, "kernels": "fast"}.items():
        with pytest.raises(ValueError, match=f"{name} is {value!r}; it must be"):
            made(**{name: value})


def test_yaml_has_the_same_fields(tmp_path):
    path = tmp_path / "run.yaml"
    given = RUN | {"preset": "{name: delta, k: 7, dual_k: false}", "lr": 0.5}
    path.write_text("\n".join(f"{k}: {v}" for k, v in given.items()))
    config = RunConfig.from_yaml(path)
    assert config == RunConfig(**RUN, preset=preset("delta", k=7, dual_k=False), lr=0.5)
    assert RunConfig.from_mapping(config.to_dict(), name="again") == config


def test_yaml_numbers_without_a_point_are_numbers(tmp_path):
    path = tmp_path / "run.yaml"
    given = RUN | {"lr": "1e-4", "n_tokens": "1e6", "d_sae": "2.0e3", "max_documents": "5.0"}
    path.write_text("\n".join(f"{k}: {v}" for k, v in given.items()))
    config = RunConfig.from_yaml(path)
    assert config.lr == 1e-4
    whole = [config.n_tokens, config.d_sae, config.max_documents]
    assert whole == [1_000_000, 2_000, 5]
    assert {type(n) for n in whole} == {int}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("base: [", "not valid YAML"),
        ("- a", "must be a mapping"),
        ("base: b\nlr: fast", "lr is 'fast'; it must be a number"),
        ("n_tokens: 3.5\noutput: o", "n_tokens is 3.5; it must be a whole number"),
        ("pack: 1\noutput: o", "pack is 1; it must be true or false"),
        ("normalize: 'no'\noutput: o", "normalize is 'no'; it must be true or false"),
        ("n_tokens: true\noutput: o", "n_tokens is True; it must be a whole number"),
        ("kernels: fast\noutput: o", "kernels is 'fast'; it must be one of auto, dense"),
        ("n_tokens: 1e-6\noutput: o", "n_tokens is '1e-6'; it must be a whole number"),
        ("n_tokens: .inf\noutput: o", "n_tokens is inf; it must be a whole number"),
        ("context_size: '16'\noutput: o", "context_size is '16'; it must be a whole number"),
        ("held_out: 'nan'\noutput: o", "held_out is 'nan'; it must be a number"),
        ("on_bad_document: drop\noutput: o", "on_bad_document is 'drop'; it must be one of error"),
        ("base: 3\noutput: o", "base is 3; it must be text or null"),
        ("mixture: 3\noutput: o", "mixture is 3; it must be a list, each item a mapping"),
        ("preset: top-k\noutput: o", "preset 'top-k' is not known; it is one of batchtopk, topk"),
        (
            "preset: {name: l1, k: 3}\noutput: o",
            r"preset 'l1' has unknown fields \['k'\]; valid are",
        ),
        ("preset: {k: many}\noutput: o", "preset 'batchtopk': k is 'many'; it must be a number"),
        ("preset: 3\noutput: o", r"preset is 3; give preset\(NAME, ...\)"),
        (
            "preset: {name: delta, shared_share: 1}\noutput: o",
            r"shared_share is 1; it must be in",
        ),
        ("base: b\nlearning_rate: 1", r"unknown fields \['learning_rate'\]"),
        ("base: b", r"lacks \['output'\]"),
        ("text: t\nmixture: [{text: u}]\noutput: o", "not both"),
        ("mixture: [{text: u, wait: 2}]\noutput: o", r"mixture has unknown fields \['wait'\]"),
        (
            "mixture: [{text: u, weight: .inf}]\noutput: o",
            "mixture: weight is inf; it must be above 0 and finite",
        ),
        ("mixture: [{text: u, weight: 0}]\noutput: o", "mixture: weight is 0; it must be above 0"),
    ],
)
def test_bad_yaml_is_refused(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        RunConfig.from_yaml(path)
    with pytest.raises(FileNotFoundError, match="no config file"):
        RunConfig.from_yaml(tmp_path / "none.yaml")


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LAUGHS, r"holds 4\d\d,\d\d\d,\d\d\d values, aliases"),
        ("base: &a [*a]", "values, aliases"),
        ("base: &a {<<: *a}", "values, aliases"),
        ("[" * 5000, "nested too deeply|not valid YAML"),
        ("base: \x00", "not valid YAML"),
        ("when: 2024-99-99", "not valid YAML"),
    ],
)
def test_yaml_that_grows_without_end_is_refused(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_yaml(path)


def test_aliases_that_save_writing_are_taken(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("- &first {lr: 0.1}\n- *first\n- {<<: *first, d_sae: 8}\n")
    assert read_yaml(path) == [{"lr": 0.1}, {"lr": 0.1}, {"lr": 0.1, "d_sae": 8}]


def test_the_file_of_a_training_run_gives_contrastive_text_its_models_alone(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(
        "base: a\nadapter: b\nhook_name: blocks.3.hook_resid_post\noutput: runs/x\nk: 5\n"
        "difference: true\nbatch_size: 4096\nmixture:\n  - {text: web}\n"
    )
    config = ContrastiveConfig.from_yaml(run, default={"output": "x.jsonl"})
    assert config == ContrastiveConfig(base="a", adapter="b", output="x.jsonl")
    with pytest.raises(ValueError, match=r"lacks .'output'."):
        ContrastiveConfig.from_yaml(run)

    path = tmp_path / "own.yaml"
    path.write_text("base: a\nfinetuned: b\noutput: x.jsonl\ntemperature: 7e-1\nbatch_size: 8\n")
    config = ContrastiveConfig.from_yaml(path)
    assert (config.output, config.temperature, config.batch_size) == ("x.jsonl", 0.7, 8)
    path.write_text("base: a\noutput: x.jsonl\nk: 5\n")
    with pytest.raises(ValueError, match=r"unknown fields \['k'\]"):
        ContrastiveConfig.from_yaml(path)
