"""Figures of interventions."""

import math

import pytest
from report.result_rows import causal_result, causal_row, patching_result, patching_row
from report.test_figures import words

from tl_crosscoder.report.figures import (
    NothingToDraw,
    mitigation_curve,
    recovery_bars,
    steering_sweep,
)

NAN = math.nan


def bars_by_label(figure) -> dict[str, float]:
    """Values of the first kind of token, by the label beside the bar."""
    labels = dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True))
    return {labels[y]: x for x, y in zip(figure.data[0].x, figure.data[0].y, strict=True)}


def test_each_variant_has_a_bar_with_its_interval_and_the_base_stream_none():
    figure = recovery_bars(
        patching_result(
            patching_row("base stream", 0.0),
            patching_row("all latents", 0.8, n_latents=48),
            patching_row("candidates", 0.25, group="candidates", recovery_low=0.0),
        )
    )
    assert bars_by_label(figure) == {"all latents": 0.8, "candidates": 0.25}
    error = figure.data[0].error_x
    # 0.1 to each side; of the second 0.25 - 0 below.
    assert error.array == pytest.approx((0.1, 0.1))
    assert error.arrayminus == pytest.approx((0.1, 0.25))
    assert figure.data[0].name == "response (1,234 tokens; base stream 0.5 nats)"
    assert "<b>Candidates</b>" in figure.layout.yaxis.ticktext
    assert figure.data[0].hovertext[0] == (
        "all latents, 48 latents<br>response: 1,234 tokens, 7 prompts<br>recovery 80.0 % [70.0 %, "
        "90.0 %]<br>KL 0.1000 [0.0000, 1.0000] nats a token"
    )
    said = words(figure)
    assert "KL(sft ‖ base stream), nats a token" in said
    assert "over 7 prompts" in said
    assert "Candidates: the 5 finetuned-only latents." in said
    assert "beyond" not in said


def test_draws_are_one_bar_from_the_lowest_to_the_highest():
    draws = [
        patching_row(f"random latents {i}", r, group="random")
        for i, r in enumerate((0.1, 0.3, 0.8))
    ]
    figure = recovery_bars(patching_result(patching_row("base stream", 0.0), *draws))
    # Mean (0.1 + 0.3 + 0.8) / 3 = 0.4, 0.3 above the lowest and 0.4 below the highest.
    assert bars_by_label(figure) == pytest.approx({"random latents, mean of<br>3": 0.4})
    assert figure.data[0].error_x.array == pytest.approx((0.4,))
    assert figure.data[0].error_x.arrayminus == pytest.approx((0.3,))


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
    figure = recovery_bars(
        patching_result(
            patching_row("one", NAN), patching_row("two", -40.0), patching_row("three", 0.2)
        )
    )
    assert bars_by_label(figure) == {"two": -40.0, "three": 0.2}
    assert figure.layout.xaxis.range[0] > -1.1
    assert "1 values are beyond the axis" in words(figure)
    assert "1 rows without a value are left out." in words(figure)
    with pytest.raises(NothingToDraw, match="no variant has a recovery"):
        recovery_bars(patching_result(patching_row("base stream", NAN)))


def traces(figure, *, panel: int = 1) -> dict:
    axis = {1: "y", 2: "y2"}[panel]
    return {t.name: t for t in figure.data if t.yaxis == axis}


def test_a_mitigation_curve_is_by_size_with_intervals_and_controls():
    figure = mitigation_curve(
        causal_result(
            causal_row("large", n_latents=30, share=0.6, share_low=0.5, share_high=0.8,
                       random_mean=0.02, random_high=0.05),
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
    assert above["random directions, mean"].y == (0.012, 0.02)
    assert above["random directions, 95th percentile"].y == (0.034, 0.05)
    assert above["random directions, 95th percentile"].fill == "tonexty"
    assert above["same firing rate, mean"].y == (-0.056, -0.056)
    assert "null pair, mean" not in above
    assert below["latents"].y == (0.01, 0.0123)
    assert below["latents"].error_y.array[0] == pytest.approx(0.03)
    assert below["random directions, mean"].y == (0.0456, 0.0456)
    text = above["latents"].hovertext[0]
    assert text.startswith("small, 3 latents<br>share 79.3 % [70.0 %, 85.0 %]")
    assert "p = 0.01, after Holm 0.03" in text
    assert "same firing rate: mean -5.6 %, p = 0.2" in text
    layout = figure.layout
    # Between the words and the plot, so that a picture of its beginning, as in the README, has it.
    assert layout.title.text.count("<br>") * 21 < (1 - layout.legend.y) * layout.height
    assert (1 - layout.legend.y) * layout.height + 3 * 20 < layout.margin.t
    assert layout.height <= 660
    assert layout.xaxis2.title.text == "latents in the set"
    assert layout.yaxis.title.text == "share that goes"
    assert layout.yaxis2.title.text == "off-target KL (nats a token)"
    said = words(figure)
    assert said.startswith("Taken out of the fine-tuned model: taboo")
    assert "base (0.0627) to fine-tuned model (0.965), probability" in said
    assert "over 12 prompts; 100 norm-matched random directions" in said


def test_methods_without_latents_stand_side_by_side():
    figure = mitigation_curve(
        causal_result(
            causal_row("mean <difference>", n_latents=0), causal_row("first component", n_latents=0)
        )
    )
    own = traces(figure)["this method"]
    assert own.x == ("mean &lt;difference&gt;", "first component")
    assert own.mode == "markers"
    assert figure.layout.xaxis.type == "category"


def test_two_sets_of_one_size_are_joined_by_no_line():
    rows = causal_row("a"), causal_row("b", random_high=0.5), causal_row("c", n_latents=9)
    above = traces(mitigation_curve(causal_result(*rows)))
    assert above["latents"].mode == "markers"
    assert above["random directions, 95th percentile"].y == (0.5, 0.034)


def test_a_sweep_has_a_line_a_set_and_one_band():
    rows = [
        causal_row(name, test="steer", strength=s, share=share, random_mean=mean, random_high=high)
        for name, s, share, mean, high in (
            ("top 3", 2.0, 0.5, 0.1, 0.3),
            ("top 3", 0.5, 0.2, 0.0, 0.1),
            ("<b>", 2.0, 0.4, 0.3, 0.2),
            ("<b>", 0.5, NAN, 0.0, 0.1),
        )
    ]
    figure = steering_sweep(causal_result(*rows))
    above = traces(figure)
    assert (above["top 3"].x, above["top 3"].y) == ((0.5, 2.0), (0.2, 0.5))
    assert (above["&lt;b&gt;"].x, above["&lt;b&gt;"].y) == ((2.0,), (0.4,))
    assert above["top 3"].line.color != above["&lt;b&gt;"].line.color
    assert above["top 3"].marker.symbol != above["&lt;b&gt;"].marker.symbol
    # At 2.0 the mean of 0.1 and 0.3, and the higher percentile.
    assert above["random directions, mean"].y == (0.0, 0.2)
    assert above["random directions, 95th percentile"].y == (0.1, 0.3)
    assert "1 trials without a value are left out." in words(figure)
    assert "strength 0.5" in above["top 3"].hovertext[0]


def test_shares_far_off_are_beyond_the_axis():
    row = causal_row(test="steer", strength=1.0, share=-50.0, share_low=-60.0)
    figure = steering_sweep(causal_result(row, causal_row(test="steer", strength=0.5)))
    assert -1.2 < figure.layout.yaxis.range[0] < -1
    assert "1 values are beyond the axis" in words(figure)


def test_a_cost_without_a_value_is_no_point():
    row = causal_row(off_target_kl=NAN, off_target_low=NAN, random_off_target_kl=NAN)
    below = traces(mitigation_curve(causal_result(row)), panel=2)
    assert below["latents"].y == (None,)
    assert "random directions, mean" not in below
    assert "off-target KL none [none, 1.0000]" in below["latents"].hovertext[0]


def test_tests_that_are_not_there_are_refused():
    result = causal_result(causal_row(share=NAN))
    with pytest.raises(NothingToDraw, match="1 trials of the test 'necessity' and none with a v"):
        mitigation_curve(result)
    with pytest.raises(NothingToDraw, match=r"its tests are \['necessity'\]"):
        steering_sweep(result)
    with pytest.raises(ValueError, match="draw it with steering_sweep"):
        mitigation_curve(result, test="steer")
