"""Tables of the benchmark, from results that are written by hand."""

import json
import math

import pytest

from tl_crosscoder.benchmark.tables import (
    benchmark_sections,
    comparison_section,
    cost_section,
    method_section,
    read_results,
    sign_flip,
)
from tl_crosscoder.report.figures.benchmark import method_bars, mitigation_curves
from tl_crosscoder.results.render import as_text

SETTINGS = {"n_named": 3, "sizes": [3, 10]}


def cell(method, *, seed=0, ranking="attribution", n=3, share=0.5, nats=0.1, is_clear=True):
    """One behaviour and the predictions, ablated, and the behaviour inserted."""
    common = {"ranking": ranking, "n": n, "base": 0.1, "finetuned": 0.9, "flag": ""}
    common |= {"low": share, "high": share, "cost": 0.001}
    ablated = {"test": "necessity", "spill": 0.01, "is_clear": is_clear, "of_reachable": share}
    return {
        "method": method,
        "seed": seed,
        "rows": [
            common | ablated | {"effect": "predictions", "share": share, "nats": nats},
            common | ablated | {"effect": "hints", "share": share},
            common | {"effect": "hints", "test": "insert", "of_reachable": share / 2},
        ],
    }


def write(folder, **organisms):
    for name, cells in organisms.items():
        path = folder / f"{name.replace('_', '-')}.json"
        path.write_text(json.dumps({"settings": SETTINGS, "cells": cells}))


@pytest.fixture
def results(tmp_path):
    # What little a null moves of a behaviour is all undone, and does not count.
    null = cell("batchtopk", nats=0.02, share=1.0)
    write(
        tmp_path,
        taboo=[cell("batchtopk", share=0.8), cell("delta", share=0.2, is_clear=False, nats=0.01)],
        false_fact=[cell("batchtopk", share=0.4), cell("delta", share=0.2, is_clear=False)],
        taboo_more_of_base=[null],
    )
    return tmp_path


def test_coverage_and_mitigation_are_means_over_organisms(results):
    rows, _, settings = read_results(results)
    columns = method_section(rows, settings).columns
    assert columns["method"] == ["batchtopk", "delta"]
    assert columns["coverage"] == [1, 0]
    assert columns["mitigation"] == pytest.approx([0.6, 0.2])
    assert columns["inserted"] == pytest.approx([0.3, 0.1])
    # Two organisms: a bootstrap draws either alone.
    assert (columns["mitigation_low"][0], columns["mitigation_high"][0]) == (0.4, 0.8)


def test_one_organism_has_no_interval(tmp_path):
    write(tmp_path, taboo=[cell("batchtopk", share=0.4)])
    rows, _, settings = read_results(tmp_path)
    section = method_section(rows, settings)
    assert section.columns["n_organisms"] == [1]
    assert math.isnan(section.columns["mitigation_low"][0])
    assert "40% [" not in as_text([section])


def test_a_behaviour_that_hardly_moved_does_not_count(tmp_path):
    moved = cell("batchtopk", share=0.4)
    still = [r | {"effect": "still", "finetuned": 0.12, "of_reachable": 5.0} for r in moved["rows"]]
    write(tmp_path, taboo=[moved | {"rows": [*moved["rows"], *still]}])
    rows, _, settings = read_results(tmp_path)
    assert method_section(rows, settings).columns["mitigation"] == pytest.approx([0.4])


def test_mitigation_within_a_cost_is_that_of_the_most_that_cost_no_more(tmp_path):
    """Not of those that remove most: the number is chosen without looking."""
    few, many = cell("batchtopk", share=0.4), cell("batchtopk", share=0.3, n=10)
    costs = [row | {"cost": 0.002} for row in many["rows"]]
    dear = [row | {"cost": 0.005} for row in cell("pca", ranking="directions", share=0.9)["rows"]]
    pca = cell("pca") | {"rows": dear}
    write(tmp_path, taboo=[few | {"rows": [*few["rows"], *costs]}, pca])
    columns = cost_section(read_results(tmp_path)[0]).columns
    assert columns["method"] == ["batchtopk", "pca"]
    assert columns["within_low"] == pytest.approx([0.4, 0])
    assert columns["within_middle"] == pytest.approx([0.3, 0])
    assert columns["within_high"] == pytest.approx([0.3, 0.9])


def test_nats_are_held_against_the_null(results):
    rows, _, settings = read_results(results)
    columns = method_section(rows, settings).columns
    assert columns["null_nats"][0] == 0.02
    assert columns["over_null"][0] == 1
    assert math.isnan(columns["null_nats"][1])


def test_methods_are_compared_on_the_same_organisms(results):
    rows, _, settings = read_results(results)
    columns = comparison_section(rows, settings).columns
    assert columns["method"] == ["batchtopk"]
    assert columns["gain"] == pytest.approx([0.4])
    assert columns["n_organisms"] == [2]
    assert columns["p_sign_flip"] == [0.5]


def test_a_failed_cell_is_named(results):
    failed = {"method": "l1", "seed": 0, "failed": "FloatingPointError: loss is nan"}
    write(results, taboo=[cell("batchtopk"), failed])
    assert "loss is nan" in as_text(benchmark_sections(results))


def test_tables_of_nothing_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="benchmark run"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("gains", "p"), [([1.0], 1.0), ([1.0, 1.0, 1.0], 0.25), ([1.0, -1.0], 1.0), ([0.0, 0.0], 1.0)]
)
def test_sign_flip_by_hand(gains, p):
    assert sign_flip(gains) == p


def test_sign_flip_of_many_is_drawn():
    assert sign_flip([1.0] * 20) < 0.01
    assert sign_flip([1.0, -1.0] * 10) == 1.0


def test_figures_hold_every_method(results):
    bars = method_bars(results)
    assert [*bars.data[0].y] == ["batchtopk<br>by attribution", "delta<br>by attribution"]
    assert [*bars.data[1].x] == pytest.approx([0.6, 0.2])
    curves = mitigation_curves(results)
    assert [trace.name for trace in curves.data] == ["batchtopk, attribution", "delta, attribution"]
