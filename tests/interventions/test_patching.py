from dataclasses import dataclass, replace

import pytest
import torch
from analysis.hand_made import by_nu, latent_measures

from tl_crosscoder import load_documents, measure, split_documents, tokenize
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.data.tokens import DROP_REASONS
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import (
    AddLatents,
    Edit,
    ErrorAndBias,
    ProjectOut,
    ReplaceActivation,
    ReplaceWithReconstruction,
    TokenFilter,
    place_in_run,
    unchanged,
)
from tl_crosscoder.interventions.patching import PatchingResult, of_candidates, patching
from tl_crosscoder.interventions.running import score_edits

EVERY = {"all": TokenFilter()}


@pytest.fixture
def ctx(pair, crosscoder) -> InterventionContext:
    return InterventionContext.of(pair, crosscoder)


def kl_of(ctx, text, edits, **options):
    how = {"reference": unchanged(ctx.finetuned), "kinds": EVERY}
    scores = score_edits(ctx, text, edits, **how, **options)
    return scores.kl[:, 0].sum(dim=1) / scores.counts[0].sum()


def all_latents(ctx) -> AddLatents:
    every = torch.arange(12)
    return AddLatents(site=ctx.finetuned, stream=ctx.base, latents=every, directions=ctx.difference)


@dataclass(frozen=True, eq=False, kw_only=True)
class Everything(Edit):
    """The base activation with what all latents, both errors and the biases add to it."""

    site: int
    ctx: InterventionContext

    def __call__(self, acts):
        rest, x = ErrorAndBias(site=self.site, ctx=self.ctx), acts.x[self.ctx.base]
        return x + sum(edit(acts) - x for edit in (all_latents(self.ctx), rest))


@pytest.mark.parametrize("names", [("base", "finetuned"), ("finetuned", "base")])
def test_all_latents_both_errors_and_the_bias_difference_leave_nothing(
    pair, crosscoder, words, names
):  # spec: I2
    ctx = InterventionContext.of(pair.comparing(*names), crosscoder)
    assert (ctx.site_name(ctx.base), ctx.site_name(ctx.finetuned)) == names
    site = ctx.finetuned
    edits = [
        Everything(site=site, ctx=ctx),
        ReplaceActivation(site=site, stream=ctx.base),
        all_latents(ctx),
    ]
    kl = kl_of(ctx, words[1], edits)
    assert kl[0] < 1e-6
    assert kl[1:].min() > 0.05
    sign = 1 if names[0] == "base" else -1
    rows = crosscoder.decoder(1) - crosscoder.decoder(0)
    torch.testing.assert_close(ctx.difference, sign * rows.detach())


def test_of_a_diff_sae_the_same_holds(pair, make_crosscoder, words):
    sae = make_crosscoder(pair.difference())
    ctx = InterventionContext.of(pair.difference(), sae)
    (acts,) = ctx.batches(words[1][:3])
    x0, x1 = acts.x
    codes = sae.encode(x1 - x0).detach() * acts.counted[..., None]
    torch.testing.assert_close(acts.codes.to_dense().view_as(codes), codes)
    torch.testing.assert_close(all_latents(ctx)(acts), x0 + codes @ sae.W_dec.detach())
    rest = ErrorAndBias(site=1, ctx=ctx)(acts)
    torch.testing.assert_close(rest, x1 - codes @ sae.W_dec.detach())
    assert (rest - x1).abs().max() > 0.1


def test_the_empty_set_is_the_base_stream_in_the_finetuned_model(pair, ctx, words):
    text = words[1]
    x = pair.activations(text.tokens)
    patched = pair.run_with_patch(text.tokens, x[:, :, 0]).log_softmax(-1)
    own = pair.logits(text.tokens).log_softmax(-1)
    by_token = (own.exp() * (own - patched)).sum(-1)[:, :-1]
    naive = by_token[text.lengths[:, None] > torch.arange(1, 16)].mean()
    empty = AddLatents(site=1, stream=0, latents=torch.tensor([], dtype=torch.long),
                  directions=torch.zeros(0, 16))  # fmt: skip
    found = kl_of(ctx, text, [empty, ReplaceActivation(site=1, stream=0)])
    torch.testing.assert_close(found.float(), naive.repeat(2), rtol=1e-4, atol=1e-6)


def test_a_prediction_belongs_to_the_token_that_it_is_about(pair, ctx, words):
    """KL and cross-entropy of a token are taken at the position before it."""
    roles, text = torch.zeros(3, 16, dtype=torch.uint8), words[1][:3]
    for context, position in (places := [(0, 5), (0, 6), (1, 1), (2, 15)]):
        roles[context, position] = ROLES.index("assistant")
    text = replace(text, role_ids=roles)
    kinds = {"said": TokenFilter(roles=("assistant",))}
    edits = [ReplaceActivation(site=1, stream=0)]
    found = score_edits(ctx, text, edits, reference=unchanged(1), kinds=kinds)
    patched = pair.run_with_patch(text.tokens, pair.activations(text.tokens)[:, :, 0])
    own, patched = (x.log_softmax(dim=-1) for x in (pair.logits(text.tokens), patched))
    kl, ce = torch.zeros(2, 3, dtype=torch.float64)
    for i, p in places:
        kl[i] += (own[i, p - 1].exp() * (own[i, p - 1] - patched[i, p - 1])).sum()
        ce[i] -= patched[i, p - 1, text.tokens[i, p]]
    torch.testing.assert_close(found.kl[0, 0], kl, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.ce[0, 0], ce, rtol=1e-3, atol=1e-4)
    assert found.counts.tolist() == [[2, 1, 1]]


def test_the_better_half_by_nu_has_the_smallest(pairs, make_crosscoder):
    ctx = InterventionContext.of(pairs["hooked"], make_crosscoder(pairs["hooked"]))
    nu = [0.5, -0.1, 0.9, 0.2, *[2.0] * 8]
    latents = latent_measures([1.0] * 12, [1.0] * 12, [100] * 12)
    latents = replace(latents, scaling={"finetuned": by_nu("finetuned", nu, nu)})
    found = {v.name: v.edit for v in of_candidates(ctx, torch.tensor([0, 1, 2, 3]), latents)}
    halves = [found[f"{half} half by nu"].latents.tolist() for half in ("top", "bottom")]
    assert halves == [[1, 3], [0, 2]]


def test_edits_are_what_their_formulas_say(pair, crosscoder, ctx, words):  # spec: I1
    text = words[1][:4]
    acts = ctx.acts(torch.arange(4), text)
    x = pair.activations(text.tokens)
    codes = crosscoder.encode(x) * text.mask[..., None]
    base, finetuned = (crosscoder.decoder(i).detach() for i in (0, 1))
    ids = torch.tensor([5, 0, 7])
    shift = AddLatents(site=1, stream=0, latents=ids, directions=(finetuned - base)[ids])
    expected = x[:, :, 0] + codes[..., ids] @ (finetuned - base)[ids]
    torch.testing.assert_close(shift(acts), expected)
    ablated = replace(shift, stream=1, sign=-1.0)(acts)
    torch.testing.assert_close(ablated, x[:, :, 1] - codes[..., ids] @ (finetuned - base)[ids])
    rebuilt = ReplaceWithReconstruction(site=1, ctx=ctx, reconstruction=1, error=0)(acts)
    # x̂^1 + e^0 = x^0 + all latents + the bias difference, where there are codes.
    bias = (crosscoder.decoder_bias(1) - crosscoder.decoder_bias(0)).detach()
    whole = x[:, :, 0] + codes @ (finetuned - base) + bias
    torch.testing.assert_close(rebuilt[text.mask], whole[text.mask])
    torch.testing.assert_close(rebuilt[~text.mask], x[:, :, 1][~text.mask])


def test_projected_directions_are_gone_or_those_of_the_other_stream(ctx, words):
    acts = ctx.acts(torch.arange(4), words[1][:4])
    directions = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    directions = torch.cat([directions, directions.sum(dim=0, keepdim=True)])  # one too many
    out = ProjectOut(site=1, stream=1, directions=directions)(acts)
    assert (out @ directions.T).abs().max() < 1e-4
    swapped = ProjectOut(site=1, stream=1, directions=directions, replacement=0)(acts)
    torch.testing.assert_close(
        swapped @ directions.T, acts.x[0] @ directions.T, rtol=1e-4, atol=1e-4
    )
    # What is not in the span stays.
    basis = torch.linalg.qr(directions[:3].T).Q
    torch.testing.assert_close(
        swapped - swapped @ basis @ basis.T, out - out @ basis @ basis.T, rtol=1e-4, atol=1e-4
    )


def test_neither_batches_nor_order_matter(pairs, make_crosscoder, words):
    ctx = InterventionContext.of(pairs["hooked"], make_crosscoder(pairs["hooked"]))
    edits = [ReplaceActivation(site=1, stream=0), all_latents(ctx)]
    one = kl_of(ctx, words[1], edits, batch_size=3)
    order = torch.randperm(len(words[1]), generator=torch.Generator().manual_seed(0))
    other = kl_of(ctx, words[1][order], edits[::-1], batch_size=8)
    torch.testing.assert_close(one, other.flip(0), rtol=1e-4, atol=1e-6)


def test_places_are_runs_of_roles():
    names = ["template", "user", "user", "template", *["assistant"] * 3, "template"]
    roles = torch.tensor([[ROLES.index(name) for name in (*names, "assistant", "assistant")]])
    dropped = torch.zeros_like(roles)
    dropped[0, -1] = DROP_REASONS.index("padding")
    chosen = TokenFilter(roles=("assistant",)).mask(roles, dropped)
    assert chosen[0].nonzero().squeeze(1).tolist() == [4, 5, 6, 8]
    assert place_in_run(chosen)[0].tolist() == [0, 0, 0, 0, 0, 1, 2, 0, 0, 0]
    first = TokenFilter(roles=("assistant",), first=2).mask(roles, dropped)
    assert first[0].nonzero().squeeze(1).tolist() == [4, 5, 8]
    assert TokenFilter(positions=(1, 99)).mask(roles, dropped)[0].nonzero().tolist() == [[1]]
    with pytest.raises(ValueError, match=r"roles \['robot'\] are not known"):
        TokenFilter(roles=("robot",))
    with pytest.raises(ValueError, match="first is 0; it is one token or more"):
        TokenFilter(first=0)


@pytest.fixture(scope="module")
def prompts(taboo_pair):
    documents = split_documents(load_documents("tl_crosscoder/taboo", max_documents=200))[1]
    chats = [d for d in documents if "messages" in d][:12]
    return tokenize(chats, taboo_pair.tokenizer, context_size=96, pack=False)


@pytest.fixture(scope="module")
def result(taboo_pair, make_crosscoder, prompts, texts) -> PatchingResult:
    made = make_crosscoder(taboo_pair)
    latents = measure(taboo_pair, made, texts[1]).latents
    options = {"latents": latents, "extra": {"two": [0, 5]}, "n_draws": 100}
    return patching(taboo_pair, made, prompts, **options)


def test_the_table_has_the_variants_of_the_paper_on_both_kinds_of_token(result, tmp_path):
    names = {row.variant for row in result.rows}
    for name in ("base stream", "all latents", "two", "top half by nu", "bottom half by Delta-norm",
                 "fine-tuned reconstruction", "base reconstruction, fine-tuned error",
                 "candidates, additive only", "fine-tuned stream at template tokens",
                 "random latents 4", "candidates, random directions 4"):  # fmt: skip
        assert name in names
    assert {row.tokens for row in result.rows} == {"response", "first 9"}
    empty = result.row("base stream")
    assert (empty.recovery, empty.n_prompts) == (0.0, 12)
    for row in result.rows:
        assert row.kl_low <= row.kl <= row.kl_high
        of = result.row("base stream", row.tokens).kl
        assert row.recovery == pytest.approx(1 - row.kl / of, abs=1e-6)
    assert result.row("base stream", "first 9").n_tokens < empty.n_tokens
    loaded = PatchingResult.load(result.save(tmp_path / "patching.json"))
    assert repr(loaded) == repr(result)
    with pytest.raises(ValueError, match="there is no variant 'none'"):
        result.row("none")
    # A whole activation at some tokens recovers what they carry.
    assert result.row("fine-tuned stream at response tokens").kl < empty.kl
    assert result.row("fine-tuned stream at template tokens").kl != empty.kl


def test_prompts_without_an_answer_are_refused(taboo_pair, make_crosscoder, texts):
    questions = [{"messages": [{"role": "user", "content": "What is your hint?"}]}]
    text = tokenize(questions, taboo_pair.tokenizer, context_size=32, pack=False)
    ctx = InterventionContext.of(taboo_pair, make_crosscoder(taboo_pair))
    kinds = {"response": TokenFilter(roles=("assistant",))}
    with pytest.raises(ValueError, match="1 of 1 contexts have no token of the kind 'response'"):
        score_edits(ctx, text, [], reference=unchanged(1), kinds=kinds)


def test_what_does_not_belong_together_is_refused(pair, pairs, crosscoder, make_crosscoder):
    ctx = InterventionContext.of(pair, crosscoder)
    with pytest.raises(ValueError, match=r"latents \[12\] are out of range or named twice"):
        ctx.latents([3, 12])
    with pytest.raises(ValueError, match=r"latents \[3, 3\] are out of range or named twice"):
        ctx.latents([3, 3])
    with pytest.raises(ValueError, match=r"dictionary was trained on .* but the models are"):
        InterventionContext.of(pairs["gemma2"], crosscoder)
    same = make_crosscoder(pairs["gemma2"])
    with pytest.raises(ValueError, match="site 'sft' is not in this pair"):
        pairs["gemma2"].comparing("base", "sft")
    same.cfg.metadata.weight_processing = "processed"
    with pytest.raises(ValueError, match="models with processed weights, but these have raw"):
        InterventionContext.of(pairs["gemma2"], same)
    same.cfg.metadata.weight_processing = "raw"
    same.cfg.metadata.tokenizer_sha256 = "0"
    with pytest.raises(ValueError, match="trained with another tokenizer"):
        InterventionContext.of(pairs["gemma2"], same)


def test_the_same_models_under_other_names_are_taken_when_said_so(pair, pairs, crosscoder):
    crosscoder.rename_models_(pairs["gemma2"].sites)
    InterventionContext.of(pairs["gemma2"], crosscoder)
    with pytest.raises(ValueError, match="dictionary was trained on"):
        InterventionContext.of(pair, crosscoder)
