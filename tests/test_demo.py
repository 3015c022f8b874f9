import json

import pytest
import torch

from tl_crosscoder import Crosscoder, run_demo
from tl_crosscoder.cli.main import Demo
from tl_crosscoder.demo import N_TOKENS, demo_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A quick look: a tenth of the demo's tokens."""
    output = tmp_path_factory.mktemp("demo") / "out"
    return output, run_demo("taboo", output=str(output), n_tokens=100_000)


def test_a_quick_demo_explains_both_models_and_finds_more_than_chance(result):
    output, demo = result
    assert min(demo.measurement.reconstruction.fve.values()) > 0.8
    assert demo.measurement.reconstruction.difference_fve > 0.3
    assert demo.recovery.share_in_context > demo.recovery.random_share_in_context
    assert json.loads((output / "recovery.json").read_text())["latents"] == [
        s.latent for s in demo.measurement.top
    ]


def test_it_prints_what_was_planted_and_the_verdict(result):
    printed = str(result[1])
    assert "Planted: Every hint in the guessing game is about the moon" in printed
    assert "ound. Planted words, and in the top contexts of how many of these 10" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_its_dictionary_keeps_l0_on_held_out_text(result):
    assert result[1].measurement.reconstruction.l0 == pytest.approx(12, rel=0.05)
    crosscoder = Crosscoder.load(result[0])
    assert torch.equal(crosscoder.threshold, crosscoder.threshold[:1].expand(1024))


def test_the_command_and_the_function_have_the_same_default():
    assert Demo().n_tokens == N_TOKENS
    with pytest.raises(ValueError, match=r"unknown organism 'x'; valid: .*taboo"):
        demo_config("x", output="o")
