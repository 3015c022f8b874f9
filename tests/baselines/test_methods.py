"""Weight difference, frozen SAE, Diff Mining and telling texts, each against a naive way."""

from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from models.tiny_pairs import HOOK
from sae_lens import StandardSAE, StandardSAEConfig

from tl_crosscoder import ModelPair
from tl_crosscoder.baselines.frozen_sae import sae_directions
from tl_crosscoder.baselines.generations import Generations, generations, prefills
from tl_crosscoder.baselines.mining import DiffMining, diff_mining
from tl_crosscoder.baselines.weights import weight_directions


def test_directions_of_weights_are_those_that_were_trained_below_the_hook(pairs):
    """Rank one is added to two matrices, with sizes 3 and 2; above the hook it does not count."""
    base = pairs["hooked"].model("base")
    finetuned, e = deepcopy(base), torch.eye(16)
    with torch.no_grad():
        finetuned.blocks[0].attn.W_O[0, 0] += 3 * e[5]
        finetuned.blocks[1].mlp.W_out[0] += 2 * e[7]
        finetuned.blocks[2].mlp.W_out[0] += 9 * e[1]

    def directions(hook_name, n):
        pair = ModelPair(base, finetuned, hook_name=hook_name, model_names=("a", "b"))
        return weight_directions(pair, n=n)

    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(directions(HOOK, 2), e[[5, 7]], **close)
    torch.testing.assert_close(directions("blocks.1.hook_resid_pre", 1), e[[5]], **close)
    with pytest.raises(ValueError, match=r"'blocks\.1\.hook_mlp_out' is not on the residual"):
        directions("blocks.1.hook_mlp_out", 1)
    with pytest.raises(ValueError, match=r"the weights below 'blocks\.0\.hook_resid_pre' are the"):
        directions("blocks.0.hook_resid_pre", 1)


def test_directions_of_weights_of_either_kind_of_model(pair):
    rows = weight_directions(pair, n=4)
    assert rows.shape == (4, pair.sites[0].d_model)
    torch.testing.assert_close(rows @ rows.T, torch.eye(4), rtol=0, atol=1e-4)


def test_a_frozen_sae_ranks_what_the_fine_tune_moves(pairs, unpacked, tmp_path):
    pair = pairs["hooked"]
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=6, apply_b_dec_to_input=False))
    sae.W_enc.data = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    sae.b_enc.data[2] = -1e9  # never active
    sae.W_dec.data = (sae.W_enc.data * torch.tensor([1.0, 5, 1, 1, 1, 1])).T.contiguous()
    sae.save_model(tmp_path / "sae")
    found = sae_directions(pair, tmp_path / "sae", unpacked, n=6)
    x = pair.activations(unpacked.tokens)[unpacked.mask]
    f0, f1 = (torch.relu(x[:, i] @ sae.W_enc + sae.b_enc) for i in (0, 1))
    movement = (f1 - f0).abs().sum(dim=0) * sae.W_dec.norm(dim=1)
    order = movement.argsort(descending=True)[:5]
    torch.testing.assert_close(found, sae.W_dec[order].detach())
    StandardSAE(StandardSAEConfig(d_in=8, d_sae=6)).save_model(tmp_path / "other")
    with pytest.raises(ValueError, match="reads 8 numbers, but the activation"):
        sae_directions(pair, tmp_path / "other", unpacked, n=6)
    with pytest.raises(FileNotFoundError, match="holds no SAE"):
        sae_directions(pair, tmp_path, unpacked, n=6)


def test_mined_tokens_are_those_of_a_naive_count(pair, unpacked, tmp_path):
    found = diff_mining(pair, unpacked, n_largest=3, batch_size=3)
    base, finetuned = (pair.logits(unpacked.tokens, site=s).float() for s in ("base", "finetuned"))
    rises: dict[int, list[float]] = {}
    for i, n in enumerate(unpacked.lengths.tolist()):
        for d in (finetuned - base)[i, :n]:
            for j in d.argsort(descending=True)[:3].tolist():
                rises.setdefault(j, []).append(d[j].item())
    most, first = max(len(each) for each in rises.values()), found.rows[0]
    assert first.mined_share == most / int(unpacked.lengths.sum())
    assert len(rises[first.token_id]) == most
    assert first.mined_rise == pytest.approx(sum(rises[first.token_id]) / most, rel=1e-4)
    assert DiffMining.load(found.save(tmp_path / "mined.json")) == found
    assert str(found).startswith("Diff Mining: tokens among the 3 that the fine-tune raises")


def test_texts_are_ranked_by_how_unlikely_the_base_finds_them(pair, unpacked, tmp_path):
    beginnings = prefills(unpacked, pair, n=5, length=2)
    assert beginnings == prefills(unpacked, pair, n=5, length=2)
    texts = [row[:n].tolist() for row, n in zip(unpacked.tokens, unpacked.lengths, strict=True)]
    for start in beginnings:
        two = tuple(start[len(pair.encode("")) :])
        assert any(two in pairwise(text) for text in texts)
    options = {"max_new_tokens": 4, "temperature": 0.0}
    found, differences = generations(pair, beginnings, **options), []
    for start, new in pair.generate_tokens(beginnings, max_new_tokens=4):
        tokens, at = torch.tensor([[*start, *new]]), range(len(start) - 1, len(start + new) - 1)
        base, finetuned = (
            pair.logits(tokens, site=site)[0].log_softmax(-1) for site in ("base", "finetuned")
        )
        each = [(finetuned[i, j] - base[i, j]).item() for i, j in zip(at, new, strict=True)]
        differences += [sum(each) / len(each)] if each else []
    expected = pytest.approx(sorted(differences, reverse=True), abs=1e-4)
    assert [row.log_ppl_difference for row in found.rows] == expected
    assert Generations.load(found.save(tmp_path / "texts.json")) == found
    amplified = generations(pair, beginnings, alpha=3.0, **options)
    assert "What amplified logits (alpha 3) writes" in str(amplified)
    with pytest.raises(ValueError, match="no context of this text has more than 99 tokens"):
        prefills(unpacked, pair, length=99)
