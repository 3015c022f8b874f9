import threading
import time
from contextlib import closing
from itertools import islice

import pytest
import torch

from tl_crosscoder.data.harvest import harvest_rows
from tl_crosscoder.data.loader import ActivationLoader, Position, prefetched


def new_loader(source, text, **fields):
    options = {"batch_size": 64, "buffer_contexts": 20, "harvest_batch_size": 8}
    return ActivationLoader(source, text, **(options | fields))


def n_batches_a_pass(loader):
    for i, (_, position) in enumerate(loader.batches()):
        if position.n_passes > 0:
            return i
    raise AssertionError


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


def test_the_order_is_a_function_of_the_seed_and_passes_differ(taboo_pair, texts):
    text = texts[0][:20]
    loaders = (new_loader(taboo_pair, text, seed=seed) for seed in (1, 1, 2))
    first, again, other = (next(loader.batches())[0] for loader in loaders)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    next_pass, _ = next(new_loader(taboo_pair, text, seed=1).batches(Position(n_passes=1)))
    assert not torch.equal(first, next_pass)


def test_each_pass_takes_the_contexts_in_another_order(taboo_pair, texts):
    loader = new_loader(taboo_pair, texts[0][:40])
    orders = [loader._order(n).tolist() for n in (0, 1, 2)]
    assert [sorted(order) for order in orders] == [[*range(40)]] * 3
    assert len({tuple(order) for order in orders}) == 3


def test_any_position_can_be_returned_to_bit_for_bit(taboo_pair, texts):
    """Within a buffer, at its end, at the end of a pass, and in the next pass."""
    text = texts[0][:50]
    n = n_batches_a_pass(new_loader(taboo_pair, text))
    stream = list(islice(new_loader(taboo_pair, text).batches(), n + 4))
    for after in (1, 9, n, n + 2):
        resumed = new_loader(taboo_pair, text).batches(stream[after - 1][1])
        for (batch, position), expected in zip(islice(resumed, 2), stream[after:], strict=False):
            assert torch.equal(batch, expected[0])
            assert position == expected[1]


@pytest.mark.parametrize("what", ["pair", "difference", "unpacked"])
def test_live_and_cached_loaders_deal_the_same_batches(taboo_pair, small, cache, unpacked, what):
    live, cached, text = taboo_pair, cache, small[0]
    if what == "difference":
        live, cached = taboo_pair.difference(), cache.difference()
    if what == "unpacked":
        text, cached = unpacked[0][:50], unpacked[1]
    of_cache = (unpacked[1] if what == "unpacked" else cache).training
    # Batches of one shape give the same bits; cut at other lengths, they differ in the last ones.
    same, n = (torch.allclose, 4) if what == "unpacked" else (torch.equal, 8)
    options = {"batch_size": 32, "buffer_contexts": 16, "harvest_batch_size": n, "seed": 5}
    dealt = [
        list(islice(ActivationLoader(*given, **options).batches(), 30))
        for given in ((live, text), (cached, of_cache))
    ]
    for (x, at), (y, cached_at) in zip(*dealt, strict=True):
        assert same(x, y, **({} if same is torch.equal else {"atol": 1e-4, "rtol": 1e-4}))
        assert at == cached_at


def test_a_buffer_holds_two_batches_at_least(taboo_pair, texts):
    loader = new_loader(taboo_pair, texts[0], batch_size=512, buffer_contexts=1)
    _, position = list(islice(loader.batches(), 2))[1]
    assert position == Position(n_passes=0, buffer=0, batch=2)


# --- items made ahead -----------------------------------------------------------------------------


def is_over() -> bool:
    return not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize("n", [0, 1, 5])
def test_items_come_in_order_and_end(n):
    assert list(prefetched(iter(range(20)), n)) == list(range(20))
    assert is_over()


def test_an_error_comes_where_its_item_would():
    def items():
        yield 1
        raise OSError("the disk is gone")

    made = prefetched(items(), 4)
    assert next(made) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(made)
    assert is_over()


def test_at_most_n_are_made_ahead():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    stream = prefetched(items(), 3)
    assert next(stream) == 0
    time.sleep(0.3)
    assert len(made) <= 1 + 3 + 1  # taken, waiting, and in the maker's hand
    stream.close()
    assert is_over()


def test_prefetched_batches_are_the_same_and_the_thread_ends(taboo_pair, cache):
    for source in (cache, taboo_pair):
        plain = list(islice(new_loader(source, cache.training).batches(), 25))
        with closing(new_loader(source, cache.training, prefetch=3).batches()) as batches:
            ahead = list(islice(batches, 25))
        for (x, at), (y, ahead_at) in zip(plain, ahead, strict=True):
            assert torch.equal(x, y)
            assert at == ahead_at
    assert is_over()
