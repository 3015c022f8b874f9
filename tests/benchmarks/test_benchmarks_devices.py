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


@pytest.mark.slow
def test_two_ideas_are_judged_beside_what_they_start_from(run, tmp_path):
    output = tmp_path / "two_ideas.json"
    run("two_ideas.py", "--output", output)
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["organism"], row["method"], row["rho"]) == ("taboo", "batchtopk", 0.5)
    assert min(row["fve"].values()) > 0.3  # L is folded: the dictionary reads raw activations
    orders = {name.partition(":")[0] for name in row if ":" in name}
    assert orders == {"attribution", "over cost"}


@pytest.mark.slow
def test_time_and_memory_are_measured_by_latents_and_by_tokens(run, tmp_path, capsys):
    output, figure = tmp_path / "scale.json", tmp_path / "scale.html"
    run("scale.py", "--output", output, "--figure", figure)
    found = json.loads(output.read_text())
    assert found["harvest"]["n_rows"] == 4244
    sizes = [(r["d_sae"], r["n_tokens"]) for r in found["rows"]]
    assert sizes == [(128, 1024), (256, 1024), (256, 2048)]
    for row in found["rows"]:
        assert row["before_mb"] <= row["train_mb"] <= row["measure_mb"] <= row["resident_mb"]
        assert row["step_ms"] == pytest.approx(1e3 * 128 / row["tokens_s"])
        assert min(row["fve"].values()) > 0
    printed = capsys.readouterr().out
    assert "growth with latents: step_ms" in printed
    assert "growth with tokens: train_s" in printed
    assert "memory in training, MB (slope" in figure.read_text()
