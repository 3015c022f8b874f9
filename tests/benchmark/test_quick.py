"""The quick grid from the command line: every kind of method, a null, tables and figures."""

import json

import pytest

from tl_crosscoder.cli.main import main
from tl_crosscoder.config.benchmark import QUICK_METHODS, QUICK_ORGANISMS

pytestmark = pytest.mark.slow


def test_the_quick_grid_runs_prints_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", "run", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in QUICK_METHODS)
    cells = {
        name: json.loads((tmp_path / f"benchmark/{name}.json").read_text())["cells"]
        for name in QUICK_ORGANISMS
    }
    assert {c["method"] for own in cells.values() for c in own} == {*QUICK_METHODS}
    assert not [c["failed"] for own in cells.values() for c in own if "failed" in c]
    # What the fine-tune changed is there to be found, and on the null it is not.
    nats = {
        name: max(r["nats"] for c in own for r in c["rows"] if "nats" in r)
        for name, own in cells.items()
    }
    assert nats["taboo-more-of-base"] < min(nats["taboo"], nats["false-fact"])
    before = {path: path.read_bytes() for path in (tmp_path / "benchmark").glob("*.json")}
    assert main(["benchmark", "run", "--quick"]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert main(["benchmark", "figures"]) == 0
    figure = (tmp_path / "benchmark/methods.html").read_text()
    assert all(name in figure for name in QUICK_METHODS)
    assert (tmp_path / "benchmark/plotly.min.js").stat().st_size > 1_000_000
    assert main(["benchmark", "methods"]) == 0
    assert "delta-neutral-text" in capsys.readouterr().out
