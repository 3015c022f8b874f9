from dataclasses import replace
from math import isnan

import pytest
import torch
from interventions.same_norm import assert_of_same_norm
from models.given_rows import GivenRows
from models.tiny_pairs import TEXTS
from text_of_ids import text_of

from tl_crosscoder.baselines.difference import (
    ActivationDifference,
    DifferencePCA,
    activation_difference,
    difference_pca,
)
from tl_crosscoder.data.cache_writer import write_cache
from tl_crosscoder.data.harvest import with_norm_limits
from tl_crosscoder.data.tokens import DROP_REASONS
from tl_crosscoder.interventions.behaviour import Behaviour, Question
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.controls import ControlSettings
from tl_crosscoder.interventions.running import edited_logits
from tl_crosscoder.interventions.trials import run_trials

BOS, FIRST, PADDING = (DROP_REASONS.index(r) for r in ("bos", "first", "padding"))


def two_contexts():
    """Four positions each; BOS comes first, and the second context is one token shorter."""
    text = text_of(torch.arange(8).view(2, 4))
    dropped = torch.tensor([[BOS, 0, 0, 0], [BOS, 0, 0, PADDING]], dtype=torch.uint8)
    base = torch.tensor([[[9, 9], [3, 4], [0, 5], [0, 0]], [[9, 9], [0, 0], [6, 8], [7, 7]]])
    delta = torch.tensor([[[8, 0], [1, 2], [0, 3], [5, 0]], [[4, 0], [3, 0], [0, 1], [9, 9]]])
    source = GivenRows(torch.stack([base, base + delta], dim=2).float())
    return source, replace(text, dropped=dropped)


def test_means_by_hand():
    source, text = two_contexts()
    found = activation_difference(source, text, n_positions=3, batch_size=1)
    assert found.positions == (1, 2, 3)
    assert found.counts == (2, 2, 1)
    # Position 1: ([1, 2] + [3, 0]) / 2; position 2: ([0, 3] + [0, 1]) / 2; position 3: [5, 0].
    expected = torch.tensor([[2.0, 1.0], [0.0, 2.0], [5.0, 0.0]])
    assert torch.equal(found.by_position, expected)
    # All five: ([1, 2] + [3, 0] + [0, 3] + [0, 1] + [5, 0]) / 5.
    assert torch.equal(found.direction(), torch.tensor([1.8, 1.2]))
    assert torch.equal(found.direction(3), torch.tensor([5.0, 0.0]))
    # Norms of the base: 5, 5, 0, 0, 10.
    assert found.n_tokens == 5
    assert found.activation_norms[0] == 4.0
    assert found.which() == (1, 2, 3, "mean")
    assert found.models == ("the base", "the finetuned")


def test_equals_a_loop_over_texts(pair, unpacked):
    text = with_norm_limits(pair, unpacked, multiple=1.3)
    found = activation_difference(pair, text, n_positions=6, batch_size=3)
    rows: dict[int, list] = {p: [] for p in range(text.context_size)}
    norms = []
    for ids, counts in zip(text.tokens.long(), text.mask, strict=True):
        x = pair.activations(ids[None])[0].double()
        for p in counts.nonzero().flatten().tolist():
            if bool((x[p].norm(dim=-1) <= torch.tensor(text.norm_limits)).all()):
                rows[p].append(x[p, 1] - x[p, 0])
                norms.append(x[p].norm(dim=-1))
    assert 0 < len(norms) < text.n_tokens  # some are above the limits
    assert found.n_tokens == len(norms)
    assert found.counts == tuple(len(rows[p]) for p in found.positions)
    for which in found.which():
        each = rows[which] if which != "mean" else [d for own in rows.values() for d in own]
        expected = torch.stack(each).mean(dim=0).float()
        torch.testing.assert_close(found.direction(which), expected, rtol=1e-4, atol=1e-5)
    assert found.activation_norms == pytest.approx(torch.stack(norms).mean(dim=0).tolist())


def test_a_cache_gives_what_its_models_give(pairs, unpacked, tmp_path):
    pair, options = pairs["llama"], {"store": "float32", "show_progress": False}
    cache = write_cache(pair, unpacked[:5], unpacked[5:], tmp_path / "cache", **options)
    read = activation_difference(cache, cache.training)
    run = activation_difference(pair, unpacked[:5])
    assert read.facts() == run.facts()
    torch.testing.assert_close(read.stacked(), run.stacked())
    components = difference_pca(cache, cache.training, n_components=2).components
    torch.testing.assert_close(
        components, difference_pca(pair, unpacked[:5], n_components=2).components
    )
    # The other way round is the opposite.
    back = activation_difference(pair.comparing("finetuned", "base"), unpacked[:5])
    assert torch.equal(run.stacked(), -back.stacked())
    assert run.activation_norms == back.activation_norms[::-1]


def test_what_is_loaded_is_what_was_saved(tmp_path):
    source, text = two_contexts()
    text = replace(text, dropped=text.dropped.clone())
    text.dropped[:, 2] = FIRST  # position 2 has no token, so its mean is NaN
    saved = activation_difference(source, text, n_positions=3)
    loaded = ActivationDifference.load(saved.save(tmp_path / "means.json"))
    assert loaded.facts() == saved.facts()
    assert torch.equal(loaded.mean, saved.mean)
    assert torch.equal(loaded.by_position.isnan(), saved.by_position.isnan())
    assert saved.by_position[1].isnan().all()
    assert loaded.which() == (1, 3, "mean")
    assert torch.equal(loaded.stacked(), saved.stacked())
    with pytest.raises(ValueError, match="no mean of 2"):
        loaded.direction(2)


def test_steering_adds_a_multiple_of_the_norm_of_the_stream(pair, unpacked):
    found = activation_difference(pair, unpacked)
    ctx = InterventionContext.of(pair)
    d = found.direction(2)
    (acts,) = ctx.batches(unpacked[:2])
    for at, site in ((0, "base"), (1, "finetuned")):
        edit = found.steering(ctx, 2, strength=-0.5, site=site)
        vector = -0.5 * found.activation_norms[at] * d / d.norm()
        torch.testing.assert_close(edit.vector, vector)
        ((_, logits),) = edited_logits(ctx, acts, [edit])
        stream = acts.x[at] + vector
        steered = pair.run_with_patch(acts.text.tokens.long(), stream, site=site)
        torch.testing.assert_close(logits, steered, rtol=1e-4, atol=1e-4)


def test_projection_replacement_takes_the_coefficient_of_the_base(pair, unpacked):
    found, ctx = activation_difference(pair, unpacked), InterventionContext.of(pair)
    (acts,) = ctx.batches(unpacked[:2])
    base, finetuned = acts.x
    d = torch.nn.functional.normalize(found.mean, dim=0)
    new = found.projection_replacement(ctx, "mean")(acts)
    torch.testing.assert_close(new @ d, base @ d, rtol=1e-4, atol=1e-4)
    moved = new - finetuned
    torch.testing.assert_close(moved, (moved @ d)[..., None] * d, rtol=1e-4, atol=1e-4)
    assert moved.norm() > 0.1


def test_trials_stand_in_the_table_of_latents(pair, unpacked):
    found, ctx = activation_difference(pair, unpacked), InterventionContext.of(pair)
    settings = ControlSettings(n_random=3, alphas=(0.5, 1.0), n_draws=20)
    trials = [t for which in (1, "mean") for t in found.trials(ctx, which, settings=settings)]
    questions = [Question(prompt=t, completions=(" cat", " dog"), ends_turn=False) for t in TEXTS]
    behaviour = Behaviour.of("animals", questions, pair.tokenizer)
    table = run_trials(ctx, behaviour, unpacked, trials=trials, settings=settings)
    names = ["ADL, position 1", "ADL, mean"]
    tests = [("steer", 0.5), ("steer", 1.0), ("necessity", None)]
    assert {(r.latents, r.test, None if isnan(r.strength) else r.strength) for r in table.rows} == {
        (name, *test) for name in names for test in tests
    }
    half, whole, replaced = trials[3:]
    for steer, alpha in ((half, 0.5), (whole, 1.0)):
        norms = [e.vector.norm().item() for e in (steer.own, *steer.controls["random"])]
        assert norms == pytest.approx([alpha * found.activation_norms[0]] * 4)
    # The same three directions at each strength.
    one, other = (trial.controls["random"][2].vector for trial in (half, whole))
    torch.testing.assert_close(2 * one, other)
    random = replaced.controls["random"]
    for edit in (replaced.own, *(control.edit for control in random)):
        assert (edit.site, edit.stream, edit.replacement) == (1, 1, 0)
    assert torch.equal(replaced.own.directions, found.mean[None])
    assert_of_same_norm(ctx, unpacked, replaced)


def test_lenses_read_every_direction(pairs, unpacked):
    pair = pairs["llama"]
    found = activation_difference(pair, unpacked, n_positions=2)
    effects = found.logit_lens(pair, n=3)
    assert {row.latent for row in effects.rows} == {0, 1, 2}
    assert {row.direction for row in effects.rows} == {"finetuned"}
    scope = found.patchscope(pair, site="base", scales=(1.0,), n=2, prompts=["A dog", "The cat"])
    assert scope.activation_norm == found.activation_norms[0]
    assert {row.direction for row in scope.rows} == {0, 1, 2}


def test_what_does_not_fit_is_refused(pairs, unpacked):
    found = activation_difference(pairs["hooked"], unpacked)
    reverse = InterventionContext.of(pairs["hooked"].comparing("finetuned", "base"))
    with pytest.raises(ValueError, match="the order"):
        found.steering(reverse, "mean", strength=1.0)
    with pytest.raises(ValueError, match="'sft' was not compared"):
        found.steering(InterventionContext.of(pairs["hooked"]), "mean", strength=1.0, site="sft")
    equal = activation_difference(pairs["equal"], unpacked)
    with pytest.raises(ValueError, match="'ADL, mean' is zero"):
        equal.projection_replacement(InterventionContext.of(pairs["equal"]), "mean")
    with pytest.raises(ValueError, match="length 0"):
        equal.steering(InterventionContext.of(pairs["equal"]), "mean", strength=1.0)
    with pytest.raises(ValueError, match="have 1 to 23"):
        activation_difference(pairs["hooked"], unpacked, n_positions=24)
    silent = replace(unpacked, dropped=torch.full_like(unpacked.dropped, BOS))
    with pytest.raises(ValueError, match="no token of this text counts"):
        activation_difference(pairs["hooked"], silent)


# --- principal components -------------------------------------------------------------------------


def given(deltas: list[list[float]], base: list[float]) -> GivenRows:
    """One context; the base's stream is the same at every token."""
    delta = torch.tensor([deltas])
    x = torch.tensor(base).expand_as(delta)
    return GivenRows(torch.stack([x, x + delta], dim=2))


def pca_of(source: GivenRows, **options) -> DifferencePCA:
    text = text_of(torch.arange(source.x.shape[1])[None])
    return difference_pca(source, text, n_components=2, **options)


def test_components_by_hand():
    # Mean [1, 1]; around it [-3, 0], [3, 0], [0, -1], [0, 1]: variances (9 + 9) / 4, (1 + 1) / 4.
    source = given([[-2, 1], [4, 1], [1, 0], [1, 2]], base=[3.0, 4.0])
    found = pca_of(source)
    assert found.variance == pytest.approx((4.5, 0.5))
    assert found.variance_ratio == pytest.approx((0.9, 0.1))
    torch.testing.assert_close(found.components, torch.eye(2))
    assert torch.equal(found.mean, torch.ones(2))
    # Norms of the fine-tuned [3, 4] + delta: [1, 5], [7, 5], [4, 4], [4, 6].
    expected = (26**0.5 + 74**0.5 + 32**0.5 + 52**0.5) / 4
    assert found.activation_norms == pytest.approx((5.0, expected))
    # Not centred, the sum of squares is that of the variance and of the mean: 4.5 + 0.5 + 2.
    raw = pca_of(source, centred=False)
    assert sum(raw.variance) == pytest.approx(7.0)
    assert torch.equal(raw.mean, found.mean)


@pytest.mark.parametrize("centred", [True, False])
def test_equals_the_svd_of_the_stacked_matrix(pair, unpacked, centred):
    found = difference_pca(pair, unpacked, n_components=16, centred=centred, batch_size=3)
    x = pair.rows(unpacked).double()
    delta = x[:, 1] - x[:, 0]
    if centred:
        delta = delta - delta.mean(dim=0)
    _, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    assert found.variance == pytest.approx((S**2 / len(delta)).tolist(), rel=1e-4)
    assert sum(found.variance_ratio) == pytest.approx(1.0)
    # Up to sign, of which ours makes the largest entry positive.
    for ours, theirs in zip(found.components, Vh, strict=True):
        largest = ours.abs().argmax()
        assert ours[largest] > 0
        sign = theirs[largest].sign()
        torch.testing.assert_close(ours.double(), sign * theirs, rtol=1e-4, atol=1e-5)


def test_the_order_of_the_sites_changes_the_mean_alone(pairs, unpacked):
    forth = difference_pca(pairs["hooked"], unpacked)
    back = difference_pca(pairs["hooked"].comparing("finetuned", "base"), unpacked)
    torch.testing.assert_close(forth.components, back.components)
    assert torch.equal(forth.mean, -back.mean)


def test_a_saved_pca_is_the_same(pairs, unpacked, tmp_path):
    saved = difference_pca(pairs["hooked"], unpacked, n_components=3)
    loaded = DifferencePCA.load(saved.save(tmp_path / "pca.json"))
    assert loaded.facts() == saved.facts()
    assert torch.equal(loaded.components, saved.components)
    assert torch.equal(loaded.mean, saved.mean)


def test_edits_are_those_of_other_directions(pairs, unpacked):
    pair = pairs["hooked"]
    found, ctx = difference_pca(pair, unpacked, n_components=3), InterventionContext.of(pair)
    assert found.which() == (0, 1, 2, "mean")
    edit = found.steering(ctx, 1, strength=2.0)
    torch.testing.assert_close(edit.vector, 2 * found.activation_norms[1] * found.components[1])
    replaced = found.projection_replacement(ctx, "mean")
    assert torch.equal(replaced.directions, found.mean[None])
    settings = ControlSettings(n_random=1, alphas=(-1.0,))
    trials = [t for which in (2, "mean") for t in found.trials(ctx, which, settings=settings)]
    assert [t.name for t in trials] == ["PC 2", "PC 2", "ADL, mean", "ADL, mean"]


def test_nothing_to_decompose_is_refused(pairs, unpacked):
    with pytest.raises(ValueError, match="is the same vector at all"):
        difference_pca(pairs["equal"], unpacked)
    shifted = given([[1, 2], [1, 2]], base=[0.0, 0.0])
    with pytest.raises(ValueError, match="is the same vector at all 2"):
        pca_of(shifted)
    assert pca_of(shifted, centred=False).variance == pytest.approx((5.0, 0.0))
    with pytest.raises(ValueError, match="1 to 16"):
        difference_pca(pairs["hooked"], unpacked, n_components=17)
    found = difference_pca(pairs["hooked"], unpacked, n_components=2)
    with pytest.raises(ValueError, match="no component 2"):
        found.direction(2)
