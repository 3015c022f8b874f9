"""Groups of contexts and latents: planted ones are found, noise is none."""

import pytest
import torch

from tl_crosscoder.interventions.attribution import attribution
from tl_crosscoder.interventions.behaviour import Predictions
from tl_crosscoder.interventions.changes import _chosen, _parts, factorised, find_changes, matched


def planted(n: int) -> torch.Tensor:
    """40 contexts x 30 latents: each change has latents of its own and a share of the contexts."""
    generator = torch.Generator().manual_seed(0)
    W = torch.zeros(40, n)
    W[torch.arange(40), torch.randint(n, (40,), generator=generator)] = 1.0
    W *= 1 + torch.rand(40, 1, generator=generator)
    H = torch.zeros(n, 30)
    for c in range(n):
        H[c, 5 * c : 5 * c + 5] = torch.rand(5, generator=generator) + 0.2
    return W @ H + 0.003 * torch.rand(40, 30, generator=generator)


@pytest.mark.parametrize("n", [1, 3])
def test_planted_changes_are_found_in_their_number(n):
    A = planted(n)
    factors, agreements = _chosen(A, most=4, seed=0)
    assert factors is not None
    W, H = factors
    assert len(H) == n
    assert agreements[n - 1] > 0.95
    # Parts add up to the whole, and those of a change are of its own latents.
    parts = _parts(A, W, H)
    torch.testing.assert_close(parts.sum(dim=0), A.double())
    owners = parts.sum(dim=1).argmax(dim=0)[: 5 * n].view(n, 5)
    assert all(len(row.unique()) == 1 for row in owners)
    assert len(owners[:, 0].unique()) == n


def test_what_is_not_found_again_is_no_change():
    # Every context has a latent of its own: halves have nothing in common.
    assert _chosen(torch.eye(20), most=3, seed=0)[0] is None
    assert _chosen(torch.zeros(20, 0), most=3, seed=0) == (None, [])
    assert _chosen(torch.zeros(20, 4), most=3, seed=0) == (None, [])


def test_factors_are_not_negative_and_rows_are_matched_whatever_their_order():
    W, H = factorised(planted(3), 3)
    assert min(W.min(), H.min()) >= 0
    A = planted(3).double()
    torch.testing.assert_close(W @ H, A / A.max(), atol=0.05, rtol=0)
    torch.testing.assert_close(matched(H, H[[2, 0, 1]] * 3), torch.ones(3).double())


def test_changes_of_a_pair_have_texts_tokens_and_latents(taboo_pair, make_crosscoder, texts):
    crosscoder, predictions = make_crosscoder(taboo_pair), Predictions.of(texts[1][:8])
    found = attribution(taboo_pair, crosscoder, predictions)
    changes = find_changes(taboo_pair, crosscoder, predictions, found, most=1)
    assert len(changes.agreements) == 1
    for row in changes.rows:
        assert row.share > 0
        assert row.raised
        assert row.attributions == tuple(sorted(row.attributions, reverse=True))
        assert row.before
    assert type(changes).from_columns(changes.columns(), changes.about()) == changes
    other = Predictions.of(texts[1][:7])
    with pytest.raises(ValueError, match="give the predictions that it was computed on"):
        find_changes(taboo_pair, crosscoder, other, found)


def test_equal_models_have_no_change(null_pair, make_crosscoder, texts):
    crosscoder, predictions = make_crosscoder(null_pair), Predictions.of(texts[1][:2])
    found = attribution(null_pair, crosscoder, predictions)
    changes = find_changes(null_pair, crosscoder, predictions, found)
    assert changes.rows == ()
    assert changes.lines() == ["No change is found again over seeds and halves of the text."]
    assert "0 changes" in str(changes)
