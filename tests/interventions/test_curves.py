"""Latents and directions at equal numbers, and what edits cost."""

from dataclasses import replace

import pytest
import torch
from analysis.hand_made import latent_measures
from interventions.same_norm import assert_of_same_norm

from tl_crosscoder.baselines.difference import difference_pca
from tl_crosscoder.interventions.behaviour import Predictions
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.controls import ControlSettings
from tl_crosscoder.interventions.costs import OffTarget
from tl_crosscoder.interventions.curves import curve_trials
from tl_crosscoder.interventions.edits import Edit
from tl_crosscoder.interventions.trials import run_trials

FEW = ControlSettings(n_random=2, n_matched=2, n_draws=20, controls=("covariance", "matched"))
MEASURES = latent_measures([1.0] * 12, [1.0] * 12, [100] * 12)
ORDERS = {"first": [4, 1, 7], "second": [1, 4]}


@pytest.fixture
def text(words):
    return words[1][:7]


@pytest.fixture
def ctx(pairs, make_crosscoder):
    return InterventionContext.of(pairs["hooked"], make_crosscoder(pairs["hooked"]))


def test_all_directions_are_the_whole_activation_and_latents_are_those_of_their_order(ctx, text):
    pca = difference_pca(ctx.models, text, n_components=16)
    given = {"latents": MEASURES, "orders": ORDERS, "settings": FEW, "sizes": (1, 2, 3, 16)}
    directions = {"PCA": pca.components, "two": torch.eye(16)[:2]}
    trials = curve_trials(ctx, text, directions=directions, **given)
    half = len(trials) // 2
    sizes = [
        *(("first", n) for n in (1, 2, 3)), *(("second", n) for n in (1, 2)),
        *(("PCA", n) for n in (1, 2, 3, 16)), *(("two", n) for n in (1, 2)), ("all latents", 12),
    ]  # fmt: skip
    assert [(t.test, t.name, t.n_latents) for t in trials] == [
        (test, name, n) for test in ("necessity", "insert") for name, n in sizes
    ]
    acts = ctx.acts(torch.arange(3), text[:3])
    codes = acts.codes.to_dense().view(*acts.x[0].shape[:2], -1)
    for start, x, other, sign in ((0, *acts.x[::-1], -1), (half, *acts.x, 1)):
        swapped = x.clone()
        swapped[..., :2] = other[..., :2]
        for i, expected in {
            4: x + sign * codes[..., [1, 4]] @ ctx.difference[[1, 4]],
            8: other,
            10: swapped,
            11: x + sign * codes @ ctx.difference,
        }.items():
            own = trials[start + i].own(acts)
            torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)
    # Only the first order has controls, of its own norm at every token.
    for i, trial in enumerate(trials):
        n = {kind: len(each) for kind, each in trial.controls.items()}
        assert n == ({"covariance": 2, "matched": 2} if i % half < 3 else {})
    assert_of_same_norm(ctx, text[:3], trials[1])
    found = run_trials(ctx, Predictions.of(text), text, trials=trials, settings=FEW)
    assert found.sets == ORDERS
    for row in found.rows[8::half]:
        assert row.share == pytest.approx(row.ceiling, abs=1e-3)
    assert found.needed("insert", "PCA", share=1.5) is None


def test_sizes_that_nothing_has_are_refused(ctx, text):
    for sizes, message in {
        (0, 3): r"sizes are \[0, 3\]: give numbers from 1 on",
        (4,): r"sizes are \[4\].* They have \{'first': 3, 'second': 2\}",
        (): r"sizes are \[\]",
    }.items():
        with pytest.raises(ValueError, match=message):
            curve_trials(ctx, text, latents=MEASURES, orders=ORDERS, sizes=sizes, settings=FEW)


class Counted(Edit):
    """The fine-tuned activation, a little larger, and how often it was asked for."""

    site, n = 1, 0

    def __call__(self, acts):
        self.n += 1
        return 1.1 * acts.x[1]


def test_an_edit_is_scored_once_on_neutral_text_whichever_effects_it_is_tried_for(ctx, text):
    given = {"latents": MEASURES, "orders": {"first": [4]}, "sizes": (1,), "settings": FEW}
    (trial, *_) = curve_trials(ctx, text, tests=("necessity",), **given)
    trial, costs = replace(trial, own=Counted()), OffTarget(ctx=ctx, text=text[:2])
    effects = [Predictions.of(text[:n]) for n in (3, 4)]
    first, second = (
        run_trials(ctx, effect, costs, trials=[trial], settings=FEW).rows[0] for effect in effects
    )
    # A batch of each effect, and one of the neutral text.
    assert trial.own.n == 3
    assert first.off_target_kl == second.off_target_kl > 0
    alone = run_trials(ctx, effects[1], text[:2], trials=[trial], settings=FEW)
    assert alone.rows[0] == second
    assert trial.own.n == 5
