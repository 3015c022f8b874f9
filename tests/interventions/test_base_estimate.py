import ast
import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from models.given_rows import GivenRows
from models.tiny_pairs import HOOK, TEXTS
from safetensors.torch import load_file

from tl_crosscoder import ModelPair
from tl_crosscoder.interventions.base_estimate import BaseEstimate, EstimateLoss
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.live import ablated
from tl_crosscoder.interventions.mitigation import Mitigation, export_mitigation, measure_estimate
from tl_crosscoder.interventions.standalone_hook import mitigated

LATENTS = [1, 4, 7]


def loaded(folder):
    """The exported file, as a module of its own that needs nothing of ours."""
    path = folder / "hook.py"
    imported = {
        getattr(node, "module", None) or node.names[0].name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    ours = {"json", "collections.abc", "pathlib", "typing", "torch", "safetensors.torch"}
    assert imported == ours
    spec = importlib.util.spec_from_file_location("exported_hook", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(folder)


def test_a_line_through_two_values_by_hand(words):
    # Half the tokens have x^1 = 1 and x^0 = 3, half 3 and 7. Means 2 and 5, C_11 = 1, C_10 = 2.
    # The mean variance is 1, so ridge 0.25 gives A = 2 / 1.25 = 1.6 and c = 5 - 2 x 1.6 = 1.8.
    text = words[0][:2]
    finetuned = torch.cat([torch.tensor([1.0, 3.0]).repeat(8), torch.tensor([3.0, 1.0]).repeat(8)])
    rows = torch.stack([2 * finetuned + 1, finetuned], dim=1)[..., None]
    source = GivenRows(rows.unflatten(0, (-1, 16)))
    n = text.n_tokens
    assert n % 2 == 0
    estimate = BaseEstimate.fit(source, text, ridge=0.25)
    mean = source.rows(text)[:, 1].mean().item()
    assert (mean, n) == (2.0, estimate.n_tokens)
    assert estimate.weight.item() == pytest.approx(1.6)
    assert estimate.bias.item() == pytest.approx(1.8)
    # It says 3.4 and 6.6 for 3 and 7: errors 0.4 of deviations 2, so FVE 1 - 0.16 / 4 = 0.96; the
    # difference -(x^1 + 1) deviates by 1, so 1 - 0.16 = 0.84.
    quality = estimate.quality(source, text)
    assert quality.fve == {"base": pytest.approx(0.96)}
    assert quality.difference_fve == pytest.approx(0.84)


def test_almost_without_ridge_it_is_least_squares(pairs, words):
    pair, (training, held_out) = pairs["llama"], words
    estimate = BaseEstimate.fit(pair, training, ridge=1e-9, batch_size=7)
    x = pair.rows(training).double().numpy()
    design = np.concatenate([x[:, 1], np.ones((len(x), 1))], axis=1)
    solution = np.linalg.lstsq(design, x[:, 0], rcond=None)[0]
    np.testing.assert_allclose(estimate.weight, solution[:-1], atol=1e-4)
    np.testing.assert_allclose(estimate.bias, solution[-1], atol=1e-4)
    quality = estimate.quality(pair, held_out)
    y = pair.rows(held_out).double().numpy()
    error = y[:, 0] - (y[:, 1] @ solution[:-1] + solution[-1])
    difference = y[:, 1] - y[:, 0]
    for found, of in ((quality.fve["base"], y[:, 0]), (quality.difference_fve, difference)):
        expected = 1 - (error**2).sum() / ((of - of.mean(axis=0)) ** 2).sum()
        assert found == pytest.approx(expected, abs=1e-5)
    assert quality.n_tokens == len(y)


def test_a_saved_estimate_is_loaded_equal(pairs, words, tmp_path):
    estimate = BaseEstimate.fit(pairs["hooked"].comparing("finetuned", "base"), words[0])
    found = BaseEstimate.load(estimate.save(tmp_path / "estimate"))
    assert torch.equal(found.weight, estimate.weight)
    assert torch.equal(found.bias, estimate.bias)
    names = ("sites", "base", "finetuned", "ridge", "n_tokens")
    assert all(getattr(found, n) == getattr(estimate, n) for n in names)
    assert (found.base, found.finetuned) == (1, 0)
    with pytest.raises(FileNotFoundError, match="holds no estimate of the base activation"):
        BaseEstimate.load(tmp_path)
    (tmp_path / "estimate" / "base_estimate.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged estimate"):
        BaseEstimate.load(tmp_path / "estimate")


@pytest.mark.parametrize("kind", ["pair", "difference", "sites", "subtracting"])
def test_folded_codes_are_those_of_the_estimated_streams(
    pairs, folders, words, make_crosscoder, kind
):
    models = pairs["llama"]
    if kind == "sites":
        models = ModelPair.from_pretrained(
            *folders["llama"], hook_name=["blocks.0.hook_resid_post", HOOK]
        )
    elif kind == "difference":
        models = models.difference()
    made = make_crosscoder(models, apply_b_dec_to_input=kind == "subtracting")
    ctx = InterventionContext.of(models, made)
    estimate = BaseEstimate.fit(models, words[0])
    x = ctx.acts(torch.arange(5), words[1][:5]).x[ctx.finetuned]
    parts = estimate(x)
    assert torch.equal(parts[ctx.finetuned], x)
    rows = torch.cat(parts, dim=-1)
    if kind == "difference":
        rows = x - parts[ctx.base]
    expected = made.encode(rows).detach()[..., LATENTS]
    expected[:, 0] = 0
    mitigation = Mitigation.of(ctx, LATENTS, estimate=estimate)
    assert (expected > 0).any(dim=(0, 1)).all()
    torch.testing.assert_close(mitigation.codes(x), expected, rtol=1e-4, atol=1e-4)


def test_a_mitigation_by_hand():
    # One latent: p = x_0 - 1, threshold 1.5, v = (1, 10). Tokens with x_0 = 9, 2, 4: p = 8, 1, 3,
    # so f = 8, 0, 3, but none at position 0: (9, 0), (2, 0), (4 - 3, 0 - 30).
    tensors = {
        "encoder": torch.tensor([[1.0], [0.0]]),
        "bias": torch.tensor([-1.0]),
        "threshold": torch.tensor([1.5]),
        "directions": torch.tensor([[1.0, 10.0]]),
    }
    x = torch.tensor([[[9.0, 0.0], [2.0, 0.0], [4.0, 0.0]]])
    assert mitigated(x, tensors).tolist() == [[[9.0, 0.0], [2.0, 0.0], [1.0, -30.0]]]
    # Alone, as a new token beside a cache, each is edited: 9 - 8 = 1 and 0 - 80.
    assert mitigated(x[:, :1], tensors).tolist() == [[[1.0, -80.0]]]


@pytest.mark.parametrize("mode", ["delta", "zero", "project"])
def test_the_exported_hook_does_what_the_context_does(pair, crosscoder, words, tmp_path, mode):
    ctx = InterventionContext.of(pair, crosscoder)
    estimate = None if mode == "project" else BaseEstimate.fit(pair, words[0])
    export_mitigation(tmp_path, ctx, LATENTS, mode=mode, estimate=estimate)
    tokens, model = pair.to_tokens(TEXTS), pair.model("finetuned")
    hook = loaded(tmp_path)
    assert hook[0] == HOOK
    plain = pair.logits(tokens)
    with torch.no_grad():
        found = model.run_with_hooks(tokens, fwd_hooks=[hook])
    assert (found - plain).abs().max() > 0.02
    with ablated(pair, crosscoder, LATENTS, mode=mode, estimate=estimate) as handle:
        torch.testing.assert_close(handle.logits(tokens), found, rtol=1e-5, atol=1e-5)
        options = {"max_new_tokens": 5, "stop_token_ids": ()}
        cached = handle.generate_tokens(TEXTS, **options)
        assert cached == handle.generate_tokens(TEXTS, use_past_kv_cache=False, **options)
    assert cached == pair.generate_tokens(TEXTS, fwd_hooks=[hook], **options)
    assert torch.equal(pair.logits(tokens), plain)
    with pytest.raises(ValueError, match="is not an empty folder"):
        export_mitigation(tmp_path, ctx, LATENTS, mode=mode, estimate=estimate)
    with pytest.raises(ValueError, match="is 4 wide, but the mitigation is for 16"):
        hook[1](torch.zeros(1, 3, 4))


def test_an_estimate_that_is_right_loses_nothing(pairs, words, make_crosscoder, tmp_path):
    # Two models of the same weights: x^0 = x^1, which is affine.
    pair, (training, held_out) = pairs["equal"], words
    ctx = InterventionContext.of(pair, make_crosscoder(pair))
    estimate = BaseEstimate.fit(pair, training, ridge=1e-10)
    found = measure_estimate(ctx, estimate, held_out, latents=[*LATENTS, 3])
    # Only BOS inside a context, which has no codes, is edited by the hook.
    assert found.base_fve == pytest.approx(1, abs=1e-5)
    inner_bos = int((held_out.tokens[:, 1:] == pair.tokenizer.bos_token_id).sum())
    for row in found.rows[:-1]:
        assert row.n_exact == row.n_both > 0
        assert 0 <= row.n_estimated - row.n_exact <= inner_bos
    assert found.rows[-1].n_exact == found.rows[-1].n_estimated == 0
    assert np.isnan(found.rows[-1].agreement)
    # A text without BOS inside.
    alone = held_out[(held_out.tokens[:, 1:] != pair.tokenizer.bos_token_id).all(dim=1)]
    assert len(alone)
    exact = measure_estimate(ctx, estimate, alone, latents=LATENTS, mode="zero")
    assert exact.shift_error < 1e-6
    assert exact.kl < 1e-5 < exact.kl_of_ablation
    saved = EstimateLoss.load(exact.save(tmp_path / "loss.json"))
    assert saved.rows == exact.rows
    assert saved.kl == exact.kl
    folder = export_mitigation(
        tmp_path / "mitigation", ctx, LATENTS, mode="zero", estimate=estimate, loss=exact
    )
    with pytest.raises(ValueError, match=r"loss was measured for \('zero', \[1, 4, 7\]\), but"):
        export_mitigation(tmp_path / "other", ctx, [1], estimate=estimate, loss=exact)
    assert not (tmp_path / "other").exists()
    facts = json.loads((folder / "mitigation.json").read_text())
    assert facts["loss"]["kl"] == exact.kl
    assert facts["loss"]["latents"]["n_both"] == [row.n_both for row in exact.rows]
    assert load_file(folder / "mitigation.safetensors")["encoder"].shape == (16, 3)


def test_losses_are_those_of_comparing_token_by_token(pairs, words, make_crosscoder):
    pair, (training, held_out) = pairs["hooked"], words
    made = make_crosscoder(pair)
    ctx, text = InterventionContext.of(pair, made), held_out[:6]
    estimate = BaseEstimate.fit(pair, training)
    found = measure_estimate(ctx, estimate, text, latents=LATENTS, batch_size=4)
    acts = ctx.acts(torch.arange(6), text)
    x0, x1 = acts.x
    exact = made.encode(torch.stack([x0, x1], dim=2)).detach()[..., LATENTS]
    exact[~acts.counted] = 0
    guessed = made.encode(torch.cat(estimate(x1), dim=-1)).detach()[..., LATENTS]
    guessed[:, 0] = 0
    both, either = (exact > 0) & (guessed > 0), (exact > 0) | (guessed > 0)
    for i, row in enumerate(found.rows):
        assert row.n_both == both[..., i].sum()
        assert row.agreement == pytest.approx((both[..., i].sum() / either[..., i].sum()).item())
    v = ctx.difference[LATENTS]
    error, size = ((c @ v).square().sum().item() for c in (exact - guessed, exact))
    assert found.shift_error == pytest.approx(error / size, rel=1e-4)
    assert found.n_tokens == text.tokens.numel()
    tokens = text.tokens.long()
    with ablated(pair, made, LATENTS) as handle:
        p = handle.logits(tokens)[:, :-1].log_softmax(dim=-1)
    with ablated(pair, made, LATENTS, estimate=estimate) as handle:
        q = handle.logits(tokens)[:, :-1].log_softmax(dim=-1)
    kl = (p.exp() * (p - q)).sum(dim=-1).mean().item()
    assert found.kl == pytest.approx(kl, rel=1e-3)


def test_what_does_not_go_together_is_refused(pairs, words, make_crosscoder):
    pair = pairs["hooked"]
    ctx = InterventionContext.of(pair, make_crosscoder(pair))
    estimate = BaseEstimate.fit(pair, words[0])
    with pytest.raises(ValueError, match=r"delta needs codes.*BaseEstimate\.fit"):
        Mitigation.of(ctx, LATENTS, estimate=None)
    with pytest.raises(ValueError, match="of no use to it: leave it out"):
        Mitigation.of(ctx, LATENTS, mode="project", estimate=estimate)
    with pytest.raises(ValueError, match=r"fitted on the sites .*random.*Fit another"):
        Mitigation.of(
            InterventionContext.of(pairs["llama"], make_crosscoder(pairs["llama"])),
            LATENTS,
            estimate=estimate,
        )
    with pytest.raises(ValueError, match=r"estimate is for \(base, finetuned\) = \('finetuned',"):
        Mitigation.of(ctx, LATENTS, estimate=replace(estimate, base=1, finetuned=0))
    with pytest.raises(ValueError, match=r"ridge is 0; it must be above 0"):
        BaseEstimate.fit(pair, words[0], ridge=0)
    one = ModelPair(pair.models[0], sites=[pair.sites[0]])
    with pytest.raises(ValueError, match=r"this needs two sites of one width"):
        BaseEstimate.fit(one, words[0])
    with pytest.raises(ValueError, match="there are no latents"):
        measure_estimate(ctx, estimate, words[1], latents=[])
