"""Figures of runs: training, agreement over seeds, and all that a folder gives."""

import json
import math

import pytest
import torch
from analysis.hand_made import latent_measures, measurement
from report.result_rows import causal_result, causal_row, patching_result, patching_row
from report.test_figures import words

from tl_crosscoder.analysis.agreement import Agreement, SeedAgreement, SeedAgreements
from tl_crosscoder.report.figures import (
    NothingToDraw,
    agreement_histogram,
    agreement_matrix,
    mitigation_curve,
    read_metrics,
    recovery_bars,
    relative_norm_histogram,
    run_figures,
    steering_sweep,
    training_curves,
)

NAN = math.nan
ROWS = [
    {"step": 1, "n_tokens": 8, "loss": 9.0, "loss/auxk": 0.0, "fve/base": None, "l0": 3.0},
    {"step": 2, "n_tokens": 16, "loss": 4.0, "loss/auxk": 0.5, "fve/base": 0.5, "l0": 3.0},
]


def write_metrics(folder, rows=ROWS, end=""):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + end, encoding="utf-8")
    return folder


def test_metrics_are_read_as_columns_without_an_unfinished_line(tmp_path):
    rows = [*ROWS, {"n_tokens": 24, "dead_share": 0.1}]
    found = read_metrics(write_metrics(tmp_path, rows, end='{"step": 4, "n_to'))
    assert found["n_tokens"] == [8, 16, 24]
    assert found["fve/base"] == pytest.approx([NAN, 0.5, NAN], nan_ok=True)
    assert found["dead_share"] == pytest.approx([NAN, NAN, 0.1], nan_ok=True)


def test_no_metrics_and_damaged_ones_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl is not there: give the folder"):
        read_metrics(tmp_path)
    write_metrics(tmp_path, end="half a li\n")
    with pytest.raises(ValueError, match=r"line 3 of .*metrics\.jsonl is damaged"):
        read_metrics(tmp_path)
    with pytest.raises(NothingToDraw, match=r"0 rows and the names \[\]"):
        training_curves({})


def test_curves_are_those_of_the_record(tmp_path):
    figure = training_curves(read_metrics(write_metrics(tmp_path)))
    lines = {t.name: (t.x, t.y) for t in figure.data}
    assert lines == {
        "loss": ((8, 16), (9.0, 4.0)),
        "loss: auxk": ((8, 16), (None, 0.5)),  # 0 is on no logarithmic axis
        "FVE base": ((8, 16), (None, 0.5)),
        "l0": ((8, 16), (3.0, 3.0)),
    }
    layout = figure.layout
    assert layout.yaxis.type == "log"
    titles = [layout[a].title.text for a in ("yaxis", "yaxis2", "yaxis3", "xaxis3")]
    assert titles == ["loss a token", "FVE", "L0 (latents a token)", "tokens trained on"]


def test_a_long_record_is_drawn_as_means():
    # 1,000 rows in stretches of ceil(1000 / 400) = 3: 334 points, the first of (1 + 2 + 3) / 3.
    n = 1000
    metrics = {"n_tokens": [*range(1, n + 1)], "loss": [*range(1, n + 1)]}
    metrics["l0"] = [NAN, 2.0, 4.0] + [5.0] * (n - 3)
    figure = training_curves(metrics)
    loss, l0 = figure.data
    assert (len(loss.x), loss.x[0], loss.y[0], loss.y[-1]) == (334, 2, 2, 1000)
    assert l0.y[0] == 3.0  # of those with a value
    assert "each point the mean of 3 of them" in words(figure)
    longer = {k: [*v] * 100 for k, v in metrics.items()}
    assert len(training_curves(longer).to_json()) < 1.5 * len(figure.to_json())


def seeds(*pairs: tuple[int, int, float]) -> SeedAgreements:
    rows = (
        SeedAgreement(
            first=i, second=j, n_latents=10, mean_max_cosine=0.9, mutual_share_above_0_7=share,
            mutual_share_above_0_9=share / 2,
        )
        for i, j, share in pairs
    )  # fmt: skip
    return SeedAgreements(rows=tuple(rows), by="decoder", sites=("base", "finetuned"))


def test_a_matrix_has_a_row_for_each_first_dictionary():
    found = seeds((0, 1, 0.5), (1, 0, 0.8))
    heatmap = agreement_matrix(found).data[0]
    assert [*heatmap.z] == [[None, 0.5], [0.8, None]]
    heatmap = agreement_matrix(found, value="mutual_share_above_0_9", names=("a", "<b>")).data[0]
    assert [*heatmap.z] == [[None, 0.25], [0.4, None]]
    assert heatmap.y == ("a", "&lt;b&gt;")
    assert heatmap.hovertext[1][0] == (
        "10 latents of &lt;b&gt; in a<br>mutual above 0.7: 80.0 %, above 0.9: 40.0 %<br>mean "
        "cosine to the nearest 0.900"
    )
    with pytest.raises(ValueError, match="give each dictionary a name of its own"):
        agreement_matrix(found, names=("a", "a"))
    with pytest.raises(NothingToDraw, match="compare two or more"):
        agreement_matrix(seeds())


def test_cosines_of_a_pair_are_counted_by_whether_they_are_mutual():
    found = Agreement(
        cosine=torch.tensor([0.95, 0.95, 0.5, NAN]),
        match=torch.tensor([0, 1, 1, -1]),
        is_mutual=torch.tensor([True, True, False, False]),
        by="decoder",
        sites=("base",),
    )
    mutual, nearest = agreement_histogram(found).data
    # 51 bins of [0, 1]: 0.95 is 48.45, 0.5 is 25.5.
    assert {i: n for i, n in enumerate(mutual.y) if n} == {48: 2}
    assert {i: n for i, n in enumerate(nearest.y) if n} == {25: 1}
    said = words(agreement_histogram(found))
    assert "of 3 latents" in said
    assert "above cosine 0.7: 66.7 %; mean cosine 0.80" in said
    dead = Agreement(
        cosine=torch.tensor([NAN]), match=torch.tensor([-1]), is_mutual=torch.tensor([False]),
        by="decoder", sites=("base",),
    )  # fmt: skip
    with pytest.raises(NothingToDraw, match="all are dead"):
        agreement_histogram(dead)


def test_a_folder_gives_the_figures_of_its_files(tmp_path):
    (tmp_path / "runner_cfg.json").write_text("{}")
    assert run_figures(tmp_path) == {}
    found = measurement(latent_measures([1.0, 0.0], [1.0, 1.0], [4, 5]), examples={0: []})
    patched = patching_result(patching_row("base stream", 0.0), patching_row("all latents", 0.5))
    tested = causal_result(causal_row(), causal_row(test="steer", strength=1.0))
    write_metrics(tmp_path)
    found.save(tmp_path)
    patched.save(tmp_path / "patching.json")
    tested.save(tmp_path / "ablation_behaviour.json")
    figures = run_figures(tmp_path)
    assert [*figures] == [
        "training",
        "relative_decoder_norm",
        "shared_decoder_cosine",  # and no Latent Scaling, which was not measured
        "ablation_behaviour_necessity",
        "ablation_behaviour_steer",
        "kl_recovery",
    ]
    assert figures["relative_decoder_norm"] == relative_norm_histogram(found)
    assert figures["kl_recovery"] == recovery_bars(patched)
    assert figures["ablation_behaviour_necessity"] == mitigation_curve(tested)
    assert figures["ablation_behaviour_steer"] == steering_sweep(tested)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run"):
        run_figures(tmp_path)
