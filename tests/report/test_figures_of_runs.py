"""Figures of interventions, of training, of agreement over seeds, and all that a folder gives."""

import json
import math

import pytest
import torch
from analysis.hand_made import latent_measures, measurement
from report.result_rows import causal_result, causal_row, patching_result, patching_row
from report.test_figures import counts, words

from tl_crosscoder.analysis.agreement import Agreement, SeedAgreement, SeedAgreements
from tl_crosscoder.report.figures import (
    NothingToDraw,
    agreement_histogram,
    agreement_matrix,
    causal_curve,
    cost_curves,
    read_metrics,
    recovery_bars,
    relative_norm_histogram,
    run_figures,
    training_curves,
)

NAN = math.nan

# --- KL recovery ----------------------------------------------------------------------------------


def bars_by_label(figure) -> dict[str, float]:
    """Values of the first kind of token, by the label beside the bar."""
    labels = dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True))
    return {labels[y]: x for x, y in zip(figure.data[0].x, figure.data[0].y, strict=True)}


def test_each_variant_has_a_bar_with_its_interval_and_the_base_activation_none():
    figure = recovery_bars(
        patching_result(
            patching_row("base stream", 0.0),
            patching_row("all latents", 0.8, n_latents=48),
            patching_row("candidates", 0.25, group="candidates", recovery_low=0.0),
            *(patching_row(f"random latents {i}", r, group="random")
              for i, r in enumerate((0.1, 0.3, 0.8))),
        )
    )  # fmt: skip
    # Draws: mean (0.1 + 0.3 + 0.8) / 3 = 0.4, 0.3 above the lowest and 0.4 below the highest.
    expected = {"all latents": 0.8, "candidates": 0.25, "random latents, 3 draws": 0.4}
    assert bars_by_label(figure) == pytest.approx(expected)
    error = figure.data[0].error_x
    # 0.1 to each side; of the second 0.25 - 0 below.
    assert error.array == pytest.approx((0.1, 0.1, 0.4))
    assert error.arrayminus == pytest.approx((0.1, 0.25, 0.3))
    assert figure.data[0].name == "response (1,234 tokens; base activation 0.5 nats)"
    assert "<b>Candidates</b>" in figure.layout.yaxis.ticktext
    assert figure.data[0].hovertext[0] == (
        "variant: all latents<br>n latents: 48<br>tokens: response<br>n tokens: 1,234<br>prompts: 7"
        "<br>KL recovery: 80% [70%, 90%]<br>KL: 0.100 [0.000, 1.000]"
    )
    said = words(figure)
    assert "KL(sft ‖ base activation), nats a token" in said
    assert "over 7 prompts" in said
    assert "Candidates: the 5 finetuned-only latents." in said
    assert "beyond" not in said


def test_kinds_of_token_are_side_by_side_and_equal_names_of_two_groups_apart():
    figure = recovery_bars(
        patching_result(
            patching_row("candidates", 0.5, group="candidates"),
            patching_row("candidates", 0.7, group="chosen"),
            patching_row("candidates", 0.6, group="candidates", tokens="first 9"),
        )
    )
    first, second = figure.data
    assert len(set(first.y)) == 2
    # Of two bars a row apart each stands half a row from the label.
    assert second.y[0] - first.y[0] == pytest.approx(1)
    assert (first.y[0] + second.y[0]) / 2 == pytest.approx(figure.layout.yaxis.tickvals[1])


def test_what_has_no_recovery_is_left_out_and_what_is_far_off_is_said():
    rows = patching_row("one", NAN), patching_row("two", -40.0), patching_row("three", 0.2)
    figure = recovery_bars(patching_result(*rows))
    assert bars_by_label(figure) == {"two": -40.0, "three": 0.2}
    assert figure.layout.xaxis.range[0] > -1.1
    assert "values are beyond the axis" in words(figure)
    assert "1 rows without a value are left out." in words(figure)
    with pytest.raises(NothingToDraw, match="no variant has a recovery"):
        recovery_bars(patching_result(patching_row("base stream", NAN)))


# --- causal tests ---------------------------------------------------------------------------------


def traces(figure, *, panel: int = 1) -> dict:
    axis = {1: "y", 2: "y2"}[panel]
    return {t.name: t for t in figure.data if t.yaxis == axis}


def test_a_curve_by_size_has_intervals_and_controls():
    figure = causal_curve(
        causal_result(
            causal_row("large", n_latents=30, share=0.6, share_low=0.5, share_high=0.8,
                       control_mean=0.02, control_high=0.05),
            causal_row("small", n_latents=3, off_target_kl=0.01, off_target_low=0.0,
                       off_target_high=0.04),
            causal_row("other test", test="insert"),
        )
    )  # fmt: skip
    above, below = traces(figure), traces(figure, panel=2)
    assert above["latents"].x == (3, 30)
    assert above["latents"].y == (0.7934, 0.6)
    assert above["latents"].error_y.array == pytest.approx((0.85 - 0.7934, 0.2))
    assert above["latents"].error_y.arrayminus == pytest.approx((0.7934 - 0.7, 0.1))
    assert above["strongest control, mean"].y == (0.012, 0.02)
    assert above["strongest control, 95th percentile"].y == (0.034, 0.05)
    assert above["strongest control, 95th percentile"].fill == "tonexty"
    assert above["whole activation"].y == (0.92, 0.92)
    assert below["latents"].y == (0.01, 0.0123)
    assert below["latents"].error_y.array[0] == pytest.approx(0.03)
    assert below["strongest control, mean"].y == (0.0456, 0.0456)
    text = above["latents"].hovertext[0]
    assert text.startswith("set: small<br>n latents: 3<br>value: 0.25<br>base: 0.0627")
    assert "<br>share: 79% [70%, 85%]<br>" in text
    assert "<br>of reachable: 86%<br>control: shuffled<br>control mean: 1%<br>" in text
    assert "<br>p: 0.01<br>p (Holm): 0.03<br>" in text
    assert "<br>matched mean: -6%<br>matched 95th: 0%<br>p matched: 0.2" in text
    layout = figure.layout
    # Between the words and the plot, so that a picture of its beginning, as in the README, has it.
    assert layout.title.text.count("<br>") * 21 < (1 - layout.legend.y) * layout.height
    assert (1 - layout.legend.y) * layout.height + 3 * 20 < layout.margin.t
    assert layout.height <= 660
    assert layout.xaxis2.title.text == "latents in the set"
    assert layout.yaxis.title.text == "share removed"
    assert layout.yaxis2.title.text == "off-target KL (nats a token)"
    said = words(figure)
    assert said.startswith("Necessity: taboo Share of the change from base (0.0627) to fine-tuned")
    assert "model (0.965) that is removed, probability, with 95 % intervals" in said
    assert "over 12 prompts; 100 controls of each kind." in said


def test_methods_without_latents_and_sets_of_one_size_are_joined_by_no_line():
    rows = [causal_row(n, n_latents=0) for n in ("mean <difference>", "first component")]
    figure = causal_curve(causal_result(*rows))
    own = traces(figure)["this method"]
    assert (own.x, own.mode) == (("mean &lt;difference&gt;", "first component"), "markers")
    assert figure.layout.xaxis.type == "category"
    rows = causal_row("a"), causal_row("b", control_high=0.5), causal_row("c", n_latents=9)
    above = traces(causal_curve(causal_result(*rows)))
    assert above["latents"].mode == "markers"
    assert above["strongest control, 95th percentile"].y == (0.5, 0.034)


def test_a_sweep_has_a_line_a_set_and_one_band():
    rows = [
        causal_row(
            name, test="steer", strength=s, share=share, control_mean=mean, control_high=high
        )
        for name, s, share, mean, high in (
            ("top 3", 2.0, 0.5, 0.1, 0.3),
            ("top 3", 0.5, 0.2, 0.0, 0.1),
            ("<b>", 2.0, 0.4, 0.3, 0.2),
            ("<b>", 0.5, NAN, 0.0, 0.1),
        )
    ]
    figure = causal_curve(causal_result(*rows), test="steer")
    above = traces(figure)
    assert (above["top 3"].x, above["top 3"].y) == ((0.5, 2.0), (0.2, 0.5))
    assert (above["&lt;b&gt;"].x, above["&lt;b&gt;"].y) == ((2.0,), (0.4,))
    assert above["top 3"].line.color != above["&lt;b&gt;"].line.color
    assert above["top 3"].marker.symbol != above["&lt;b&gt;"].marker.symbol
    # At 2.0 the mean of 0.1 and 0.3, and the higher percentile.
    assert above["strongest control, mean"].y == (0.0, 0.2)
    assert above["strongest control, 95th percentile"].y == (0.1, 0.3)
    assert "1 trials without a value are left out." in words(figure)
    assert "strength: 0.5" in above["top 3"].hovertext[0]


def curves(**changes):
    """Two methods at 1 and 10 directions; PCA costs more."""
    return causal_result(
        *(
            causal_row(name, n_latents=n, share=share, off_target_kl=cost, **changes)
            for name, n, share, cost in (
                ("PCA", 10, 0.85, 0.09), ("PCA", 1, 0.2, 0.01),
                ("latents", 1, 0.4, 0.001), ("latents", 10, 0.8, 0.03),
            )
        )
    )  # fmt: skip


def test_methods_at_several_sizes_are_lines_by_size_and_by_cost():
    above = traces(causal_curve(curves()))
    assert (above["PCA"].x, above["PCA"].y) == ((1, 10), (0.2, 0.85))
    assert (above["latents"].y, above["latents"].mode) == ((0.4, 0.8), "lines+markers")
    by_cost = cost_curves(curves())
    own = {trace.name: trace for trace in by_cost.data}
    assert (own["PCA"].x, own["PCA"].y, own["PCA"].text) == ((0.01, 0.09), (0.2, 0.85), ("1", "10"))
    assert by_cost.layout.xaxis.title.text == "off-target KL (nats a token)"
    with pytest.raises(NothingToDraw, match="no method at several numbers of directions"):
        cost_curves(causal_result(causal_row()))


def test_a_flag_stands_beside_its_point():
    flagged = curves(flag="broken model")
    point = traces(causal_curve(flagged))["PCA"]
    assert (point.text, point.mode) == (("broken model",) * 2, "lines+markers+text")
    assert {trace.text[0] for trace in cost_curves(flagged).data} == {"1, broken model"}
    assert "Broken model: the edit raises the cross-entropy" in words(cost_curves(flagged))
    nothing = causal_result(causal_row(flag="nothing passes this hook", ceiling=0.01))
    assert "Nothing passes this hook: replacing the whole" in words(causal_curve(nothing))


def test_what_is_far_off_or_without_a_value_is_said():
    far = causal_row(test="steer", strength=1.0, share=-50.0, share_low=-60.0)
    figure = causal_curve(causal_result(far, causal_row(test="steer", strength=0.5)), test="steer")
    assert -1.2 < figure.layout.yaxis.range[0] < -1
    assert "values are beyond the axis" in words(figure)
    row = causal_row(off_target_kl=NAN, off_target_low=NAN, control_off_target_kl=NAN)
    below = traces(causal_curve(causal_result(row)), panel=2)
    assert below["latents"].y == (None,)
    assert "strongest control, mean" not in below
    assert "off-target KL" not in below["latents"].hovertext[0]
    result = causal_result(causal_row(share=NAN))
    with pytest.raises(NothingToDraw, match="1 trials of the test 'necessity' and none with a v"):
        causal_curve(result)
    with pytest.raises(NothingToDraw, match=r"its tests are \['necessity'\]"):
        causal_curve(result, test="steer")


# --- training -------------------------------------------------------------------------------------

ROWS = [
    {"step": 1, "n_tokens": 8, "loss": 9.0, "loss/auxk": 0.0, "fve/base": None, "l0": 3.0},
    {"step": 2, "n_tokens": 16, "loss": 4.0, "loss/auxk": 0.5, "fve/base": 0.5, "l0": 3.0},
]


def write_metrics(folder, rows=ROWS, end=""):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + end, encoding="utf-8")
    return folder


def test_metrics_are_columns_without_an_unfinished_line_and_damaged_ones_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl is not there: give the folder"):
        read_metrics(tmp_path)
    rows = [*ROWS, {"n_tokens": 24, "dead_share": 0.1}]
    found = read_metrics(write_metrics(tmp_path, rows, end='{"step": 4, "n_to'))
    assert found["n_tokens"] == [8, 16, 24]
    assert found["fve/base"] == pytest.approx([NAN, 0.5, NAN], nan_ok=True)
    assert found["dead_share"] == pytest.approx([NAN, NAN, 0.1], nan_ok=True)
    write_metrics(tmp_path, end="half a li\n")
    with pytest.raises(ValueError, match=r"line 3 of .*metrics\.jsonl is damaged"):
        read_metrics(tmp_path)
    with pytest.raises(NothingToDraw, match=r"0 rows and the names \[\]"):
        training_curves({})


def test_curves_are_those_of_the_record(tmp_path):
    figure = training_curves(read_metrics(write_metrics(tmp_path)))
    assert {t.name: (t.x, t.y) for t in figure.data} == {
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
    longer = {k: [*v] * 20 for k, v in metrics.items()}
    assert len(training_curves(longer).to_json()) < 1.5 * len(figure.to_json())


# --- agreement over seeds -------------------------------------------------------------------------


def test_a_matrix_has_a_row_for_each_first_dictionary():
    rows = [
        SeedAgreement(first=i, second=j, n_latents=10, mean_max_cosine=0.9,
                      mutual_share_above_0_7=share, mutual_share_above_0_9=share / 2)
        for i, j, share in ((0, 1, 0.5), (1, 0, 0.8))
    ]  # fmt: skip
    found = SeedAgreements(rows=tuple(rows), by="decoder", sites=("base", "finetuned"))
    heatmap = agreement_matrix(found).data[0]
    assert [*heatmap.z] == [[None, 0.5], [0.8, None]]
    heatmap = agreement_matrix(found, names=("a", "<b>")).data[0]
    assert heatmap.y == ("a", "&lt;b&gt;")
    assert heatmap.hovertext[1][0] == (
        "10 latents of &lt;b&gt; in a<br>mutual above 0.7: 80.0%, above 0.9: 40.0%<br>mean "
        "cosine to the nearest 0.900"
    )
    with pytest.raises(ValueError, match="give each dictionary its own name"):
        agreement_matrix(found, names=("a", "a"))
    with pytest.raises(NothingToDraw, match="compare two or more"):
        agreement_matrix(SeedAgreements(rows=(), by="decoder", sites=("base",)))


def test_cosines_of_a_pair_are_counted_by_whether_they_are_mutual():
    def agreement(cosine: list[float], match: list[int], is_mutual: list[bool]) -> Agreement:
        of = {"by": "decoder", "sites": ("base",), "is_mutual": torch.tensor(is_mutual)}
        return Agreement(cosine=torch.tensor(cosine), match=torch.tensor(match), **of)

    found = agreement([0.95, 0.95, 0.5, NAN], [0, 1, 1, -1], [True, True, False, False])
    figure = agreement_histogram(found)
    # 51 bins of [0, 1]: 0.95 is 48.45, 0.5 is 25.5.
    assert counts(figure) == {48: 2}
    assert {i: n for i, n in enumerate(figure.data[1].y) if n} == {25: 1}
    assert "of 3 latents" in words(figure)
    assert "above cosine 0.7: 66.7%; mean cosine 0.80" in words(figure)
    with pytest.raises(NothingToDraw, match="all are dead"):
        agreement_histogram(agreement([NAN], [-1], [False]))


# --- a folder -------------------------------------------------------------------------------------


def test_a_folder_gives_the_figures_of_its_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run"):
        run_figures(tmp_path)
    (tmp_path / "runner_cfg.json").write_text('{"training": {}, "held_out": {}}')
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
        "kl_recovery",
        "ablation_behaviour_necessity",
        "ablation_behaviour_steer",
    ]
    assert figures["relative_decoder_norm"] == relative_norm_histogram(found)
    assert figures["kl_recovery"] == recovery_bars(patched)
    assert figures["ablation_behaviour_necessity"] == causal_curve(tested)
    assert figures["ablation_behaviour_steer"] == causal_curve(tested, test="steer")
