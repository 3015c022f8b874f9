import json

import pytest
import torch

from tl_crosscoder import Crosscoder, run_demo
from tl_crosscoder.cli.main import Demo
from tl_crosscoder.demo import EMBEDDED, REAL, demo_config, latent_sets, verdicts_of
from tl_crosscoder.organisms.suite import organism
from tl_crosscoder.run.attribution import ranking_of
from tl_crosscoder.run.run import Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A quick look: a tenth of the demo's tokens."""
    output = tmp_path_factory.mktemp("demo") / "out"
    return output, run_demo("false-fact", output=str(output), n_tokens=100_000)


def test_a_quick_demo_explains_both_models_and_finds_what_was_planted(result):
    output, demo = result
    assert min(demo.measurement.reconstruction.fve.values()) > 0.8
    assert demo.measurement.reconstruction.difference_fve > 0.3
    false = next(v for v in demo.verdicts if v.behaviour == "false answer")
    assert false.latents in latent_sets(Run(path=output))
    assert false.base < 0.2 < 0.8 < false.finetuned
    assert false.is_found, false
    kept = json.loads((output / "recovery.json").read_text())
    assert kept["verdicts"] == [*map(str, demo.verdicts)]


def test_it_prints_what_was_planted_and_the_verdicts_first(result):
    printed = str(result[1])
    assert printed.startswith(f"Planted: {organism('false-fact').planted[:40]}")
    words = " ".join(printed.split())
    assert " of 2 planted behaviours found, by latents" in words
    assert words.index("What changed from") > words.index("Ablating ")
    assert max(map(len, printed.splitlines())) <= 100


def test_latents_that_cause_nothing_are_not_found(result):
    """Latents from the middle of the ranking."""
    run = Run(path=result[0])
    last = [row.latent for row in ranking_of(run, n=None, order="attribution").rows[500:510]]
    question, _ = organism("false-fact").planted_questions
    (verdict,) = verdicts_of(run, {"change 1": last}, behaviours=[question])
    assert not verdict.is_found


def test_its_dictionary_keeps_l0_on_held_out_text(result):
    assert result[1].measurement.reconstruction.l0 == pytest.approx(12, rel=0.05)
    crosscoder = Crosscoder.load(result[0])
    assert torch.equal(crosscoder.threshold, crosscoder.threshold[:1].expand(1024))


def test_the_command_and_the_function_have_the_same_default():
    assert Demo().n_tokens is None
    assert demo_config("taboo", output="o").n_tokens == EMBEDDED["n_tokens"]
    assert demo_config("smollm2-taboo", output="o").n_tokens == REAL["n_tokens"]
    assert demo_config("taboo", output="o", n_tokens=5_000).n_tokens == 5_000
    with pytest.raises(ValueError, match=r"unknown organism 'x'; valid: .*taboo"):
        demo_config("x", output="o")
