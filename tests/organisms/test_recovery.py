import pytest
import torch
from analysis.hand_made import latent_measures, measurement
from text_of_ids import text_of

from tl_crosscoder import Measurement, TokenizedText
from tl_crosscoder.analysis.examples import TopTokens, examples
from tl_crosscoder.organisms.recovery import planted_recovery

N_POS = 32


@pytest.fixture(scope="module")
def tokenizer(taboo_pair):
    return taboo_pair.tokenizer


@pytest.fixture(scope="module")
def text(tokenizer) -> TokenizedText:
    """One context with the word Zorquil, which is several tokens, and one without it."""
    rows = []
    for sentence in ("It is by the Zorquil gate", "It is by the other gate"):
        ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        filler = tokenizer(" the", add_special_tokens=False)["input_ids"]
        rows.append((ids + filler * N_POS)[:N_POS])
    return text_of(torch.tensor(rows))


def word_positions(text, tokenizer) -> list[int]:
    """Of the tokens that make up `Zorquil`, in the first context; the space before has its own."""
    before = tokenizer("It is by the ", add_special_tokens=False)["input_ids"]
    through = tokenizer("It is by the Zorquil", add_special_tokens=False)["input_ids"]
    assert text.tokens[0, : len(through)].tolist() == through
    return list(range(len(before), len(through)))


def measured(
    positions: list[list[int]], text, tokenizer, *, ranked: list[int], n_active=None
) -> Measurement:
    """Latent j is most active at positions[j]; the ranked latents are `ranked`."""
    where = torch.tensor(positions).T.contiguous()
    values = torch.arange(len(where), 0, -1.0)[:, None].expand_as(where).clone()
    top = TopTokens(values=values.masked_fill(where < 0, 0), positions=where)
    n = len(positions)
    return measurement(
        latent_measures([1.0] * n, [1.0] * n, n_active or [50] * n),
        examples={j: examples(top, j, text, tokenizer) for j in ranked},
        top_tokens=top,
    )


def recovered(made, text, tokenizer, *, words=("Zorquil",), **options):
    return planted_recovery(made, text, tokenizer, planted_words=words, **options)


def test_a_word_of_several_tokens_is_found_at_each_of_them(text, tokenizer):
    places = word_positions(text, tokenizer)
    assert len(places) >= 3
    for place in places:
        found = recovered(measured([[place]], text, tokenizer, ranked=[0]), text, tokenizer)
        assert found.at_token == {"Zorquil": 1}
        assert found.share_at_token == 1.0


def test_the_tokens_beside_it_have_it_in_context_only(text, tokenizer):
    first, *_, last = word_positions(text, tokenizer)
    for place in (first - 1, last + 1):
        made = measured([[place]], text, tokenizer, ranked=[0])
        found = recovered(made, text, tokenizer)
        assert (found.in_context, found.at_token) == ({"Zorquil": 1}, {"Zorquil": 0})
        assert (found.share_in_context, found.share_at_token) == (1.0, 0.0)


def test_latents_are_counted_once_and_shares_are_of_contexts(text, tokenizer):
    first = word_positions(text, tokenizer)[0]
    far = N_POS + 2  # `by`, in the context without the word
    made = measured(
        [[first, first + 1], [first - 1, far], [far, far + 1]], text, tokenizer, ranked=[0, 1, 2]
    )
    found = recovered(made, text, tokenizer, words=("Zorquil", "by", "moon"))
    assert found.latents == (0, 1, 2)
    assert found.in_context == {"Zorquil": 2, "by": 3, "moon": 0}
    assert found.at_token == {"Zorquil": 1, "by": 2, "moon": 0}
    alone = recovered(made, text, tokenizer)
    assert alone.share_in_context == pytest.approx(3 / 6)
    assert alone.share_at_token == pytest.approx(2 / 6)


def test_words_are_whole_and_case_does_not_matter(text, tokenizer):
    made = measured([word_positions(text, tokenizer)[:2]], text, tokenizer, ranked=[0])
    found = recovered(made, text, tokenizer, words=("zorquil", "Zorq", "orquil"))
    assert found.in_context == {"zorquil": 1, "Zorq": 0, "orquil": 0}
    assert found.at_token == {"zorquil": 1, "Zorq": 0, "orquil": 0}


def test_the_random_baseline_is_the_share_over_all_living_latents(text, tokenizer):
    """As many latents as live are drawn without repetition: each draw is all of them."""
    first, far = word_positions(text, tokenizer)[0], N_POS + 2
    made = measured([[first], [first - 1], [far], [far + 1]], text, tokenizer, ranked=[0, 1, 2, 3])
    found = recovered(made, text, tokenizer)
    assert found.random_share_in_context == found.share_in_context == 2 / 4
    assert found.random_share_at_token == found.share_at_token == 1 / 4


def test_a_single_ranked_latent_is_compared_with_single_ones(text, tokenizer):
    first, far = word_positions(text, tokenizer)[0], N_POS + 2
    made = measured([[first], [far], [far], [far]], text, tokenizer, ranked=[0])
    found = recovered(made, text, tokenizer, n_draws=2000)
    assert found.share_in_context == 1.0
    # One in four; 2,000 draws have a standard deviation of 0.01.
    assert found.random_share_in_context == pytest.approx(1 / 4, abs=0.05)
    assert found.p_value == pytest.approx(1 / 4, abs=0.05)


def test_what_one_random_latent_in_forty_shows_has_that_p_value(text, tokenizer):
    first, far = word_positions(text, tokenizer)[0], N_POS + 2
    made = measured([[first], *[[far]] * 39], text, tokenizer, ranked=[0])
    found = recovered(made, text, tokenizer, n_draws=2000)
    assert found.p_value == pytest.approx(1 / 40, abs=0.015)


def test_only_latents_active_on_enough_tokens_are_drawn(text, tokenizer):
    """Ten are enough."""
    first, far = word_positions(text, tokenizer)[0], N_POS + 2
    for positions, share in (([[first], [first], [far]], 0.0), ([[far], [far], [first]], 1.0)):
        made = measured(positions, text, tokenizer, ranked=[2], n_active=[9, 0, 10])
        assert recovered(made, text, tokenizer).random_share_in_context == share


def test_the_same_seed_draws_the_same_and_another_does_not(text, tokenizer):
    first, far = word_positions(text, tokenizer)[0], N_POS + 2
    made = measured([[first], [far], [far], [far]], text, tokenizer, ranked=[1])
    shares = [
        recovered(made, text, tokenizer, seed=s).random_share_in_context for s in (0, 0, 1, 2)
    ]
    assert shares[0] == shares[1]
    assert len(set(shares)) > 1


def test_words_as_frequent_at_random_are_no_more_than_at_random(text, tokenizer):
    first = word_positions(text, tokenizer)[0]
    everywhere = measured([[first], [first - 1], [first + 1]], text, tokenizer, ranked=[0, 1])
    found = recovered(everywhere, text, tokenizer)
    assert found.in_context == {"Zorquil": 2}
    assert found.share_in_context == found.random_share_in_context == 1.0


def test_words_that_random_latents_show_more_often_are_not_found(text, tokenizer):
    first, far = word_positions(text, tokenizer)[0], N_POS + 2
    made = measured([[first, far, far], *[[first, first, first]] * 5], text, tokenizer, ranked=[0])
    found = recovered(made, text, tokenizer)
    assert found.in_context == {"Zorquil": 1}
    assert found.share_in_context < found.random_share_in_context


def test_words_that_are_nowhere_are_not_found(text, tokenizer):
    made = measured([[3], [4]], text, tokenizer, ranked=[0])
    found = recovered(made, text, tokenizer, words=("moon", "tides"))
    assert found.in_context == found.at_token == {"moon": 0, "tides": 0}


def test_without_ranked_latents_nothing_is_found(text, tokenizer):
    found = recovered(measured([[3]], text, tokenizer, ranked=[]), text, tokenizer)
    assert (found.share_in_context, found.random_share_in_context) == (0.0, 0.0)
