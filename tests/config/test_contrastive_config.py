"""Settings of contrastive text: refused values, and the files that they are read from."""

from dataclasses import replace

import pytest

from tl_crosscoder.config.inputs import ContrastiveConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be above 0"),
        ({"n_prompts": -1}, "n_prompts is -1"),
        ({"temperature": -1.0}, r"temperature is -1.0; it .* 0 \(greedy\) or above"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 0.0, "n_prompts": 65}, "64 built-in prompts .* n_prompts is 65"),
    ],
)
def test_values_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(ContrastiveConfig(output=""), **fields)


def test_the_file_of_a_training_run_gives_its_models_alone(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(
        "base: a\nadapter: b\nhook_name: blocks.3.hook_resid_post\noutput: runs/x\nk: 5\n"
        "difference: true\nbatch_size: 4096\nmixture:\n  - {text: web}\n"
    )
    config = ContrastiveConfig.from_yaml(run, default={"output": "x.jsonl"})
    assert config == ContrastiveConfig(base="a", adapter="b", output="x.jsonl")
    with pytest.raises(ValueError, match=r"lacks .'output'."):
        ContrastiveConfig.from_yaml(run)


def test_a_file_of_its_own_fields_is_read_like_any_config(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("base: a\nfinetuned: b\noutput: x.jsonl\ntemperature: 7e-1\nbatch_size: 8\n")
    config = ContrastiveConfig.from_yaml(path)
    assert (config.output, config.temperature, config.batch_size) == ("x.jsonl", 0.7, 8)
    path.write_text("base: a\noutput: x.jsonl\nk: 5\n")
    with pytest.raises(ValueError, match=r"unknown fields \['k'\]"):
        ContrastiveConfig.from_yaml(path)
