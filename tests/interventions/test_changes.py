"""Groups of what latents carry, and what is said and measured of each: planted ones are found."""

import math
from dataclasses import replace

import pytest
import torch

from tl_crosscoder import InterventionContext, causal_test
from tl_crosscoder.interventions.attribution import attribution
from tl_crosscoder.interventions.behaviour import Predictions
from tl_crosscoder.interventions.changes import _Maker, find_changes
from tl_crosscoder.interventions.changes_result import NONE_FOUND, Change, Changes
from tl_crosscoder.interventions.controls import ControlSettings
from tl_crosscoder.interventions.grouping import Groups, grouped, matched
from tl_crosscoder.interventions.passages import passage_text, passages_of, sentence_ends

FEW = ControlSettings(controls=("covariance", "shuffled"), n_random=2, n_matched=0, n_draws=50)
DOCUMENTS = torch.arange(20).repeat_interleave(2)


def planted(n: int) -> torch.Tensor:
    """40 passages x 30 latents: each change has 5 latents of its own and a share of passages."""
    generator = torch.Generator().manual_seed(0)
    W = torch.zeros(40, n)
    W[torch.arange(40), torch.randint(n, (40,), generator=generator)] = 1.0
    # One change is ten times as large as the others, which are found all the same.
    W *= torch.tensor([10.0, 1, 1][:n]) * (1 + torch.rand(40, 1, generator=generator))
    H = torch.zeros(n, 30)
    for c in range(n):
        H[c, 5 * c : 5 * c + 5] = torch.rand(5, generator=generator) + 0.2
    return W @ H + 0.003 * torch.randn(40, 30, generator=generator)


@pytest.mark.parametrize("n", [1, 3])
def test_planted_changes_are_found_in_their_number(n):
    A = planted(n)
    groups = grouped(A, DOCUMENTS)
    assert len(groups.rows) == n
    assert groups.agreement.min() > 0.95
    parts = groups.parts(A)
    torch.testing.assert_close(parts.sum(dim=0), A.double())
    owners = parts.sum(dim=1).argmax(dim=0)[: 5 * n].view(n, 5)
    assert all(len(row.unique()) == 1 for row in owners)
    assert len(owners[:, 0].unique()) == n
    # Other passages belong to the same groups, whatever their size.
    other = groups.parts(100 * A[:4]).sum(dim=2).argmax(dim=0)
    assert torch.equal(other, parts[:, :4].sum(dim=2).argmax(dim=0))
    torch.testing.assert_close(matched(groups.rows, groups.rows.flip(0)), torch.ones(n).double())


@pytest.mark.parametrize(
    "A", [torch.eye(40), torch.zeros(40, 4), -torch.ones(40, 4), torch.zeros(40, 0)]
)
def test_what_is_not_found_again_is_no_group(A):
    """Every passage has a latent of its own, nothing is carried, or all works against it."""
    groups = grouped(A, DOCUMENTS)
    assert groups.rows.shape == (0, A.shape[1])
    assert groups.parts(A).shape == (0, *A.shape)
    assert all(not agreement >= 0.9 for agreement in groups.tried)
    assert len(grouped(planted(1)[:2], torch.tensor([0, 1])).rows) == 0  # no halves to speak of


def test_passages_by_hand():
    # Positions whose next token is predicted: tokens 2, 3, 4 and 7, 8; none; all but the first.
    predicted = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1], [0] * 8, [1] * 8]).bool()
    ends = torch.zeros(3, 9, dtype=torch.bool)
    ends[[0, 1, 2, 2], [2, 3, 4, 8]] = True
    found = passages_of(predicted, ends)
    spans = [[0, 2, 3], [0, 3, 5], [0, 7, 9], [1, 0, 0], [2, 1, 5], [2, 5, 9]]
    assert found.spans.tolist() == spans
    # A token counts for what is predicted right after it, and the last ones for the last.
    numbers = [[0, 0, 1, 1, 2, 2, 2, 2, 2], [3] * 9, [4] * 4 + [5] * 5]
    assert found.numbers.tolist() == numbers


def test_sentences_end_with_their_marks(taboo_pair, texts):
    text = texts[1][:40]
    ends = sentence_ends(text.tokens, taboo_pair.tokenizer)
    ids = set(text.tokens[ends].tolist())
    assert {taboo_pair.tokenizer.decode([i]).strip() for i in ids} <= {".", "?", "!", '."'}
    assert ids
    spans = [[0, 3, 6], [1, 5, 9]]
    cut, chosen = passage_text(text, spans)
    assert cut.lengths.tolist() == [6, 9]
    assert torch.equal(cut.tokens[0, :6], text.tokens[0, :6])
    mask = chosen.mask(cut.role_ids, cut.dropped)
    assert [row.nonzero().flatten().tolist() for row in mask] == [[3, 4, 5], [5, 6, 7, 8]]
    with pytest.raises(ValueError, match="chosen in a text of shape"):
        chosen.mask(cut.role_ids[:1], cut.dropped[:1])


@pytest.fixture(scope="module")
def maker(taboo_pair, make_crosscoder, texts) -> _Maker:
    """Two groups of latents, on other contexts than those that they were ranked on."""
    crosscoder = make_crosscoder(taboo_pair)
    sides = [Predictions.of(texts[1][i : i + 3]) for i in (0, 3)]
    found, tests = (attribution(taboo_pair, crosscoder, side) for side in sides)
    ids = torch.tensor(found.ranking(6))
    rows = torch.tensor([[3.0, 2, 1, 0, 0, 0], [0, 0, 0, 3, 2, 1]]).double()
    ctx = InterventionContext.of(taboo_pair, crosscoder)
    return _Maker(
        ctx=ctx, found=found, tests=tests, ids=ids, predictions=sides[1],
        groups=Groups(rows=rows, agreement=torch.ones(2), tried=(1.0, 1.0)),
        neutral=texts[1][:1], latents=measured(taboo_pair, crosscoder, texts), settings=FEW,
        show_progress=False,
    )  # fmt: skip


def measured(pair, crosscoder, texts):
    from tl_crosscoder import measure

    return measure(pair, crosscoder, texts[1][:16]).latents


def test_causes_of_a_change_are_measured_on_its_own_passages(maker, taboo_pair):
    rows, groups = maker.rows(), maker._groups()
    assert [row.place for row in rows] == [1, 2]
    for row in rows:
        (group,) = (g for g in groups if g.latents == row.latents)
        assert set(row.latents) <= set(maker.ids.tolist())
        assert row.attributions == tuple(sorted(row.attributions, reverse=True))
        assert row.n_passages == len(group.text) > 1
        assert row.raised
        assert row.lowered
        assert row.before
        assert len(row.passages) <= 4
    (group,) = (g for g in groups if g.latents == rows[0].latents)
    (test,) = causal_test(
        taboo_pair, maker.ctx.dictionary, group.predictions, maker.neutral,
        latents=maker.latents, sets={"x": group.latents}, tests=["necessity"], settings=FEW,
    ).rows  # fmt: skip
    assert (rows[0].necessity, rows[0].off_target_kl) == (test.share, test.off_target_kl)
    assert rows[0].doubt == test.doubt()
    # The same latents recover as much on other passages as they do as another change.
    first = next(row for row in rows if row.latents == groups[0].latents)
    twice = maker._recoveries([groups[0], replace(groups[1], latents=groups[0].latents)])
    assert twice[0] == pytest.approx((first.recovery, first.recovery_of_others))
    assert twice[1] == pytest.approx(twice[0][::-1])


def test_groups_that_change_too_little_are_named_and_not_counted(maker):
    """The bar is on the median: one passage that moves much is no change."""
    (group, other), nothing = maker._groups(), (0.0, 0.0)
    one_moves = torch.full((len(group.text),), 0.1)
    one_moves[0] = 50.0
    row = maker._row(replace(group, nats=one_moves), nothing)
    assert row.doubt.startswith("in half of their passages")
    assert math.isnan(row.necessity)
    just = torch.full((len(other.text),), math.log(2) + 1e-3)
    row = maker._row(replace(other, nats=just), nothing)
    assert "half of their passages" not in row.doubt
    assert not math.isnan(row.necessity)


def test_shares_of_changes_are_of_what_these_latents_carry(maker):
    groups = maker._groups()
    carried = maker.found.latents[maker.ids].sum().item()
    assert sum(g.share for g in groups) == pytest.approx(carried / maker.found.change, rel=1e-4)


def test_equal_models_have_no_change_and_behaviours_are_refused(null_pair, make_crosscoder, texts):
    crosscoder, predictions = make_crosscoder(null_pair), Predictions.of(texts[1][:2])
    found = attribution(null_pair, crosscoder, predictions)
    how = {"neutral": texts[1][:2], "latents": measured(null_pair, crosscoder, texts)}
    changes = find_changes(null_pair, crosscoder, found, predictions, **how)
    assert changes.rows == ()
    assert changes.lines() == [
        "Nothing passes here: fine-tuned predicts the same with base activations."
    ]
    assert "0 changes" in str(changes)
    of_behaviour = replace(found, unit="log-probability, nats")
    with pytest.raises(ValueError, match="changes are found in predictions"):
        find_changes(null_pair, crosscoder, of_behaviour, predictions, **how)


def test_the_answer_counts_what_is_caused_and_names_the_rest(tmp_path):
    row = Change(
        place=1, change_share=0.48, agreement=0.99, latents=(502, 1012, 103, 7, 8),
        attributions=(3.0, 2.0, 1.0, 0.5, 0.4), before="Is it the moon?",
        base_text="Yes, it is the moon.", finetuned_text="I cannot tell you that.",
        raised=("I",), lowered=("Yes",), passages=("Is it the moon? / I cannot tell you that.",),
        n_passages=24, necessity=0.86, necessity_low=0.77, necessity_high=0.93,
        strongest="shuffled", control_mean=0.03, control_high=0.1, p_control=0.05,
        off_target_kl=0.0, off_target_ce=0.0, recovery=0.9, recovery_of_others=float("nan"),
        doubt="",
    )  # fmt: skip
    doubtful = replace(row, place=2, doubt="controls do as much")
    facts = {
        "agreements": (1.0, float("nan")), "effect": "predictions of all tokens",
        "compared": ("base", "finetuned"), "hook_name": "blocks.1.hook_resid_post", "nats": 0.1,
        "texts": {},
    }  # fmt: skip
    changes = Changes(rows=(row, doubtful), **facts)
    assert changes.lines() == [
        '1  48% of the change  after "Is it the moon?": "Yes, it is the moon." → "I cannot tell '
        'you that."',
        "   latents 502, 1012, 103 and 2 more: removing them undoes 86% [77, 93] (controls 3%), "
        "cost 0.0000 nats",
        "1 group of latents is found again and not counted: controls do as much.",
    ]
    loaded = Changes.load(changes.save(tmp_path / "changes.json"))
    assert str(loaded) == str(changes)
    assert loaded.found == changes.found or str(loaded.found) == str(changes.found)
    assert Changes(rows=(), **facts).lines() == [NONE_FOUND]
    assert Changes(rows=(doubtful,), **facts).lines()[0] == "No change is found."
