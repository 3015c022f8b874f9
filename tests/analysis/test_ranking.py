from dataclasses import replace

import pytest
import torch
from analysis.hand_made import by_nu, latent_measures

from tl_crosscoder.analysis.latent_scaling import DifferenceByLatent, LatentScaling
from tl_crosscoder.analysis.latents import MIN_ACTIVE_TOKENS, default_order, rank_latents


def measures(explained: list[float], **scalings: LatentScaling):
    """R is 0.9, 0.5, 0.1, 0.5; each explains so much of the difference; the last is too rare."""
    made = latent_measures([0.1, 1.0, 0.9, 1.0], [0.9, 1.0, 0.1, 1.0], [20, 30, 40, 9])
    shares = torch.tensor(explained).double()
    difference = DifferenceByLatent(explained_difference=shares, explained_difference_drop=shares)
    return replace(made, difference=difference, scaling=scalings)


def test_the_score_is_the_relative_norm_times_what_is_explained():
    # Score 0.9 x 0.1 = 0.09, 0.5 x 0.3 = 0.15, 0.1 x 0.4 = 0.04; the fourth is active on 9 tokens.
    made = measures([0.1, 0.3, 0.4, 0.9])
    ranking = rank_latents(made)
    assert ranking.latents == [1, 0, 2]
    assert [r.score for r in ranking.rows] == pytest.approx([0.15, 0.09, 0.04])
    assert ranking.rows[0].explained_difference == pytest.approx(0.3)
    assert ranking.rows[0].active_share == 30 / 40
    # Towards the base the weight is 1 - R: 0.01, 0.15, 0.36.
    assert rank_latents(made, toward="base").latents == [2, 1, 0]
    assert rank_latents(made, by="difference").latents == [2, 1, 0]
    assert rank_latents(made, by="relative_decoder_norm").latents == [0, 1, 2]
    assert rank_latents(made, by="relative_decoder_norm", n=1).latents == [0]
    assert rank_latents(made, by="activity").latents == [2, 1, 0]


def test_nu_is_ranked_by_the_sum_of_ranks_and_by_size_not_sign():
    # |nu_error| ranks 1, 0, 2; |nu_reconstruction| ranks 2, 1, 0; sums 3, 1, 2.
    nu = by_nu("finetuned", [-0.2, 0.1, 0.5, 0.0], [0.9, -0.8, 0.1, 0.0])
    made = measures([0.1, 0.3, 0.4, 0.9], finetuned=nu)
    # The rare one has the smallest sums of all but is not ranked; it moves all others alike.
    ranking = rank_latents(made, by="nu")
    assert ranking.latents == [1, 2, 0]
    assert ranking.rows[0].nu_error == pytest.approx(0.1)


def test_without_a_difference_there_are_norms_and_without_norms_activity():
    made = latent_measures([0.1, 0.0, 1.0], [0.9, 0.0, 0.0], [50, 60, 70])
    assert default_order(made) == "relative_decoder_norm"
    assert rank_latents(made).latents == [0, 2]  # one writes nothing
    single = replace(made, relative_decoder_norm=torch.full((3,), torch.nan))
    assert rank_latents(single).latents == [2, 1, 0]
    with pytest.raises(ValueError, match="cannot be ranked by 'score'"):
        rank_latents(made, by="score")
    with pytest.raises(ValueError, match="by 'size' and toward 'finetuned'"):
        rank_latents(made, by="size")


def test_equal_keys_come_by_activity_and_then_in_order():
    made = latent_measures([1.0] * 4, [1.0] * 4, [50, 60, 50, 9])
    assert rank_latents(made).latents == [1, 0, 2]
    assert MIN_ACTIVE_TOKENS == 10
