"""Benchmarks of the step and of the data path run at a tiny size; times are not looked at."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PRODUCTS = ["encoder product", "five dense products"]
OURS = ["ours, batchtopk", "ours, batchtopk, no bf16", "ours, batchtopk, dense"]


@pytest.fixture
def quick(run, tmp_path) -> Callable[..., dict]:
    """What the benchmark of the step writes."""

    def quick(*flags: str) -> dict:
        output: Path = tmp_path / "step.json"
        run("training_step.py", "--rounds", "2", "--output", output, *flags)
        return json.loads(output.read_text())

    return quick


def test_a_run_has_every_row_with_its_ratios(quick):
    has_sparsify = importlib.util.find_spec("sparsify") is not None
    skipped = [] if has_sparsify else ["--skip", "sparsify"]
    content = quick("--no-memory", *skipped)
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


def test_memory_is_measured_against_the_budget(quick):
    content = quick("--skip", "SAELens", "sparsify", *OURS[1:])
    (memory,) = content["results"][0]["memory"].values()
    # 2 sites x 16 = 32 wide, 256 latents: 2 * 32 * 256 + 32 + 256 = 16,672 parameters.
    # Four times (gradients, two moments) and 64 x 256 codes: 83,072 floats of 4 bytes.
    assert memory["budget_bytes"] == 332_288
    assert memory["default_bytes"] > 0
    assert memory["mapped_bytes"] > 0


def test_densities_have_a_fast_and_a_dense_time(quick):
    content = quick("--density")
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


def test_without_sparsify_it_says_how_to_install_it(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sparsify", None)
    with pytest.raises(SystemExit, match="2"):
        run("training_step.py")
    assert "pip install -c constraints.txt -e '.[dev,bench]'" in capsys.readouterr().err


# SAELens's store warns of the few contexts that it is given here, and of a tensor that it copies.
@pytest.mark.filterwarnings("default")
def test_the_data_path_is_measured_in_all_its_parts(run, tmp_path):
    output = tmp_path / "data.json"
    run("data_path.py", "--output", output)
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
