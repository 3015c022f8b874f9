"""Edits at several hooks of one pass, against naive forward passes."""

import pytest
import torch
from analysis.hand_made import latent_measures
from models.random_models import random_crosscoder

from tl_crosscoder.interventions.behaviour import Predictions
from tl_crosscoder.interventions.causal import causal_trials
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.controls import ControlSettings
from tl_crosscoder.interventions.costs import OffTarget
from tl_crosscoder.interventions.edits import ReplaceActivation, latent_contributions
from tl_crosscoder.interventions.latent_edits import ablation
from tl_crosscoder.interventions.live import edited
from tl_crosscoder.interventions.running import edited_logits
from tl_crosscoder.interventions.several_hooks import (
    EditsInTurn,
    ablation_at_every_hook,
    hook_contexts,
    in_turn,
)
from tl_crosscoder.interventions.trials import run_trials

POST = ["blocks.1.hook_resid_post", "blocks.0.hook_resid_post"]
LATENTS = [1, 4, 7]
MEASURES = latent_measures([1.0] * 12, [1.0] * 12, [100] * 12)


@pytest.fixture
def ctx(pair):
    """Over two hooks, the higher one named first."""
    two = pair.at(POST)
    return InterventionContext.of(two, random_crosscoder(two.sites, 12, scale=0.4))


def acts_of(ctx, text):
    return next(iter(ctx.batches(text, batch_size=8)))


def test_within_the_span_each_hook_has_the_base_and_beside_it_what_the_lower_edit_left(ctx, words):
    low, high = hook_contexts(ctx)
    assert [view.models.model_sites[view.base].hook_name for view in (low, high)] == POST[::-1]
    acts, ids = acts_of(ctx, words[1]), torch.tensor(LATENTS)
    new = ablation_at_every_hook(ctx, LATENTS)(acts)
    # The running stream at the higher hook, by a patch at the lower one.
    lower, seen = ablation(low, LATENTS)(acts), []
    name = low.site_name(low.finetuned)
    with low.models.patched(name, lower) as model:
        keep = (POST[0], lambda x, hook: seen.append(x))  # noqa: ARG005
        model.run_with_hooks(acts.text.tokens.long(), fwd_hooks=[keep], return_type=None)
    taken = latent_contributions(acts, high.difference[ids], ids).view_as(new)
    expected, running = acts.x[high.finetuned] - taken, seen[0]
    Q = torch.linalg.qr(high.difference[ids].T).Q
    torch.testing.assert_close(new @ Q, expected @ Q, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new - new @ Q @ Q.T, running - running @ Q @ Q.T,
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    assert (running - acts.x[high.finetuned]).abs().max() > 0.01
    assert (expected - running).abs().max() > 0.01


def test_no_difference_is_removed_twice(pair, words):
    """Two names of one activation, with equal rows: both edits are as one."""
    two = pair.at(["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"])
    crosscoder = random_crosscoder(two.sites, 12, scale=0.4)
    with torch.no_grad():
        for low, high in ((0, 1), (2, 3)):
            crosscoder.decoder(high).copy_(crosscoder.decoder(low))
    ctx = InterventionContext.of(two, crosscoder)
    low, high = hook_contexts(ctx)
    torch.testing.assert_close(low.difference, high.difference)
    acts = acts_of(ctx, words[1])
    once, twice = ablation(low, LATENTS)(acts), ablation_at_every_hook(ctx, LATENTS)(acts)
    assert (once - acts.x[low.finetuned]).abs().max() > 0.01
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-4)


def test_live_and_scored_edits_are_one(ctx, words):
    edit, text = ablation_at_every_hook(ctx, LATENTS), words[1][:4]
    (acts,) = ctx.batches(text, batch_size=8)
    ((_, scored),) = edited_logits(ctx, acts, [edit])
    plain = ctx.models.logits(text.tokens, site=ctx.site_name(edit.site))
    with edited(ctx, edit) as model:
        live = model.logits(text.tokens)
    assert (scored - plain).abs().max() > 0.01
    mask = text.mask  # behind a text's end its codes are unlike those of a running model
    torch.testing.assert_close(live[mask], scored[mask], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        ctx.models.logits(text.tokens, site=ctx.site_name(edit.site)), plain, rtol=0, atol=0
    )


def test_trials_have_controls_at_every_hook(ctx, words):
    settings = ControlSettings(n_random=2, n_matched=2)
    each = [
        causal_trials(view, words[1], latents=MEASURES, sets={"a": LATENTS},
                      tests=("necessity",), settings=settings)[0]
        for view in hook_contexts(ctx)
    ]  # fmt: skip
    joint = in_turn(ctx.models, each)
    assert joint.name == "a, 2 hooks"
    assert {kind: len(found) for kind, found in joint.controls.items()} == {
        "random": 2, "covariance": 2, "shuffled": 2, "matched": 2}  # fmt: skip
    assert all(isinstance(e, EditsInTurn) and len(e.edits) == 2 for e in joint.edits)
    view = hook_contexts(ctx)[-1]
    effect, costs = Predictions.of(words[1]), OffTarget(ctx=view, text=words[1])
    one, both = run_trials(view, effect, costs, trials=[each[-1], joint], settings=settings).rows
    assert one.ceiling == both.ceiling
    assert one.share != both.share


def test_what_cannot_act_at_several_hooks_is_refused(pair, crosscoder, ctx, words):
    one = InterventionContext.of(pair, crosscoder)
    with pytest.raises(ValueError, match="both models are read at 1 hook of a block"):
        ablation_at_every_hook(one, LATENTS)
    low, high = hook_contexts(ctx)
    whole = tuple(ReplaceActivation(site=c.finetuned, stream=c.base) for c in (low, high))
    with pytest.raises(ValueError, match="ReplaceActivation cannot act at several hooks"):
        EditsInTurn(models=ctx.models, edits=whole)(acts_of(ctx, words[1]))
