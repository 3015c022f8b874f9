"""What latents carry of the change, against gradients and differences taken one at a time."""

from dataclasses import dataclass, replace

import pytest
import torch
from models.tiny_pairs import hooked_transformer

from tl_crosscoder import Behaviour, InterventionContext, ModelPair
from tl_crosscoder.config.causal import AttributionSettings
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.interventions.attribution import attribution
from tl_crosscoder.interventions.attribution_goals import KLToFinetuned, goal_of
from tl_crosscoder.interventions.attribution_result import Attribution
from tl_crosscoder.interventions.behaviour import Predictions, Question
from tl_crosscoder.interventions.edits import ReplaceActivation, TokenFilter, unchanged
from tl_crosscoder.interventions.waterfall import waterfall

ONE = AttributionSettings(n_steps=1)


@pytest.fixture
def text(words):
    return words[1][:4]


@pytest.fixture
def found(pair, crosscoder, text) -> Attribution:
    return attribution(pair, crosscoder, Predictions.of(text), keep_tokens=True)


def kl_at(pair, text, x, *, site="finetuned"):
    """KL(fine-tuned || patched) of a whole text, with gradients."""
    with torch.no_grad():
        log_p = pair.model(site)(text.tokens.long()).log_softmax(-1)
    with pair.patched(site, x) as model:
        log_q = model(text.tokens.long()).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[:, :-1]
    return kl[text.lengths[:, None] > torch.arange(1, kl.shape[1] + 1)].sum()


def naive_gradient(pair, text, n: int):
    """Mean of autograd's gradient at n midpoints, one point at a time."""
    x = pair.activations(text.tokens)
    base, finetuned = x[:, :, 0], x[:, :, 1]
    total = torch.zeros_like(base)
    for s in range(n):
        point = (base + (s + 0.5) / n * (finetuned - base)).requires_grad_()
        total += torch.autograd.grad(kl_at(pair, text, point), point)[0]
    return x, total / n


def test_each_latent_is_what_a_loop_over_latents_finds(pair, crosscoder, text, found):
    x, G = naive_gradient(pair, text, 4)
    codes = (crosscoder.encode(x) * text.mask[..., None]).detach()
    base, finetuned = (crosscoder.decoder(i).detach() for i in (0, 1))
    for j in range(12):
        own = -codes[..., j] * (G @ (finetuned - base)[j])
        for i, role in enumerate(ROLES):
            expected = own[text.role_ids == i].sum()
            torch.testing.assert_close(
                found.by_role[i, j].float(), expected, rtol=1e-3, atol=1e-4, msg=f"{j} {role}"
            )
        of_contexts = found.of_contexts(torch.tensor([j]))[:, 0]
        torch.testing.assert_close(of_contexts, own.sum(dim=1), rtol=1e-3, atol=1e-4)
    # The other terms, each by its own formula.
    biases = [crosscoder.decoder_bias(i).detach() for i in (0, 1)]
    errors = [x[:, :, 0] - codes @ base - biases[0], x[:, :, 1] - codes @ finetuned - biases[1]]
    bias = biases[1] - biases[0]
    by_token = {
        "latents": -((codes @ (finetuned - base)) * G).sum(-1) * text.mask,
        "error": -((errors[1] - errors[0]) * G).sum(-1) * text.mask,
        "bias": -(G @ bias) * text.mask,
        "masked": -((x[:, :, 1] - x[:, :, 0]) * G).sum(-1) * ~text.mask,
    }
    expected = torch.stack([each.sum(dim=1) for each in by_token.values()]).detach()
    torch.testing.assert_close(found.terms.float(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.tokens, by_token["latents"].detach(), rtol=1e-3, atol=1e-4)
    assert found.by_role.abs().max() > 0.05
    assert found.latents[3] == 0  # it never fires


def test_each_latent_is_the_slope_of_kl_along_what_it_adds(pairs, make_crosscoder, text):
    """Central differences at the points of the path: h + e f_j v_j against h - e f_j v_j."""
    pair = pairs["hooked"]
    crosscoder = make_crosscoder(pair)
    found = attribution(pair, crosscoder, Predictions.of(text))
    x = pair.activations(text.tokens)
    codes = (crosscoder.encode(x) * text.mask[..., None]).detach()
    v = (crosscoder.decoder(1) - crosscoder.decoder(0)).detach()
    e = 1e-2
    for j in found.ranking(2) + found.ranking()[-1:]:
        slopes = []
        for s in range(4):
            point = x[:, :, 0] + (s + 0.5) / 4 * (x[:, :, 1] - x[:, :, 0])
            step = e * codes[..., j, None] * v[j]
            with torch.no_grad():
                up, down = (kl_at(pair, text, point + sign * step) for sign in (1, -1))
            slopes.append((up - down).item())
        expected = -sum(slopes) / 4 / (2 * e)
        assert found.latents[j].item() == pytest.approx(expected, rel=0.02, abs=0.01)


def test_terms_add_up_to_the_change_and_better_with_more_steps(
    taboo_pair, make_crosscoder, texts
):  # spec: I3
    crosscoder, effect = make_crosscoder(taboo_pair), Predictions.of(texts[1][:6])
    found = {
        n: attribution(taboo_pair, crosscoder, effect, settings=AttributionSettings(n_steps=n))
        for n in (1, 3, 8)
    }
    residuals = [abs(each.residual) for each in found.values()]
    assert residuals[0] > 3 * residuals[1] > 6 * residuals[2]
    assert residuals[2] < 0.01 * found[8].change
    assert "residual " in found[8].line()
    base = attribution(taboo_pair, crosscoder, effect, settings=AttributionSettings(at_base=True))
    assert base.change == pytest.approx(found[1].change)
    assert abs(base.residual) > residuals[0]


@dataclass(eq=False, kw_only=True)
class LogitDifference(KLToFinetuned):
    """A difference of two logits, which is linear in what the unembedding reads."""

    unit: str = "logits"
    sign: float = 1.0

    def values(self, log_q, acts, reference):  # noqa: ARG002
        return log_q[:, 7] - log_q[:, 9]


def test_it_is_exact_where_all_above_the_hook_is_linear(pairs, make_crosscoder, text):
    """(w_7 - w_9) f_j v_j for a latent, in one step; no terms are left over."""
    both = pairs["hooked"].models
    hook = "ln_final.hook_normalized"
    pair = ModelPair(*both, hook_name=hook, model_names=("random", "random fine-tuned"))
    crosscoder = make_crosscoder(pair)
    kl = goal_of(Predictions.of(text))
    goal = LogitDifference(name="logits", text=text, every=kl.every)
    found = attribution(pair, crosscoder, goal, settings=ONE)
    codes = (crosscoder.encode(pair.activations(text.tokens)) * text.mask[..., None]).detach()
    w = both[1].ln_final.w * (both[1].W_U[:, 7] - both[1].W_U[:, 9])  # hooked before the weight
    v = (crosscoder.decoder(1) - crosscoder.decoder(0)).detach()
    counts = codes[:, :-1][kl.every].sum(dim=0)
    expected = counts * (v @ w).detach()
    torch.testing.assert_close(found.latents.float(), expected, rtol=1e-3, atol=1e-3)
    assert found.residual == pytest.approx(0, abs=1e-3)
    assert abs(found.change) > 1


QUESTIONS = (
    Question(prompt="The cat sat", completions=(" on the mat", " on a dog")),
    Question(prompt="A", completions=(" bird sang 2 songs.",)),
)


@pytest.mark.parametrize("questions", [QUESTIONS, QUESTIONS[1:]])
def test_the_log_probability_of_a_behaviour_is_shared_out(pair, crosscoder, questions):
    behaviour = Behaviour.of("plans", questions, pair.tokenizer)
    settings = AttributionSettings(n_steps=16)
    found = attribution(pair, crosscoder, behaviour, settings=settings)
    ctx = InterventionContext.of(pair, crosscoder)
    edits = [ReplaceActivation(site=1, stream=0), unchanged(1)]
    expected = behaviour.scores(ctx, edits).log().sum(dim=1).tolist()
    assert [found.start, found.end] == pytest.approx(expected, rel=1e-4)
    assert found.change == pytest.approx(expected[1] - expected[0], rel=1e-3)
    assert abs(found.residual) < 0.05 * abs(found.change)
    # First is what carries the change, whichever way it goes.
    first = found.latents[found.ranking(1)[0]].item()
    assert first * found.change > 0


def test_equal_models_have_nothing_to_share_out(pairs, make_crosscoder, text):
    pair = pairs["equal"]
    found = attribution(pair, make_crosscoder(pair), Predictions.of(text))
    assert not found.by_role.any()
    assert not found.terms.any()
    assert (found.change, found.residual, found.ranking()) == (0, 0, [])
    assert "nothing to share out" in str(found)


def test_the_other_direction_and_a_diff_sae_add_up_too(pair, make_crosscoder, text):
    settings = AttributionSettings(n_steps=16)
    swapped = pair.comparing("finetuned", "base")
    for models in (swapped, pair.difference()):
        made = make_crosscoder(models)
        found = attribution(models, made, Predictions.of(text), settings=settings)
        assert found.compared == models.compared_names
        assert found.change > 0.05
        assert abs(found.residual) < 0.05 * found.change


def test_no_mode_of_torch_around_it_matters_and_nothing_is_left(pair, crosscoder, text, found):
    weights = [*pair.model("finetuned").parameters()]
    before = [w.requires_grad for w in weights]
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            again = attribution(pair, crosscoder, Predictions.of(text), batch_size=3)
        torch.testing.assert_close(again.by_role, found.by_role, rtol=1e-4, atol=1e-5)
    assert [w.requires_grad for w in weights] == before
    assert all(w.grad is None for w in weights)


def test_bfloat16_gives_about_the_same(folders, make_crosscoder, text, pairs):
    pair = ModelPair.from_pretrained(*folders["llama"], hook_name="blocks.1.hook_resid_post",
                                     dtype="bfloat16")  # fmt: skip
    crosscoder = make_crosscoder(pair)
    found = attribution(pair, crosscoder, Predictions.of(text))
    exact = attribution(pairs["llama"], crosscoder, Predictions.of(text))
    assert found.by_role.dtype == torch.float64
    cosine = torch.cosine_similarity(found.latents, exact.latents, dim=0)
    assert cosine > 0.98
    assert abs(found.residual) < 0.1 * found.change


def test_layers_that_pass_no_gradient_are_named(pairs, make_crosscoder, text):
    pair = pairs["hooked"]
    model = pair.model("finetuned")
    detached = ("blocks.2.hook_resid_post", lambda x, hook: x.detach())  # noqa: ARG005
    with (
        model.hooks(fwd_hooks=[detached]),
        pytest.raises(ValueError, match=r"no gradient passes the layers above 'blocks\.1\.hook"),
    ):
        attribution(pair, make_crosscoder(pair), Predictions.of(text))
    with torch.inference_mode():
        made = hooked_transformer(pair.tokenizer, 3)
        models = ModelPair(made, model, hook_name=pair.model_sites[0].hook_name,
                           model_names=("one", "two"))  # fmt: skip
        models = models.comparing("finetuned", "base")
    with pytest.raises(ValueError, match=r"loaded under torch\.inference_mode"):
        attribution(models, make_crosscoder(models), Predictions.of(text))


def test_texts_with_nothing_to_predict_are_refused_and_short_contexts_are_not(
    pair, crosscoder, text
):
    places = TokenFilter(roles=("assistant",))
    responses = Predictions(name="x", text=text, kind="response", places=places)
    with pytest.raises(ValueError, match="has a token of the kind 'response' to predict"):
        attribution(pair, crosscoder, responses)
    with pytest.raises(ValueError, match="contexts of two tokens or more"):
        attribution(pair, crosscoder, Predictions.of(text.cut(1)))
    with pytest.raises(ValueError, match="n_steps is 0"):
        AttributionSettings(n_steps=0)
    padding = text.dropped.clone()
    padding[0, 1:] = 5
    one = replace(text, dropped=padding)
    found = attribution(pair, crosscoder, Predictions.of(one), settings=ONE)
    rest = attribution(pair, crosscoder, Predictions.of(text[1:]), settings=ONE)
    assert not found.terms[:, 0].any()
    torch.testing.assert_close(found.by_role, rest.by_role, rtol=1e-4, atol=1e-5)


def test_it_saves_and_loads(found, tmp_path):
    loaded = Attribution.load(found.save(tmp_path / "run").parent)
    assert str(loaded) == str(found)
    for name in (
        "by_role",
        "spans",
        "offsets",
        "passage_latents",
        "passage_values",
        "terms",
        "tokens",
    ):
        assert torch.equal(getattr(loaded, name), getattr(found, name))
    assert loaded.text == found.text
    assert loaded.rows(3) == found.rows(3)
    shares = [row.attribution_share for row in found.rows(None)]
    assert sum(shares) == pytest.approx(found.share(found.totals["latents"]))
    (tmp_path / "run" / "attribution.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"attribution\.safetensors is damaged"):
        Attribution.load(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="holds no attribution"):
        Attribution.load(tmp_path)


def test_the_waterfall_is_what_kl_by_hand_says(pair, crosscoder, text):
    order = [5, 0, 7]
    found = waterfall(pair, crosscoder, Predictions.of(text), ranked=order, sizes=(1, 3, 10))
    x = pair.activations(text.tokens)
    codes = (crosscoder.encode(x) * text.mask[..., None]).detach()
    v = (crosscoder.decoder(1) - crosscoder.decoder(0)).detach()
    n = found.text["n_predicted"]
    with torch.no_grad():
        empty, *sets = (
            kl_at(pair, text, x[:, :, 0] + codes[..., ids] @ v[ids]).item() / n
            for ids in ([], [*range(12)], order[:1], order)
        )
    assert found.row("passes this hook").kl == pytest.approx(empty, rel=1e-3)
    for row, kl in zip(found.rows[2:], sets, strict=True):
        assert row.kl == pytest.approx(empty - kl, rel=1e-3, abs=1e-4)
        assert row.reachable_share == pytest.approx(1 - kl / empty, rel=1e-3, abs=1e-4)
    assert [row.n_latents for row in found.rows] == [0, 0, 12, 1, 3]
    own = pair.logits(text.tokens).log_softmax(-1)
    base = pair.logits(text.tokens, site="base").log_softmax(-1)
    by_token = (own.exp() * (own - base)).sum(-1)[:, :-1]
    whole = by_token[text.lengths[:, None] > torch.arange(1, by_token.shape[1] + 1)].mean()
    assert found.row("the whole change").kl == pytest.approx(whole.item(), rel=1e-3)
