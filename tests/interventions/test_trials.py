"""Trials, their controls, and predictions as what they are measured by."""

import math
from dataclasses import replace

import pytest
import torch
from analysis.hand_made import latent_measures
from models.random_models import random_crosscoder
from models.tiny_pairs import HOOK, hooked_transformer

from tl_crosscoder import ModelPair, load_documents, split_documents, tokenize
from tl_crosscoder.interventions.behaviour import Effect, Predictions
from tl_crosscoder.interventions.causal import causal_test
from tl_crosscoder.interventions.causal_rows import CausalTest
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.controls import ControlSettings
from tl_crosscoder.interventions.edits import (
    AddVector,
    EditAtTokens,
    ReplaceActivation,
    TokenFilter,
    unchanged,
)
from tl_crosscoder.interventions.trials import Trial, run_trials

LATENTS = [1, 4, 7]
FEW = ControlSettings(n_random=3, n_matched=2, alphas=(0.5, 2.0), n_draws=50)


@pytest.fixture(scope="module")
def measures():
    """Of the 12 latents of `make_crosscoder`: mean code 1, and latent 3 never fires."""
    return latent_measures([1.0] * 12, [1.0] * 12, [100 * (j != 3) for j in range(12)])


@pytest.fixture(scope="module")
def split_pair(pairs) -> ModelPair:
    """Models that differ below the hook alone, so that a stream is all there is to a model."""
    tokenizer = pairs["hooked"].tokenizer
    base, finetuned, other = (hooked_transformer(tokenizer, seed) for seed in (1, 1, 2))
    finetuned.blocks[0].load_state_dict(other.blocks[0].state_dict())
    return ModelPair(base, finetuned, hook_name=HOOK, model_names=("random", "random, block 0"))


def kl_by_context(reference, logits, text):
    """Sum over the predicted tokens of each context of sum p log(p / q), nats."""
    p, q = (each.double().log_softmax(dim=-1) for each in (reference, logits))
    found = torch.zeros(len(text), dtype=torch.float64)
    for row, n in enumerate(text.lengths.tolist()):
        by_token = (p[row].exp() * (p[row] - q[row])).sum(dim=-1)
        found[row] = by_token[: n - 1].sum()
    return found


def test_predictions_go_from_one_model_to_the_other(pair, words):
    """KL from the model that an edit should reach, less is nearer: 0 is that model itself."""
    predictions = Predictions.of(words[1])
    assert (predictions.kind, predictions.n_prompts) == ("all", len(words[1]))
    ctx, edits = InterventionContext.of(pair), [unchanged(0), unchanged(1)]
    text, (base, finetuned) = words[1], (pair.logits(words[1].tokens, site=i) for i in
                                         ("base", "finetuned"))  # fmt: skip
    none = torch.zeros(len(text), dtype=torch.float64)
    for toward, expected in (
        (ctx.base, [none, kl_by_context(base, finetuned, text)]),
        (ctx.finetuned, [-kl_by_context(finetuned, base, text), none]),
    ):
        found = predictions.scores(ctx, edits, toward=toward)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_of_chats_only_what_assistants_say_is_predicted(taboo_pair):
    documents = split_documents(load_documents("tl_crosscoder/taboo", max_documents=200))[1]
    chats = [d for d in documents if "messages" in d][:2]
    text = tokenize(chats, taboo_pair.tokenizer, context_size=96, pack=False)
    predictions = Predictions.of(text)
    assert predictions.kind == "response"
    assert predictions.places.roles == ("assistant",)


def test_p_values_count_controls_and_are_corrected_within_a_test(split_pair, words):
    """Shares: full 1, part between, nothing 0, bad below 0. p = (1 + #{c >= own}) / (1 + n)."""
    nothing, full = unchanged(1), ReplaceActivation(site=1, stream=0)
    part = EditAtTokens(edit=full, places=TokenFilter(positions=(1, 2, 3, 4, 5)), otherwise=1)
    bad = AddVector(site=1, stream=1, vector=torch.full((16,), 30.0))
    controls = {"random": [full, nothing, bad], "matched": [full, bad], "null": [full, full]}
    trials = [
        Trial(test="necessity", name="part", own=part, controls=controls),
        Trial(test="necessity", name="bad", own=bad, controls={"random": [full, nothing, part]}),
        Trial(test="necessity", name="full", own=full, controls={"random": [bad, nothing, part]}),
        Trial(
            test="insert",
            name="all",
            own=ReplaceActivation(site=0, stream=1),
            controls={"random": [unchanged(0)] * 3},
        ),
    ]
    ctx = InterventionContext.of(split_pair)
    found = run_trials(ctx, Predictions.of(words[1]), words[1][:4], trials=trials, settings=FEW)
    one, two, three, other = found.rows
    # The whole activation is all of the change: KL of a model to itself is the end of each test.
    assert (three.share, other.share) == pytest.approx((1.0, 1.0), abs=1e-4)
    assert (three.share_low, three.share_high) == pytest.approx((1.0, 1.0), abs=1e-3)
    assert abs(three.base) < 1e-4 < 1 < three.finetuned
    assert other.base < -1 < -1e-4 < other.finetuned < 1e-4
    assert one.random_high > 0.5 > one.share > 0.01 > two.share
    # One of three is above; all of them; none.
    assert [r.p_random for r in found.rows] == [2 / 4, 4 / 4, 1 / 4, 1 / 4]
    # Of part the null pair is the strongest, two of two above: 3 / 3. 3 x 0.25, 2 x 1, 1 x 1; alone
    # in its test, nothing is to correct.
    assert [r.strongest for r in found.rows] == ["null", "random", "random", "random"]
    assert [r.p_control for r in found.rows] == [3 / 3, 4 / 4, 1 / 4, 1 / 4]
    assert [r.p_control_holm for r in found.rows] == [1.0, 1.0, 0.75, 0.25]
    assert found.least_p(three) == min(1, 3 / (found.n_random + 1))
    assert found.least_p(other) == 1 / (found.n_random + 1)
    # One of two matched is above: (1 + 1) / (1 + 2).
    assert one.p_matched == pytest.approx(2 / 3)
    assert one.matched_mean == pytest.approx((1 + two.share) / 2, abs=1e-3)
    assert one.null_mean == pytest.approx(1.0, abs=1e-4)
    assert (one.control_mean, one.control_high) == (one.null_mean, one.null_high)
    assert one.random_mean == pytest.approx((1 + two.share) / 3, abs=1e-3)
    # Of bad, 0 and part: deviations above the mean, in standard deviations with n - 1.
    shares = torch.tensor([two.share, 0.0, one.share], dtype=torch.float64)
    size = (1 - shares.mean()) / ((shares - shares.mean()).square().sum() / 2).sqrt()
    assert three.effect_size == pytest.approx(size.item(), abs=1e-3)
    for row in (two, three, other):
        assert math.isnan(row.matched_mean)
        assert math.isnan(row.p_matched)
        assert math.isnan(row.null_mean)


class Given(Effect):
    """Scores of the base, of the fine-tuned model, then of each edit in its order."""

    name, unit, n_prompts = "given", "probability", 2

    def __init__(self, whole, *edits):
        self.of_edits = torch.tensor([whole, *edits]).double()[:, None].expand(-1, 2)

    def scores(self, ctx, edits, *, toward, description=None):  # noqa: ARG002
        if len(edits) == 2:
            return torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double()
        return self.of_edits


class Written(Effect):
    """The share that is written on an edit; counts the edits that were scored."""

    name, unit, n_prompts = "written", "probability", 2

    def __init__(self, shares):
        self.shares, self.scored = shares, []

    def scores(self, ctx, edits, *, toward, description=None):  # noqa: ARG002
        known = [0.0, 1.0] if len(edits) == 2 else [self.shares.get(id(e), 1.0) for e in edits]
        self.scored.append(len(edits))
        return torch.tensor(known).double()[:, None].expand(-1, 2)


def test_only_the_strongest_kind_goes_on_and_only_where_that_can_decide(split_pair, words):
    """Insertion: a score is a share. Of 30 controls a kind, 20 are run first."""
    ctx, n, edits = InterventionContext.of(split_pair), 30, {}

    def edit(share):
        made = unchanged(0)
        edits[id(made)] = share, made  # an id is another's once its edit is gone
        return made

    def trial(name, own, **kinds):
        controls = {kind: [edit(share) for share in each] for kind, each in kinds.items()}
        return Trial(test="insert", name=name, own=edit(own), controls=controls)

    rising = [0.001 * i for i in range(n)]
    trials = [
        # Of the shuffled ones none of the first 20 does as much, and of the others two do.
        trial("real", 0.5, random=[0.1] * n, shuffled=[0.2] * 20 + [0.6] * 2 + [0.2] * 8),
        # Five of the first 20 do as much: three are enough.
        trial("not", 0.015, random=[-0.1] * n, shuffled=rising),
        trial("few", 0.3, random=[0.1] * n, matched=[0.2] * 4),
    ]
    settings = replace(FEW, n_random=n, n_matched=4, first_round=20)
    effect = Written({key: share for key, (share, _) in edits.items()})
    found = run_trials(ctx, effect, words[1][:4], trials=trials, settings=settings)
    assert effect.scored == [2, 1 + 41 + 41 + 25, 10]
    real, no, few = found.rows
    assert [row.strongest for row in found.rows] == ["shuffled", "shuffled", "matched"]
    assert (real.p_shuffled, real.p_random) == pytest.approx((3 / 31, 1 / 21))
    assert no.p_control == pytest.approx(6 / 21)
    assert few.p_control == pytest.approx(1 / 5)
    # Trials may share their controls, which run once.
    twice = [trials[0], replace(trials[0], name="again", own=trials[2].own)]
    run_trials(ctx, effect, words[1][:4], trials=twice, settings=replace(settings, first_round=0))
    assert effect.scored[3:] == [2, 1 + 2 + 60]
    effect.scored = effect.scored[:3]
    # All of every kind: the same of the strongest, where it went on.
    every = replace(settings, first_round=0)
    whole = run_trials(ctx, effect, words[1][:4], trials=trials, settings=every)
    assert effect.scored[3:] == [2, 1 + 61 + 61 + 35]
    first, second, _ = whole.rows
    assert (first.p_control, first.control_mean) == (real.p_control, real.control_mean)
    assert second.p_control == pytest.approx(16 / 31)
    assert "20 of each first" in str(found)
    assert "of each first" not in str(whole)


@pytest.fixture(scope="module")
def harm(split_pair, words) -> tuple[torch.Tensor, float]:
    """A vector at every token, and how far it raises -log p of the text, mean over its tokens."""
    text = words[1][:4]
    stream = split_pair.activations(text.tokens)[:, :, 1]
    mask = text.lengths[:, None] > torch.arange(1, text.context_size)

    def cross_entropy(x):
        log_p = split_pair.run_with_patch(text.tokens, x, site="finetuned").log_softmax(dim=-1)
        taken = log_p[:, :-1].gather(2, text.tokens[:, 1:, None].long()).squeeze(-1)
        return -taken[mask].mean().item()

    rises = [cross_entropy(stream + 30 * d) - cross_entropy(stream) for d in torch.eye(16)]
    at = max(range(16), key=lambda i: rises[i])
    assert rises[at] > 0.01
    return 30 * torch.eye(16)[at], rises[at]


@pytest.mark.parametrize(
    ("whole", "own", "control", "hurts", "flag", "of_reachable"),
    [
        (0.2, 0.4, 1.0, "", "", 0.75),  # shares 0.8, 0.6 and 0
        (0.2, -0.2, 1.0, "", "above 100 %", 1.5),
        (0.2, -0.004, 1.0, "", "", 1.255),  # is printed as 100 %
        (0.2, 0.4, 1.0, "own", "broken model", 0.75),
        (0.2, -0.2, 1.0, "own", "broken model; above 100 %", 1.5),
        (0.2, 0.4, -0.5, "control", "broken control; control above 100 %", 0.75),
        (0.96, 0.4, 1.0, "", "nothing passes this hook", math.nan),
        (1.1, 0.4, 1.0, "own", "nothing passes this hook; broken model", math.nan),
    ],
)
def test_what_is_no_plain_share_is_flagged(
    split_pair, words, harm, whole, own, control, hurts, flag, of_reachable
):
    bad = AddVector(site=1, stream=1, vector=harm[0])
    edits = [bad if hurts == name else unchanged(1) for name in ("own", "control")]
    trial = Trial(test="necessity", name="x", own=edits[0], controls={"random": edits[1:]})
    settings, ctx = replace(FEW, max_ce_cost=harm[1] / 2), InterventionContext.of(split_pair)
    given = ctx, Given(whole, own, control), words[1][:4]
    (row,) = run_trials(*given, trials=[trial], settings=settings).rows
    assert (row.share, row.ceiling) == pytest.approx((1 - own, 1 - whole))
    assert row.of_reachable == pytest.approx(of_reachable, nan_ok=True)
    assert row.flag == flag
    expected = [harm[1] if hurts == name else 0.0 for name in ("own", "control")]
    found = row.off_target_ce, row.control_off_target_ce
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert row.off_target_ce_low <= row.off_target_ce <= row.off_target_ce_high


def edited_stream(pair, crosscoder, text, *, test, mode, names, alpha=None):
    """The stream of the edited model by the formulas; names of base and fine-tuned site."""
    base, finetuned = (("base", "finetuned").index(name) for name in names)
    x = pair.activations(text.tokens)
    codes = (crosscoder.encode(x).detach() * text.mask[..., None])[..., LATENTS]
    d0, d1 = (crosscoder.decoder(i).detach()[LATENTS] for i in (base, finetuned))
    if test == "steer":
        norm = x[:, :, base][text.mask].norm(dim=-1).mean()
        u = d1.sum(dim=0)  # every mean code is 1
        return x[:, :, base] + alpha * norm * u / u.norm()
    if test == "insert":
        return x[:, :, base] + codes @ (d1 - d0)
    if mode == "project":
        Q = torch.linalg.qr(d1.T).Q
        return x[:, :, finetuned] - x[:, :, finetuned] @ Q @ Q.T
    return x[:, :, finetuned] - codes @ (d1 - d0 if mode == "delta" else d1)


@pytest.mark.parametrize(
    ("test", "mode", "names"),
    [
        ("necessity", "delta", ("base", "finetuned")),
        ("necessity", "delta", ("finetuned", "base")),
        ("necessity", "zero", ("base", "finetuned")),
        ("necessity", "project", ("finetuned", "base")),
        ("insert", "project", ("base", "finetuned")),
        ("insert", "delta", ("finetuned", "base")),
        ("steer", "delta", ("finetuned", "base")),
    ],
)
def test_a_share_is_of_kls_computed_by_hand(pair, crosscoder, words, measures, test, mode, names):
    text, neutral = words[1][:4], words[1][:6]
    found = causal_test(
        pair.comparing(*names), crosscoder, Predictions.of(text), neutral, latents=measures,
        sets={"x": LATENTS}, tests=[test], mode=mode, settings=FEW,
    )  # fmt: skip
    reached, left = names if test == "necessity" else names[::-1]
    logits = {
        (t, name): pair.logits(t.tokens, site=name) for t in (text, neutral) for name in names
    }
    sign = 1 if test == "necessity" else -1
    gap = kl_by_context(logits[text, reached], logits[text, left], text).mean()
    assert [r.strength for r in found.rows if test == "steer"] == [0.5, 2.0][
        : 2 * (test == "steer")
    ]
    for row in found.rows:
        options = {"test": test, "mode": mode, "names": names, "alpha": row.strength}
        # The unit of steering is the norm on the neutral text, of which the other is a part.
        stream = edited_stream(pair, crosscoder, neutral, **options)
        edited = pair.run_with_patch(neutral.tokens, stream, site=left)
        value = kl_by_context(logits[text, reached], edited[:4], text).mean()
        assert row.value == pytest.approx(sign * value.item(), rel=1e-3)
        assert row.share == pytest.approx(((gap - value) / gap).item(), rel=1e-3, abs=1e-4)
        ends = {reached: 0.0, left: sign * gap.item()}
        assert (row.base, row.finetuned) == pytest.approx([ends[n] for n in names], abs=1e-3)
        cost = kl_by_context(logits[neutral, left], edited, neutral).sum()
        n_predicted = int((neutral.lengths - 1).sum())
        assert row.off_target_kl == pytest.approx(cost.item() / n_predicted, rel=1e-3)
        assert row.n_latents == 3
        assert math.isnan(row.matched_mean) == (test == "steer")
    assert found.sets == {"x": LATENTS}


def test_matched_latents_are_others_that_fire_as_often(pairs, words):
    """Latents 0 and 1 are tested; 50 fire about as often as they do, 8 far less, 2 hardly.

    Those of one kind say nothing, so that the mean of matched sets tells which were drawn.
    """
    pair, text = pairs["hooked"], words[1][:4]
    counts = [1000, 1010, *range(800, 850), *[11] * 8, 9, 9]
    is_near = torch.tensor([c >= 800 for c in counts])
    measures = latent_measures([1.0] * 62, [1.0] * 62, counts)
    shares = {}
    for name, says_nothing in {"near": is_near, "far": ~is_near}.items():
        says_nothing = says_nothing.clone()
        says_nothing[:2] = False
        crosscoder = random_crosscoder(pair.sites, 62, scale=0.4)
        crosscoder.threshold.data.zero_()
        crosscoder.W_dec.data[says_nothing, 16:] = crosscoder.W_dec.data[says_nothing, :16]
        (row,) = causal_test(
            pair, crosscoder, Predictions.of(text), text, latents=measures, sets={"x": [0, 1]},
            tests=["insert"], settings=replace(FEW, n_matched=5),
        ).rows  # fmt: skip
        shares[name] = row.share, row.matched_mean
    assert shares["near"][1] == pytest.approx(0.0, abs=1e-5)
    assert abs(shares["far"][1]) > 1e-3
    assert abs(shares["near"][0]) > 1e-3


def test_without_enough_other_latents_there_is_no_matched_set(pairs, make_crosscoder, words):
    pair, text = pairs["hooked"], words[1][:4]
    counts = [100 * (j in LATENTS) for j in range(12)]
    measures = latent_measures([1.0] * 12, [1.0] * 12, counts)
    (row,) = causal_test(
        pair, make_crosscoder(pair), Predictions.of(text), text, latents=measures,
        sets={"x": LATENTS}, tests=["insert"], settings=FEW,
    ).rows  # fmt: skip
    assert math.isnan(row.matched_mean)
    assert math.isnan(row.p_matched)


@pytest.mark.parametrize("test", ["necessity", "insert", "steer"])
def test_null_directions_are_those_that_lean_to_the_second_site(
    pairs, make_crosscoder, words, measures, test
):
    """Of 12 latents 10 lean there, all along the tested latent; one to the base, one nowhere.

    So the control is as good as the latent itself, whatever the lengths of its rows.
    """
    pair, text = pairs["hooked"], words[1][:4]
    crosscoder, null = make_crosscoder(pair), make_crosscoder(pair)
    own = crosscoder.decoder(1)[4] - (crosscoder.decoder(0)[4] if test != "steer" else 0)
    lengths = torch.arange(1.0, 13.0)[:, None]
    null.W_dec.data[:, :16] = 0.0
    null.W_dec.data[:, 16:] = lengths * own.detach()
    null.W_dec.data[2, :16] = 99.0
    null.W_dec.data[2, 16:] = torch.eye(16)[0]
    null.W_dec.data[9] = 0.0
    options = {"latents": measures, "sets": {"x": [4]}, "tests": [test], "settings": FEW}
    rows = [
        causal_test(pair, crosscoder, Predictions.of(text), text, null=n, **options).rows[0]
        for n in (null, None)
    ]
    assert abs(rows[0].share) > 1e-3
    assert rows[0].null_mean == pytest.approx(rows[0].share, rel=1e-3)
    assert math.isnan(rows[1].null_mean)


def test_a_null_dictionary_of_another_hook_is_refused(pairs, make_crosscoder, words, measures):
    pair, text = pairs["hooked"], words[1][:4]
    other = ModelPair(*pair.models, hook_name="blocks.0.hook_resid_post", model_names=("a", "b"))
    with pytest.raises(
        ValueError, match=r"null dictionary is of blocks\.0\.hook_resid_post \[16\]"
    ):
        causal_test(
            pair, make_crosscoder(pair), Predictions.of(text), text, latents=measures,
            sets={"x": [4]}, settings=FEW, null=make_crosscoder(other),
        )  # fmt: skip


@pytest.fixture(scope="module")
def result(pairs, make_crosscoder, measures, words) -> CausalTest:
    pair = pairs["hooked"]
    return causal_test(
        pair, make_crosscoder(pair), Predictions.of(words[1][:4]), words[1][:4],
        latents=measures, sets={"all": LATENTS, "one": [4]}, settings=FEW,
    )  # fmt: skip


def test_every_set_is_in_every_test_and_steered_at_every_strength(result, tmp_path):
    found = [(r.test, r.latents, r.strength, r.n_latents) for r in result.rows]
    both = [("all", 3), ("one", 1)]
    expected = [(t, n, math.nan, k) for t in ("necessity", "insert") for n, k in both]
    expected += [("steer", n, alpha, k) for n, k in both for alpha in (0.5, 2.0)]
    assert repr(found) == repr(expected)
    assert (result.n_random, result.n_matched, result.n_prompts) == (3, 2, 4)
    assert (result.unit, result.sets) == ("KL, nats a prompt", {"all": LATENTS, "one": [4]})
    assert repr(CausalTest.load(result.save(tmp_path / "test.json"))) == repr(result)


def test_the_seed_makes_the_controls(pairs, make_crosscoder, measures, words, result):
    pair, text = pairs["hooked"], words[1][:4]
    options = {"latents": measures, "sets": result.sets}
    one, other = (
        causal_test(pair, make_crosscoder(pair), Predictions.of(text), text,
                    settings=replace(FEW, seed=seed), **options)
        for seed in (0, 1)
    )  # fmt: skip
    assert repr(one) == repr(result)
    for row, same in zip(other.rows, result.rows, strict=True):
        assert row.share == pytest.approx(same.share, rel=1e-5)
        assert row.random_mean != same.random_mean


def test_what_does_not_differ_is_an_answer_without_rows(
    pairs, make_crosscoder, measures, words, tmp_path
):
    pair, text = pairs["equal"], words[1][:4]
    given = pair, make_crosscoder(pair), Predictions.of(text), text
    found = causal_test(*given, latents=measures, sets={"x": [1]}, settings=FEW)
    assert found.rows == ()
    assert found.note.startswith("Base and fine-tuned model do not differ in 'predictions of all")
    assert found.note in " ".join(str(found).split())
    path = found.save(tmp_path / "nothing.json")
    assert CausalTest.load(path) == found
    path.write_text(path.read_text().replace('"note":', '"other":'))  # as of an older version
    assert CausalTest.load(path) == replace(found, note="")


def test_what_cannot_be_tested_is_refused(pairs, make_crosscoder, measures, words):
    text = words[1][:4]

    def causal(name="hooked", **changes):
        pair = pairs[name]
        options = {"latents": measures, "sets": {"x": [1]}, "settings": FEW} | changes
        return causal_test(pair, make_crosscoder(pair), Predictions.of(text), text, **options)

    for changes, message in (
        ({"sets": {"x": [1, 3]}}, r"set 'x' has 2 latents, of which \[3\] never fire"),
        ({"sets": {"x": []}}, "the set 'x' has 0 latents"),
        ({"sets": {"x": [12]}}, r"latents \[12\] are out of range"),
        ({"sets": {}}, r"on the sets \[\]: name one set of latents or more"),
        ({"tests": ["inserted"]}, r"tests \['inserted'\].* among \['necessity', 'insert'"),
        ({"tests": []}, "there is nothing to test: give one trial or more"),
    ):
        with pytest.raises(ValueError, match=message):
            causal(**changes)
    for bad, message in (
        ({"n_random": 0}, "n_random is 0; it must be above 0"),
        ({"n_matched": -1}, "n_matched is -1; it must be 0 or more"),
        ({"alphas": ()}, r"alphas \[\]: give one kind .* and one strength or more"),
        ({"controls": ()}, r"controls are \[\] .* one kind or more among \['random', 'cov"),
        ({"controls": ("null",)}, r"controls are \['null'\] .* among \['random', 'cov"),
        ({"max_ce_cost": 0.0}, "max_ce_cost is 0.0; it must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ControlSettings(**bad)
    ctx, plain = InterventionContext.of(pairs["hooked"]), unchanged(1)
    odd = Trial(test="necessity", name="x", own=plain, controls={"placebo": [plain]})
    with pytest.raises(ValueError, match=r"not \['placebo'\]"):
        run_trials(ctx, Predictions.of(text), text, trials=[odd])
