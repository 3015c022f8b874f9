from contextlib import contextmanager
from typing import cast

import pytest
import torch
from models.tiny_pairs import D_MODEL, D_VOCAB, KINDS, TEXTS, hooked_transformer

from tl_crosscoder import Crosscoder, ModelPair
from tl_crosscoder.analysis.lens import (
    LogitEffects,
    Readout,
    direction_logits,
    logit_effect,
    n_tokens,
)
from tl_crosscoder.analysis.patchscope import Patchscope, patchscope
from tl_crosscoder.crosscoder.config import CrosscoderConfig
from tl_crosscoder.models.tokenizer import token_text

NORMS = ["LN", "LNPre", "RMS", "RMSPre", None]
LAST = "blocks.2.hook_resid_post"


def random_rows(n: int, d: int = D_MODEL, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def final_norm(model):
    return getattr(model, "ln_final", torch.nn.Identity())


@contextmanager
def learned_norm(model):
    """A final norm with a scale and a bias that training could have left; as it was afterwards."""
    parameters = list(final_norm(model).parameters())
    before = [p.detach().clone() for p in parameters]
    for seed, p in enumerate(parameters):
        p.data += 0.5 * random_rows(1, len(p), seed=seed)[0]
    try:
        yield
    finally:
        for p, old in zip(parameters, before, strict=True):
            p.data = old


def assert_readout_is_the_derivative(model):
    """J d at streams x with <x, d> = 0 and mean 0, where neither RMS nor mean varies along d.

    There the norm's derivative along d is scale * d / rms(x), whichever norm it is.
    """
    d = random_rows(3)
    ones = torch.ones_like(d)
    basis = torch.linalg.qr(torch.stack([d, ones], dim=-1)).Q
    x = 100 * random_rows(3, seed=1)
    x = x - (basis @ (basis.mT @ x[..., None]))[..., 0]
    norm = final_norm(model)
    _, found = torch.autograd.functional.jvp(lambda x: model.unembed(norm(x[None]))[0], x, d)
    along = cast(torch.Tensor, found)
    if not isinstance(norm, torch.nn.Identity):
        along = along * x.square().mean(dim=-1, keepdim=True).sqrt()
    expected = along - along.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(Readout.of(model).logits(d), expected, rtol=1e-3, atol=1e-3)
    assert expected.std() > 0.1


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_readout_is_the_derivative_of_a_model(pairs, kind):
    model = pairs[kind].model("finetuned")
    with learned_norm(model):
        assert_readout_is_the_derivative(model)


@pytest.mark.parametrize("norm", NORMS)
def test_readout_is_the_derivative_of_every_norm(tokenizer, norm):
    model = hooked_transformer(tokenizer, 3, normalization_type=norm)
    with learned_norm(model):
        assert_readout_is_the_derivative(model)
        readout = Readout.of(model)
        assert readout.is_centring == (norm in ("LN", "LNPre"))
        scale = model.ln_final.w if norm in ("LN", "RMS") else torch.ones(D_MODEL)
        torch.testing.assert_close(readout.scale, scale.detach(), rtol=1e-5, atol=1e-5)


def test_readout_by_hand():
    W_U = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    readout = Readout(scale=torch.tensor([2.0, 1.0]), is_centring=True, W_U=W_U)
    # (3, 1) centred is (1, -1), scaled (2, -1), unembedded (2, -1, 3), whose mean is 4/3.
    expected = torch.tensor([[2.0, -7.0, 5.0]]) / 3
    torch.testing.assert_close(readout.logits(torch.tensor([[3.0, 1.0]])), expected)


def dictionary(pair: ModelPair, *, d_sae: int = 6) -> Crosscoder:
    made = Crosscoder(CrosscoderConfig(d_in=pair.d_in, d_sae=d_sae, sites=pair.sites))
    generator = torch.Generator().manual_seed(0)
    made.load_state_dict(
        {n: torch.randn(t.shape, generator=generator) for n, t in made.state_dict().items()}
    )
    return made


def test_effects_of_latents_are_those_of_their_rows(pair, tmp_path):
    crosscoder = dictionary(pair)
    found = logit_effect(pair, crosscoder, [4, 1], n=3)
    assert len(found.rows) == 3 * 2 * 2 * 3
    base, finetuned = (crosscoder.decoder(name)[[4, 1]] for name in ("base", "finetuned"))
    rows = {"base": base, "finetuned": finetuned, "difference": finetuned - base}
    for direction, d in rows.items():
        model = pair.model("base" if direction == "base" else "finetuned")
        logits = Readout.of(model, d_vocab=n_tokens(pair)).logits(d)
        for i, latent in enumerate([4, 1]):
            order = logits[i].argsort()
            for is_promoted, best in ((True, order.flip(0)[:3]), (False, order[:3])):
                chosen = [
                    r
                    for r in found.rows
                    if (r.latent, r.direction, r.is_promoted) == (latent, direction, is_promoted)
                ]
                assert [r.rank for r in chosen] == [1, 2, 3]
                assert [r.token_id for r in chosen] == best.tolist()
                torch.testing.assert_close(torch.tensor([r.logit for r in chosen]), logits[i, best])
    own = direction_logits(pair, finetuned, site="finetuned", n=3)
    assert [r.logit for r in own.rows] == pytest.approx(
        [r.logit for r in found.rows if r.direction == "finetuned"]
    )
    assert LogitEffects.load(found.save(tmp_path / "effects.json")) == found


def test_a_difference_dictionary_has_one_direction(pairs):
    difference = pairs["llama"].difference()
    crosscoder = Crosscoder(CrosscoderConfig(d_in=D_MODEL, d_sae=4, sites=difference.sites))
    crosscoder.load_state_dict(
        {n: random_rows(t.numel(), 1).reshape(t.shape) for n, t in crosscoder.state_dict().items()}
    )
    found = logit_effect(difference, crosscoder, [2], n=2)
    expected = direction_logits(pairs["llama"], crosscoder.decoder(0)[[2]], n=2)
    assert {r.direction for r in found.rows} == {"difference"}
    assert [r.token_id for r in found.rows] == [r.token_id for r in expected.rows]


def test_no_token_beyond_the_tokenizers(pairs):
    pair = pairs["llama"]
    n = n_tokens(pair)
    assert n == len(pair.tokenizer) < D_VOCAB
    found = direction_logits(pair, random_rows(1), n=n)
    assert {r.token_id for r in found.rows} == set(range(n))


def test_tokens_keep_their_space(taboo_pair):
    ids = taboo_pair.encode("The telescope", prepend_bos=False)
    assert [token_text(taboo_pair.tokenizer, i) for i in ids] == ["The", " telescope"]
    assert token_text(taboo_pair.tokenizer, 0).startswith("<|")


def test_patchscope_is_the_mean_of_runs_with_a_patch(pair, tmp_path):
    directions, scales = random_rows(2), (0.5, -3.0)
    found = patchscope(pair, directions, scales=scales, prompts=TEXTS, n=3, batch_size=3)
    x = pair.activations(pair.to_tokens(TEXTS[1]))[0, :, 1]
    norms = [pair.activations(pair.to_tokens(t))[0, 1:, 1].norm(dim=-1) for t in TEXTS]
    assert found.activation_norm == pytest.approx(torch.cat(norms).mean().item(), rel=1e-4)
    assert found.activation_norm != pytest.approx(x.norm(dim=-1).mean().item(), rel=1e-3)
    before = mean_probability(pair, None)
    for i, d in enumerate(directions):
        for scale in scales:
            put = scale * found.activation_norm * d / d.norm()
            p = mean_probability(pair, put)
            gain = (p - before)[: n_tokens(pair)]
            rows = [r for r in found.rows if (r.direction, r.scale) == (i, scale)]
            assert [r.token_id for r in rows] == gain.topk(3).indices.tolist()
            for r in rows:
                ratio = (p[r.token_id] / before[r.token_id]).log().item()
                values = (r.probability, r.unpatched_probability, r.log_ratio)
                naive = (p[r.token_id].item(), before[r.token_id].item(), ratio)
                assert values == pytest.approx(naive, rel=1e-2, abs=1e-6)
    assert Patchscope.load(found.save(tmp_path / "patchscope.parquet")) == found


def mean_probability(pair: ModelPair, put: torch.Tensor | None) -> torch.Tensor:
    """One prompt after the other, through the pair's own patching."""
    found = []
    for text in TEXTS:
        tokens = pair.to_tokens(text)

        def patch(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            if put is not None:
                x[:, -1] = put
            return x

        logits = pair.run_with_patch(tokens, patch)
        found.append(logits[0, -1].softmax(dim=-1))
    return torch.stack(found).mean(dim=0)


def test_at_the_last_hook_both_lenses_are_one(pairs):
    """No layer is left: the logits are the direct effect over the RMS, whatever length is put."""
    pair = ModelPair(*pairs["llama"].models, hook_name=LAST)
    d = random_rows(1)
    readout = Readout.of(pair.model("finetuned"))
    rms = d.square().mean().sqrt()
    expected = (readout.logits(d)[0] / rms).softmax(dim=-1)
    found = patchscope(pair, d, scales=(0.5, 2.0), n=4)
    for r in found.rows:
        assert r.probability == pytest.approx(expected[r.token_id].item(), rel=1e-3, abs=1e-6)


def test_refusals_name_what_is_valid(pairs):
    pair, d = pairs["llama"], random_rows(2)
    crosscoder = dictionary(pair)
    with pytest.raises(ValueError, match=r"latents \[6\].*0 to 5"):
        logit_effect(pair, crosscoder, [6])
    with pytest.raises(ValueError, match="site 'chat' is not in this pair"):
        logit_effect(pair.comparing("base", "chat"), crosscoder, [1])
    with pytest.raises(ValueError, match="the dictionary was trained on"):
        logit_effect(pairs["qwen3"], crosscoder, [1])
    with pytest.raises(ValueError, match=r"width 9 cannot be unembedded.*d_model=16"):
        direction_logits(pair, random_rows(2, 9))
    with pytest.raises(ValueError, match="n=0 tokens of each kind"):
        direction_logits(pair, d, n=0)
    with pytest.raises(ValueError, match="width 9 do not fit the hook, which is 16 wide"):
        patchscope(pair, random_rows(2, 9))
    with pytest.raises(ValueError, match=r"\[1\] of them zero"):
        patchscope(pair, d * torch.tensor([[1.0], [0.0]]))
    with pytest.raises(ValueError, match="0 scales"):
        patchscope(pair, d, scales=())
    with pytest.raises(ValueError, match="at least two tokens"):
        patchscope(pair, d, prompts=["", "A dog"])
