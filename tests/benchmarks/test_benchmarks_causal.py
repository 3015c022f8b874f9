"""Benchmarks of measures and interventions run at a tiny size; numbers are not looked at."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def printed_by(script: str, *flags: str) -> str:
    command = [sys.executable, BENCHMARKS / script, "--quick", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_measure_has_a_speed_beside_that_of_encoding():
    text = printed_by("analysis_speed.py")
    for name in ("encode + Latent Scaling ", "encode + examples", "one latent at a time"):
        assert name in text
    assert "patching, eight variants" in text


def test_every_set_of_latents_is_tested(tmp_path):
    text = printed_by("causal_tests.py", "--organisms", "false-fact", "--runs", str(tmp_path))
    for test in ("necessity", "insert"):
        for name in ("top 3 by score", "top 30 by R"):
            assert f"{test:<10} {name}" in text
