import pytest
import torch
from models.tiny_pairs import TEXTS

from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.latent_edits import activation_norms, steering
from tl_crosscoder.interventions.live import steered


@pytest.fixture
def ctx(pair, crosscoder):
    return InterventionContext.of(pair, crosscoder)


def test_norms_are_means_over_the_tokens_that_count(pair, words):
    text = words[1][:6]
    found = activation_norms(pair, text, batch_size=4)
    x = pair.activations(text.tokens)
    for i, name in enumerate(("base", "finetuned")):
        norms = [
            x[c, p, i].norm().item() for c, p in text.mask.nonzero().tolist()
        ]  # BOS and position 0 are left out
        assert found[name] == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    only_first = text.cut(1)
    with pytest.raises(ValueError, match="no token of the text counts"):
        activation_norms(pair, only_first)


def test_strength_is_in_units_of_the_norm_by_hand(ctx):
    # d = (3, 4, 0, ...) has length 5; half of a norm of 20 is 10, so 10 / 5 d = (6, 8, 0, ...).
    d = torch.zeros(16)
    d[:2] = torch.tensor([3.0, 4.0])
    edit = steering(ctx, d, strength=0.5, norm=20.0, site="base")
    assert edit.vector[:3].tolist() == [6.0, 8.0, 0.0]
    assert (edit.site, edit.stream) == (0, 0)
    # The length of the direction does not matter, its sign does.
    assert torch.equal(
        steering(ctx, -7 * d, strength=-0.5, norm=20.0, site="base").vector, edit.vector
    )


def test_the_direction_of_a_latent_is_the_row_that_is_asked_for(ctx):
    base, finetuned = (ctx.decoder(i)[4] for i in (0, 1))
    rows = {None: finetuned, "finetuned": finetuned, "base": base, "difference": finetuned - base}
    for site in ("base", "finetuned"):
        for of, row in rows.items():
            edit = steering(ctx, 4, strength=2.0, norm=3.0, site=site, of=of)
            torch.testing.assert_close(edit.vector, 6 * row / row.norm())
            assert edit.site == ("base", "finetuned").index(site)


@pytest.mark.parametrize("site", ["base", "finetuned"])
def test_a_steered_model_goes_on_from_the_shifted_stream(pair, ctx, site):
    tokens = pair.to_tokens(TEXTS)
    before = pair.logits(tokens, site=site)
    v = ctx.decoder(1)[4]
    v = 1.5 * 2.0 * v / v.norm()
    expected = pair.run_with_patch(tokens, lambda x: x + v, site=site)
    options = {"max_new_tokens": 6, "stop_token_ids": ()}
    with steered(ctx, 4, strength=1.5, norm=2.0, site=site) as handle:
        torch.testing.assert_close(handle.logits(tokens), expected, rtol=1e-5, atol=1e-5)
        found = handle.generate_tokens(TEXTS, **options)
        assert found == handle.generate_tokens(TEXTS, use_past_kv_cache=False, **options)
    assert torch.equal(pair.logits(tokens, site=site), before)
    naive = list(found[1][0])
    for _ in range(6):
        logits = pair.run_with_patch(torch.tensor([naive]), lambda x: x + v, site=site)
        naive.append(int(logits[0, -1].argmax()))
    assert naive == [*found[1][0], *found[1][1]]
    with steered(ctx, 4, strength=0.0, norm=2.0, site=site) as handle:
        assert torch.equal(handle.logits(tokens), before)


def test_what_is_no_direction_is_refused(pairs, make_crosscoder, ctx):
    options = {"strength": 1.0, "norm": 1.0}
    with pytest.raises(ValueError, match=r"the direction has length 0\.0, so it has no direction"):
        steering(ctx, torch.zeros(16), **options)
    difference = pairs["hooked"].difference()
    of_difference = InterventionContext.of(difference, make_crosscoder(difference))
    with pytest.raises(ValueError, match=r"base row of latent 2 has length 0\.0"):
        steering(of_difference, 2, of="base", **options)
    with pytest.raises(ValueError, match=r"shape \(5,\), but the site 'finetuned' is 16 wide"):
        steering(ctx, torch.ones(5), **options)
    with pytest.raises(ValueError, match="norm is 0; it is the mean norm"):
        steering(ctx, 2, strength=1.0, norm=0)
    with pytest.raises(ValueError, match="of='base' chooses a row of a latent"):
        steering(ctx, torch.ones(16), of="base", **options)
    with pytest.raises(ValueError, match=r"latents \[12\] are out of range"):
        steering(ctx, 12, **options)
    with pytest.raises(ValueError, match="this needs a dictionary"):
        steering(InterventionContext.of(pairs["hooked"]), 2, **options)
