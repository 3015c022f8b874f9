import pytest
import torch
from models.given_rows import GivenRows
from text_of_ids import text_of

from tl_crosscoder.baselines.pca import DifferencePCA, difference_pca
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.trials import ControlSettings


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
