"""Harvested rows, and the statistics that a harvest for a cache takes on the way."""

import pytest
import torch

from tl_crosscoder.data.harvest import harvest, harvest_rows


def test_rows_are_the_kept_tokens_of_both_models(taboo_pair, texts):
    text = texts[0][:10]
    rows = torch.cat(list(harvest_rows(taboo_pair, text, batch_size=4)))
    expected = taboo_pair.activations(text.tokens)[text.mask]
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)
    assert sum(len(part.text) for part in harvest(taboo_pair, text, batch_size=4)) == 10


def test_pieces_of_a_batch_hold_whole_contexts_with_their_rows(taboo_pair, texts):
    (whole,) = harvest(taboo_pair, texts[0][:7], batch_size=7)
    pieces = [*whole.split(70)]  # two contexts of 32 each
    assert [len(piece.text) for piece in pieces] == [2, 2, 2, 1]
    assert [len(piece.rows) for piece in pieces] == [piece.text.n_tokens for piece in pieces]
    assert torch.equal(torch.cat([piece.rows for piece in pieces]), whole.rows)
    assert torch.equal(torch.cat([p.positions(32) for p in pieces]), whole.positions(32))
    assert len([*whole.split(1)]) == 7


def test_statistics_are_what_a_naive_loop_counts(taboo_pair, cache):
    statistics = cache.manifest["statistics"]
    text = cache.text
    every = taboo_pair.activations(text.tokens).double()
    kept = every[text.mask]
    assert statistics["n_tokens"] == len(kept)
    assert statistics["n_by_position"] == [len(text)] * text.context_size
    for i, name in enumerate(("base", "finetuned")):
        site = statistics["sites"][name]
        norms = every[:, :, i].norm(dim=2)
        assert site["mean_squared_norm"] == pytest.approx((kept[:, i] ** 2).sum(1).mean().item())
        assert site["norm_of_mean"] == pytest.approx(kept[:, i].mean(0).norm().item(), rel=1e-5)
        assert site["mean_norm_by_position"] == pytest.approx(norms.mean(0).tolist())
        is_sink = (norms > cache.manifest["sink_limits"][i]).double()
        assert site["sink_share"] == pytest.approx(is_sink[text.mask].mean().item())
        assert site["sink_share_by_position"] == pytest.approx(is_sink.mean(0).tolist())
    difference = (every[:, :, 1] - every[:, :, 0]).norm(dim=2)
    found = statistics["difference"]
    assert found["mean_norm_by_position"] == pytest.approx(difference.mean(0).tolist(), rel=1e-4)
    for i, role in enumerate(cache.manifest["roles"]):
        own = (text.role_ids == i) & (text.dropped != 1) & (text.dropped != 2)
        assert found["n_by_role"][role] == int(own.sum())
        expected = pytest.approx(difference[own].mean().item(), rel=1e-4) if own.any() else None
        assert found["mean_norm_by_role"][role] == expected
    assert cache.manifest["mask_counts"] == text.mask_counts
