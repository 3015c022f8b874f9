import threading
import time

import pytest

from tl_crosscoder.data.loader import ActivationLoader, Worker, prefetched


def alive() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "prefetch"]


@pytest.mark.parametrize("n", [0, 1, 5])
def test_items_come_in_order_and_end(n):
    assert list(prefetched(iter(range(20)), n)) == list(range(20))
    assert not alive()


def test_an_error_comes_where_its_item_would():
    def items():
        yield 1
        raise OSError("the disk is gone")

    made = prefetched(items(), 4)
    assert next(made) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(made)
    assert not alive()


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
    assert not alive()


def test_workers_share_the_contexts_out(taboo_pair, texts):
    """Together they have each context once a pass; each has its own."""
    orders = []
    for rank in range(3):
        worker = Worker(rank=rank, n_workers=3)
        loader = ActivationLoader(taboo_pair, texts[0], batch_size=32, worker=worker)
        orders.append(loader._order(0).tolist())
    every = [context for order in orders for context in order]
    assert sorted(every) == list(range(len(texts[0])))
    assert max(map(len, orders)) - min(map(len, orders)) <= 1


def test_workers_that_cannot_be_are_refused(taboo_pair, texts):
    with pytest.raises(ValueError, match="worker 3 is not one of 3"):
        Worker(rank=3, n_workers=3)
    n = texts[0].n_tokens
    with pytest.raises(ValueError, match=r"for each worker"):
        ActivationLoader(taboo_pair, texts[0], batch_size=n, worker=Worker(rank=0, n_workers=2))
