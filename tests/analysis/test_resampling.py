import math

import pytest
import torch

from tl_crosscoder.analysis.resampling import (
    bootstrap_weights,
    effect_size,
    holm,
    interval,
    p_value,
    ratio_interval,
)


def test_p_values_count_ours_among_the_controls():
    controls = torch.tensor([0.1, 0.2, 0.3, 0.4])
    # Two of four are as large: (1 + 2) / (1 + 4).
    assert p_value(0.3, controls) == 0.6
    assert p_value(1.0, controls) == 0.2
    assert math.isnan(p_value(math.nan, controls))


def test_holm_by_hand():
    # Sorted .01 .02 .04 times 3, 2, 1: .03, .04, .04; never falling, NaN left out.
    corrected = holm(torch.tensor([0.04, 0.01, math.nan, 0.02]))
    assert corrected[[0, 1, 3]].tolist() == pytest.approx([0.04, 0.03, 0.04])
    assert corrected[2].isnan()
    assert holm(torch.tensor([0.6, 0.7])).tolist() == [1.0, 1.0]


def test_effect_sizes_are_in_standard_deviations_of_the_controls():
    assert effect_size(5.0, torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(3.0)
    assert math.isnan(effect_size(5.0, torch.ones(3)))


def test_resamples_draw_as_many_units_and_repeat_with_the_seed():
    weights = bootstrap_weights(7, n_draws=50, seed=3)
    assert weights.sum(dim=1).tolist() == [7.0] * 50
    assert torch.equal(weights, bootstrap_weights(7, n_draws=50, seed=3))
    assert not torch.equal(weights, bootstrap_weights(7, n_draws=50, seed=4))


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for i in range(200):
        sample = torch.randn(60, generator=generator) + 2
        weights = bootstrap_weights(60, n_draws=400, seed=i)
        found = ratio_interval(sample, torch.ones(60), weights=weights)
        hits += found.low <= 2 <= found.high
        assert found.value == pytest.approx(sample.mean().item())
    # 95 % of 200 with a standard deviation of 3.
    assert 178 <= hits <= 199


def test_a_ratio_is_that_of_the_sums():
    sums, counts = torch.tensor([1.0, 6.0]), torch.tensor([1.0, 2.0])
    weights = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    found = ratio_interval(sums, counts, weights=weights)
    # 7 / 3; resamples give 1, 3 and 7 / 3.
    assert found.value == pytest.approx(7 / 3)
    assert found == interval(7 / 3, torch.tensor([1.0, 3.0, 7 / 3], dtype=torch.float64))
    assert 1 <= found.low < found.high <= 3
