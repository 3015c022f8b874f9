"""`--workers`: several processes measure and attribute a run, and share organisms out."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from report.report_runs import PAIR, small_run

from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.benchmark.grid import run_benchmark
from tl_crosscoder.cli.main import main
from tl_crosscoder.config.benchmark import BenchmarkConfig
from tl_crosscoder.interventions.attribution_result import Attribution


def command(*arguments: str) -> str:
    """What the command line prints, in a process of its own."""
    how = {"capture_output": True, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    done = subprocess.run([sys.executable, "-m", "tl_crosscoder", *arguments], check=False, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ranked(measured: Measurement) -> list:
    """The ranked latents and the words of their examples; sums differ in their last bits."""
    return [
        (
            found.ranked.latent,
            [(shown.before, shown.token, shown.after) for shown in found.examples],
        )
        for found in measured.top
    ]


@pytest.mark.slow
def test_two_workers_measure_and_attribute_what_one_does(tmp_path, tmp_path_factory):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        shutil.copytree(small_run(tmp_path_factory.getbasetemp(), *PAIR), folder)
    assert main(["analyze", str(one), "--fresh"]) == 0
    printed = command("analyze", str(two), "--fresh", "--workers", "2")
    assert printed.count("latents on") == 1  # by the first process alone
    alone, shared = (Measurement.load(folder) for folder in (one, two))
    assert ranked(shared) == ranked(alone)
    for name, tensor in alone.latents.tensors().items():
        own = shared.latents.tensors()[name]
        assert torch.allclose(own, tensor, rtol=1e-4, equal_nan=True), name
    asked = ["--n-prompts", "12"]
    assert main(["attribute", str(one), *asked]) == 0
    printed = command("attribute", str(two), *asked, "--workers", "2")
    assert printed.count("passes this hook, of which") == 1
    alone, shared = (Attribution.load(folder) for folder in (one, two))
    assert torch.allclose(shared.by_role, alone.by_role, rtol=1e-3, atol=1e-6)
    assert torch.equal(shared.passage_latents, alone.passage_latents)


def test_workers_need_something_to_do(tmp_path, capsys):
    assert main(["analyze", str(tmp_path), "--workers", "2"]) == 2
    assert "several workers measure together" in capsys.readouterr().err
    assert main(["attribute", str(tmp_path), "--workers", "0"]) == 2
    assert "workers is 0; it must be 1 or more" in capsys.readouterr().err


def test_each_process_takes_other_organisms(tmp_path, monkeypatch):
    names = ("taboo", "false-fact", "careless-fire")
    own = {"output": str(tmp_path / "results"), "work": str(tmp_path / "runs")}
    config = BenchmarkConfig(organisms=names, seeds=(0,), methods=("fails",), **own)

    def fails(pair):
        raise ValueError(f"nothing to find in {pair.n}")

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, taken in (("1", {"false-fact"}), ("0", set(names))):
        monkeypatch.setenv("RANK", rank)
        folder = run_benchmark(config, directions={"fails": fails})
        assert {path.stem for path in folder.glob("*.json")} == taken
