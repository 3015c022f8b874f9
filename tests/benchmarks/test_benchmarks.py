"""The benchmark of the training step runs at a tiny size; its times are not looked at."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "training_step.py"
PRODUCTS = ["encoder product", "five dense products"]
OURS = ["ours, batchtopk", "ours, batchtopk, no bf16", "ours, batchtopk, dense"]
WITHOUT_SPARSIFY = f"""
import runpy, sys
sys.modules["sparsify"] = None
sys.path.insert(0, {str(SCRIPT.parent)!r})
sys.argv = ["training_step.py", "--quick"]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def quick(output: Path, *flags: str) -> dict:
    command = [sys.executable, SCRIPT, "--quick", "--rounds", "2", "--output", output, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


def test_a_run_has_every_row_with_its_ratios(tmp_path):
    has_sparsify = importlib.util.find_spec("sparsify") is not None
    skipped = [] if has_sparsify else ["--skip", "sparsify"]
    content = quick(tmp_path / "step.json", "--no-memory", *skipped)
    assert content["machine"]["n_threads"] == 1
    assert content["versions"]["sae-lens"].startswith("6.")
    (result,) = content["results"]
    rows = {r["row"]: r for r in result["rows"]}
    peers = ["SAELens, batchtopk"] + ["sparsify, topk"] * has_sparsify
    assert list(rows) == PRODUCTS + OURS + peers
    for name, row in rows.items():
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert list(row["times_faster_than"]) == peers
        assert row["times_faster_than"].get(name, 1.0) == 1.0


def test_memory_is_measured_against_the_budget(tmp_path):
    content = quick(tmp_path / "step.json", "--skip", "SAELens", "sparsify", *OURS[1:])
    (memory,) = content["results"][0]["memory"].values()
    # 2 sites x 16 = 32 wide, 256 latents: 2 * 32 * 256 + 32 + 256 = 16,672 parameters.
    # Four times (gradients, two moments) and 64 x 256 codes: 83,072 floats of 4 bytes.
    assert memory["budget_bytes"] == 332_288
    assert memory["default_bytes"] > 0
    assert memory["mapped_bytes"] > 0


def test_densities_have_a_fast_and_a_dense_time(tmp_path):
    content = quick(tmp_path / "density.json", "--density")
    rows = content["results"][0]["densities"]
    assert [r["density"] for r in rows if r["sparsity"] == "L1"] == [
        0.5,
        0.2,
        0.1,
        0.05,
        0.02,
        0.01,
    ]
    for row in rows:
        assert row["active"] == pytest.approx(row["density"], rel=0.3)
        assert list(row["median_ms"]) == ["auto", "dense"]


def test_without_sparsify_it_says_how_to_install_it():
    command = [sys.executable, "-c", WITHOUT_SPARSIFY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install -c constraints.txt -e '.[dev,bench]'" in done.stderr


def test_the_data_path_is_measured_in_all_its_parts(tmp_path):
    script, output = ROOT / "benchmarks" / "data_path.py", tmp_path / "data.json"
    command = [sys.executable, script, "--quick", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads(output.read_text())
    assert [row["pair"].split(", ")[1] for row in content["harvest"]] == [
        "bridge", "bridge", "HookedTransformer",
    ]  # fmt: skip
    assert all(speed > 0 for row in content["harvest"] for speed in row["tokens_per_s"].values())
    assert [row["store"] for row in content["reading"]] == [
        "float32",
        "bfloat16",
        "float16",
        "int8",
    ]
    assert content["sweep"]["share"] > 0
