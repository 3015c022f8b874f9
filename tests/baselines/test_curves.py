"""Methods at equal numbers of directions."""

from dataclasses import replace

import pytest
import torch
from interventions.conftest import make_crosscoder  # noqa: F401
from interventions.same_norm import assert_of_same_norm

from tl_crosscoder.baselines.curves import curve_trials
from tl_crosscoder.baselines.difference import difference_pca
from tl_crosscoder.interventions.behaviour import Predictions
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.controls import ControlSettings, gaussian_factors
from tl_crosscoder.interventions.trials import run_trials

FEW = ControlSettings(n_random=2, n_draws=20)


@pytest.fixture
def ctx(pairs, make_crosscoder):  # noqa: F811
    return InterventionContext.of(pairs["hooked"], make_crosscoder(pairs["hooked"]))


def test_each_method_has_its_first_directions_and_all_of_them_are_the_whole_activation(
    ctx, unpacked
):
    pca = difference_pca(ctx.models, unpacked, n_components=16)
    factors = gaussian_factors(ctx, unpacked, FEW.controls)
    trials = curve_trials(
        ctx,
        directions={"PCA": pca.components, "two": torch.eye(16)[:2]},
        latents=[4, 1, 7],
        sizes=(1, 2, 3, 16),
        settings=FEW,
        factors=factors,
    )
    sizes = [(t.name, t.n_latents) for t in trials]
    assert sizes == [
        *(("PCA", n) for n in (1, 2, 3, 16)), *(("two", n) for n in (1, 2)),
        *(("latents", n) for n in (1, 2, 3)),
    ]  # fmt: skip
    acts = ctx.acts(torch.arange(3), unpacked[:3])
    base, finetuned = acts.x
    torch.testing.assert_close(trials[3].own(acts), base, rtol=1e-3, atol=1e-3)
    swapped = finetuned.clone()
    swapped[..., :2] = base[..., :2]
    torch.testing.assert_close(trials[5].own(acts), swapped, rtol=1e-4, atol=1e-4)
    codes = acts.codes.to_dense().view(*base.shape[:2], -1)
    removed = codes[..., [4, 1]] @ ctx.difference[[4, 1]]
    torch.testing.assert_close(trials[7].own(acts), finetuned - removed, rtol=1e-4, atol=1e-4)
    for i in (1, 7):
        assert {kind: len(each) for kind, each in trials[i].controls.items()} == {
            "random": 2, "covariance": 2,
        }  # fmt: skip
        assert_of_same_norm(ctx, unpacked[:3], trials[i])
    settings = replace(FEW, controls=("random",))
    found = run_trials(ctx, Predictions.of(unpacked), unpacked, trials=trials, settings=settings)
    whole = found.rows[3]
    assert whole.share == pytest.approx(whole.ceiling, abs=1e-3)


def test_sizes_that_no_method_has_are_refused(ctx):
    with pytest.raises(ValueError, match=r"sizes are \[0, 3\]: give numbers of directions from 1"):
        curve_trials(ctx, directions={"a": torch.eye(16)}, sizes=(0, 3))
    with pytest.raises(ValueError, match=r"no method has as many directions as \[3\]: they have"):
        curve_trials(ctx, directions={"a": torch.eye(16)[:2]}, sizes=(3,))
