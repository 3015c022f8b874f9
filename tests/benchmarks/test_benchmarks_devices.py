"""The scripts for a GPU and for several processes, at a small size on the CPU."""

import json

import pytest


def test_everything_for_a_gpu_runs_on_a_cpu(run, tmp_path, capsys):
    run("gpu.py", "--device", "cpu", "--output", tmp_path / "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text())
    step = found["step"]
    floor = step["product_ms"] + step["optimizer_ms"]
    assert step["share_of_floor"] == pytest.approx(floor / step["step_ms"])
    assert step["held_gb"] == pytest.approx(16 * (2 * 64 * 512 + 64 + 512) / 1e9)
    assert min(found["rates"].values()) > 0
    assert found["harvest"]["of_bare"] < 2
    assert found["scaling"]["tokens_s"] < found["scaling"]["encode_tokens_s"]
    assert "harvest: tokens_s" in capsys.readouterr().out


def test_two_processes_give_the_dictionary_of_one(run, tmp_path):
    output = tmp_path / "parallel.json"
    run("parallel.py", "--output", output)
    one, two = json.loads(output.read_text())["rows"]
    assert [one["mesh"], two["mesh"]] == [[1, 1], [1, 2]]
    assert one["n_threads"] == 1
    assert one["difference"] == 0
    assert two["difference"] < 1e-5
    # Half the latents, and all of the bias.
    assert two["held_mb"] == pytest.approx(one["held_mb"] / 2, rel=0.01)
    run("parallel.py", "--output", output)  # what is there is not run again
    assert len(json.loads(output.read_text())["rows"]) == 2
