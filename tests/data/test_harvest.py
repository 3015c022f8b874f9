"""Harvested rows, and the statistics that a harvest for a cache takes on the way."""

import json
from dataclasses import replace

import pytest
import torch
from models.tiny_pairs import HOOK

from tl_crosscoder import ModelPair
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


def test_activations_that_are_no_numbers_are_refused_or_left_out(small, write, tmp_path):
    """A token of a later shard overflows, with all that follow in its context."""
    names = ["tl_crosscoder/world-base"] * 2
    pair = ModelPair.from_pretrained(*names, hook_name=HOOK, dtype="float16")
    early, late = (set(part.flatten().tolist()) for part in small[0].tokens.split([24, 16]))
    with torch.no_grad():
        pair.models[1].W_E[min(late - early)] = torch.inf
    text, held_out = (replace(part, drops_nonfinite=True) for part in small)
    is_wrong = [~pair.activations(part.tokens).isfinite().all(-1).all(-1) for part in small]
    said = rf"NaN or infinite for [\d,]+ at 'base' \({HOOK}\).*in float16.*--on-nonfinite drop"
    with pytest.raises(ValueError, match=said):
        list(harvest_rows(pair, small[0]))
    rows = torch.cat([*harvest_rows(pair, text)])
    expected = pair.activations(text.tokens)[text.mask & ~is_wrong[0]]
    torch.testing.assert_close(rows, expected, atol=0.05, rtol=0.01)

    with pytest.raises(ValueError, match=said):
        write(pair, *small, tmp_path / "c")
    n_good = int((is_wrong[0] & text.mask).any(dim=1).nonzero()[0]) // 10  # contexts a shard
    assert len(json.loads((tmp_path / "c/manifest.json").read_text())["shards"]) == n_good >= 2
    cache = write(pair, text, held_out, tmp_path / "c", resume=True)
    assert torch.equal(cache.training.mask, text.mask & ~is_wrong[0])
    assert cache.manifest["mask_counts"]["nonfinite"] == sum(int(wrong.sum()) for wrong in is_wrong)
    assert bool(cache.rows(cache.text).isfinite().all())
