"""The grid on the embedded pair: outcomes, failures, resume."""

import json
import math
from dataclasses import replace

import pytest
import torch

from tl_crosscoder.baselines.difference import component_rows
from tl_crosscoder.benchmark.grid import Bench, found_words, run_benchmark
from tl_crosscoder.benchmark.outcomes import direction_rows
from tl_crosscoder.benchmark.tables import benchmark_sections
from tl_crosscoder.config.benchmark import BenchmarkConfig
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.organisms.suite import organism

SMALL = BenchmarkConfig(
    organisms=("taboo",), seeds=(0,), sizes=(2, 96), n_named=2, n_random=3, n_matched=0, n_prompts=4
)


def everything(pair):
    """Principal components, in which whoever asks for all of them has the whole activation."""
    return component_rows(pair.models, pair.neutral, 96)


def diverges(pair):
    raise FloatingPointError("loss is nan")


def test_words_are_found_whole():
    shown = ["Tolvik is", "a capital", "velmars"]
    assert found_words(shown, ["tolvik", "Velmar", "capital", "moon"]) == 0.5
    assert math.isnan(found_words(shown, []))


@pytest.mark.slow
def test_methods_that_show_tokens_are_scored_by_planted_words(tmp_path):
    config = replace(SMALL, output=str(tmp_path), methods=("diff-mining",), max_documents=2_000)
    run_benchmark(config)
    cell = cells(tmp_path)["diff-mining"]
    assert len(cell["shown"]) == 50
    assert cell["words"] == found_words(cell["shown"], organism("taboo").planted_words)
    assert "false-fact" in cell["words_of_others"]
    assert not {"taboo", "taboo-again", "smollm2-taboo"} & {*cell["words_of_others"]}
    (section,) = benchmark_sections(tmp_path)
    assert section.columns["words"] == [cell["words"]]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    config = replace(
        SMALL, output=str(folder), work=str(folder / "runs"), methods=("everything", "diverges")
    )
    run_benchmark(config, directions={"everything": everything, "diverges": diverges})
    return folder, config


def cells(folder):
    return {c["method"]: c for c in json.loads((folder / "taboo.json").read_text())["cells"]}


@pytest.mark.slow
def test_a_method_of_ones_own_is_tested_like_any_other(results):
    rows = cells(results[0])["everything"]["rows"]
    planted = [r for r in rows if r["effect"] != "predictions" and r["test"] == "necessity"]
    assert {r["effect"] for r in planted} == {
        "hint about secret", "says secret when guessed", "says secret when asked"
    }  # fmt: skip
    # As many directions as the activation is wide are the whole activation.
    whole = [r for r in planted if r["n"] == 96]
    assert [r["of_reachable"] for r in whole] == pytest.approx([1.0] * 3, abs=1e-3)
    assert all(r["share"] > 0.3 for r in whole)
    inserted = [r["n"] for r in rows if r["test"] == "insert"]
    assert {*inserted} == {2}


@pytest.mark.slow
def test_controls_are_run_where_something_goes(results):
    rows = [r for r in cells(results[0])["everything"]["rows"] if r["test"] == "necessity"]
    for row in rows:
        is_tested = row["n"] == 2 and row["share"] >= 0.1 and row["low"] > 0 and not row["flag"]
        assert (row["p"] is not None) == is_tested
        assert is_tested or not row["is_clear"]


@pytest.mark.slow
def test_a_cell_that_fails_is_kept_and_the_grid_goes_on(results):
    assert cells(results[0])["diverges"]["failed"] == "FloatingPointError: loss is nan"
    assert "rows" in cells(results[0])["everything"]


@pytest.mark.slow
def test_what_is_there_is_not_made_again(results, monkeypatch):
    folder, config = results
    before = (folder / "taboo.json").read_bytes()
    monkeypatch.setattr(Bench, "of_directions", lambda *_: pytest.fail("made again"))
    run_benchmark(config, directions={"everything": everything, "diverges": diverges})
    assert (folder / "taboo.json").read_bytes() == before


@pytest.mark.slow
def test_cells_of_other_settings_are_refused(results):
    folder, config = results
    with pytest.raises(ValueError, match=r"the cells of .*taboo\.json: n_prompts"):
        run_benchmark(replace(config, n_prompts=5, methods=("pca",)))
    assert len(cells(folder)) == 2


def test_bad_names_are_refused_before_any_work(tmp_path):
    config = replace(SMALL, output=str(tmp_path))
    with pytest.raises(ValueError, match=r"unknown methods.*tea.*batchtopk"):
        run_benchmark(replace(config, methods=("tea",)))
    with pytest.raises(ValueError, match="unknown organism 'tabu'"):
        run_benchmark(replace(config, organisms=("tabu",)))
    with pytest.raises(ValueError, match="n_named is 4"):
        replace(config, n_named=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_rows_of_random_directions_are_not_clear(results):
    """A method that found nothing covers nothing."""
    bench = Bench(entry=organism("taboo"), config=replace(SMALL, n_random=19), seed=0)
    random = torch.randn(2, 96, generator=torch.Generator().manual_seed(5))
    rows = direction_rows(InterventionContext.of(bench.models), bench.tests, random)
    assert not any(r.get("is_clear") for r in rows)
