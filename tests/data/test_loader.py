from itertools import islice

import pytest
import torch

from tl_crosscoder.data.harvest import harvest, harvest_rows
from tl_crosscoder.data.loader import ActivationLoader, Position


def new_loader(pair, text, **fields):
    return ActivationLoader(
        pair, text, **({"batch_size": 64, "buffer_contexts": 20, "harvest_batch_size": 8} | fields)
    )


def n_batches_a_pass(loader):
    for i, (_, position) in enumerate(loader.batches()):
        if position.n_passes > 0:
            return i
    raise AssertionError


def test_rows_are_the_counting_tokens_of_both_models(taboo_pair, texts):
    text = texts[0][:10]
    rows = torch.cat(list(harvest_rows(taboo_pair, text, batch_size=4)))
    expected = taboo_pair.activations(text.tokens)[text.mask]
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)
    assert sum(len(part.text) for part in harvest(taboo_pair, text, batch_size=4)) == 10


def test_no_shuffle_separates_a_pair_and_a_pass_deals_each_token_once(taboo_pair, texts):
    """Every dealt row is one of the text's rows in both sites, each at most as often as there."""
    text = texts[0][:40]
    loader = new_loader(taboo_pair, text, buffer_contexts=10)
    dealt = torch.cat([b for b, p in islice(loader.batches(), n_batches_a_pass(loader))])
    rows = torch.cat(list(harvest_rows(taboo_pair, text, batch_size=8)))
    as_keys = lambda t: [tuple(r) for r in t.flatten(1).mul(1e3).round().int().tolist()]  # noqa: E731
    left = as_keys(rows)
    for key in as_keys(dealt):
        left.remove(key)  # ValueError where a row is not there, or not there any more
    # At most one batch less one token stays out of each of the four buffers.
    assert len(left) < 4 * 64


def test_the_order_is_a_function_of_the_seed(taboo_pair, texts):
    first, again, other = (
        next(new_loader(taboo_pair, texts[0], seed=s).batches())[0] for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_passes_over_the_text_differ(taboo_pair, texts):
    loader = new_loader(taboo_pair, texts[0][:20])
    n = n_batches_a_pass(loader)
    batches = [b for b, _ in islice(loader.batches(), n + 1)]
    assert not torch.equal(batches[0], batches[n])


@pytest.mark.parametrize("after", [1, 7, 13, 25])
def test_any_position_can_be_returned_to_bit_for_bit(taboo_pair, texts, after):
    loader = new_loader(taboo_pair, texts[0][:50])
    stream = list(islice(loader.batches(), after + 12))
    resumed = list(islice(new_loader(taboo_pair, texts[0][:50]).batches(stream[after - 1][1]), 12))
    for (batch, position), (expected, expected_position) in zip(
        resumed, stream[after:], strict=True
    ):
        assert torch.equal(batch, expected)
        assert position == expected_position


def test_a_buffer_holds_two_batches_at_least(taboo_pair, texts):
    loader = new_loader(taboo_pair, texts[0], batch_size=512, buffer_contexts=1)
    _, position = list(islice(loader.batches(), 2))[1]
    assert position == Position(n_passes=0, buffer=0, batch=2)


def test_a_batch_larger_than_the_text_is_refused(taboo_pair, texts):
    with pytest.raises(ValueError, match=r"one batch is 100,000 tokens, but the text has only"):
        new_loader(taboo_pair, texts[0], batch_size=100_000)
