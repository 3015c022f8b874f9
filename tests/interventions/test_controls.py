"""What stands in the place of an edit's directions, and how far it moves the activation."""

from dataclasses import replace

import pytest
import torch
from analysis.hand_made import latent_measures
from interventions.same_norm import assert_of_same_norm
from interventions.test_trials import FEW, LATENTS

from tl_crosscoder.config.causal import CONTROLS
from tl_crosscoder.interventions.behaviour import Predictions
from tl_crosscoder.interventions.causal import TrialMaker, causal_test
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.controls import gaussian_factors, gaussian_rows

ALL = replace(FEW, n_random=4)


@pytest.fixture(scope="module")
def measures():
    return latent_measures([1.0] * 12, [1.0] * 12, [100 * (j != 3) for j in range(12)])


@pytest.fixture
def maker(pairs, make_crosscoder, words, measures):
    pair = pairs["hooked"]
    ctx = InterventionContext.of(pair, make_crosscoder(pair))
    factors = gaussian_factors(ctx, words[1], ALL.controls)
    null = make_crosscoder(pair)
    options = {"mode": "delta", "settings": ALL, "norm": 1.0, "null": null, "factors": factors}
    return TrialMaker(ctx=ctx, latents=measures, **options)


@pytest.mark.parametrize(
    ("test", "mode"),
    [("necessity", "delta"), ("necessity", "zero"), ("necessity", "project"), ("insert", "delta")],
)
def test_controls_move_each_token_as_far_as_the_edit(maker, words, test, mode):
    maker = replace(maker, mode=mode)
    (trial,) = maker.trials(test, "x", maker.ctx.latents(LATENTS))
    n = {"random": 4, "covariance": 4, "shuffled": 4, "null": 4, "matched": 2}
    assert {kind: len(each) for kind, each in trial.controls.items()} == n
    assert_of_same_norm(maker.ctx, words[1][:3], trial)


def test_steering_controls_are_as_long_as_the_vector(maker):
    for trial in maker.trials("steer", "x", maker.ctx.latents(LATENTS)):
        assert {*trial.controls} == {"random", "covariance", "shuffled", "null"}
        lengths = [e.vector.norm().item() for e in trial.edits]
        assert lengths == pytest.approx([trial.strength] * len(lengths), rel=1e-4)


def test_a_code_writes_the_row_of_another_latent_and_never_its_own(maker):
    settings = replace(ALL, controls=("shuffled",), n_random=40)
    maker = replace(maker, settings=settings, null=None, factors={})
    ids = maker.ctx.latents(LATENTS)
    (trial,) = maker.trials("insert", "x", ids)
    difference = maker.ctx.difference
    rows, drawn = torch.nn.functional.normalize(difference, dim=1), set[int]()
    for control in trial.controls["shuffled"]:
        v = control.edit.directions
        torch.testing.assert_close(v.norm(dim=1), difference[ids].norm(dim=1))
        cosines, others = (torch.nn.functional.normalize(v, dim=1) @ rows.T).max(dim=1)
        assert cosines.min() > 0.999
        assert (others != ids).all()
        assert len(others.unique()) == 3
        drawn |= set(others.tolist())
    # Latent 3 never fires; those of the set may stand for each other.
    assert drawn == {*range(12)} - {3}


def test_stand_ins_are_active_about_as_often(maker):
    """Latents 0 to 50 fire often and the others rarely: 50 others are as near."""
    latents = latent_measures([1.0] * 60, [1.0] * 60, [1000] * 51 + [20] * 9)
    maker = replace(maker, latents=latents)
    drawn = maker._similar(torch.tensor([0]), torch.arange(60), n=300, seed=0)
    assert {j.item() for j in drawn} == set(range(1, 51))


def test_directions_have_the_second_moment_of_the_difference(pair, words):
    ctx, text = InterventionContext.of(pair), words[1]
    factors = gaussian_factors(ctx, text, ("covariance", "shuffled"))
    x = pair.activations(text.tokens)[text.mask].double()
    delta = x[:, 1] - x[:, 0]
    F = factors["covariance"]
    assert [*factors] == ["covariance"]
    torch.testing.assert_close(F @ F.T, delta.T @ delta, rtol=1e-4, atol=1e-3)
    # Where the models differ along one direction, so does every draw; norms are those of the rows.
    d = torch.zeros(16)
    d[3] = 1.0
    rows = torch.tensor([2.0, 5.0])[:, None] * torch.ones(2, 16) / 4
    one = gaussian_rows(rows, n=3, seed=0, factors={"covariance": torch.outer(d, d)})
    for drawn in one["covariance"]:
        torch.testing.assert_close(drawn.abs(), torch.stack([2 * d, 5 * d]))
    alone = gaussian_rows(rows, n=3, seed=0, factors={"random": None})["random"]
    both = gaussian_rows(rows, n=3, seed=0, factors={"covariance": F, "random": None})["random"]
    assert torch.equal(torch.stack(alone), torch.stack(both))
    torch.testing.assert_close(torch.stack(alone).norm(dim=2), torch.tensor([[2.0, 5.0]] * 3))


def test_only_the_kinds_that_are_asked_for_are_run(pairs, make_crosscoder, measures, words):
    pair, text = pairs["hooked"], words[1][:4]
    how = {"latents": measures, "sets": {"x": LATENTS}, "tests": ["insert"]}
    given = pair, make_crosscoder(pair), Predictions.of(text), text
    every, one = (
        causal_test(*given, settings=settings, **how).rows[0]
        for settings in (ALL, replace(ALL, controls=("shuffled",)))
    )
    means = {kind: getattr(every, f"{kind}_mean") for kind in CONTROLS}
    assert every.strongest == max(means, key=means.get)
    assert every.control_mean == means[every.strongest]
    assert every.p_control == getattr(every, f"p_{every.strongest}")
    # Draws of a kind do not depend on which others are run.
    assert (one.strongest, one.control_mean) == ("shuffled", pytest.approx(means["shuffled"]))
    assert torch.tensor([one.random_mean, one.covariance_high, one.p_matched]).isnan().all()
