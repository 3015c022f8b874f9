import pytest
import torch
from torch.nn.functional import cosine_similarity

from tl_crosscoder.analysis.similarity import nearest, pairs_above, row_cosine


def random_rows(n: int, d: int = 5, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_nearest_by_hand():
    queries = torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]])
    keys = torch.tensor([[3.0, 4.0], [0.0, 0.0], [5.0, 0.0], [0.0, 7.0]])
    cosine, where = nearest(queries, keys, k=4)
    # 3/5, none, 1, 0; then -4/5, none, 0, -1; and a query without a direction.
    nan = torch.nan
    expected = torch.tensor([[1.0, 0.6, 0.0, nan], [0.0, -0.8, -1.0, nan], [nan] * 4])
    torch.testing.assert_close(cosine, expected, equal_nan=True)
    assert where.tolist() == [[2, 0, 3, -1], [2, 0, 3, -1], [-1] * 4]


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_blocks_give_what_the_whole_matrix_gives(chunk, exclude_self):
    rows = random_rows(13)
    rows[4] = 0
    matrix = cosine_similarity(rows[:, None], rows[None], dim=-1)
    matrix[4], matrix[:, 4] = -torch.inf, -torch.inf
    if exclude_self:
        matrix.fill_diagonal_(-torch.inf)
    values, positions = matrix.topk(3)
    cosine, where = nearest(rows, rows, k=3, chunk=chunk, exclude_self=exclude_self)
    others = torch.arange(13) != 4
    torch.testing.assert_close(cosine[others], values[others])
    torch.testing.assert_close(where[others], positions[others])
    assert cosine[4].isnan().all()
    assert (where[4] == -1).all()


@pytest.mark.parametrize("chunk", [3, 100])
def test_pairs_above_are_those_of_the_whole_matrix(chunk):
    queries, keys = random_rows(8), random_rows(11, seed=1)
    keys[3] = queries[2] = 0
    matrix = cosine_similarity(queries[:, None], keys[None], dim=-1)
    cosine, pairs = pairs_above(queries, keys, threshold=0.4, chunk=chunk)
    assert sorted(pairs.tolist()) == (matrix > 0.4).nonzero().tolist()
    assert len(pairs) > 3
    torch.testing.assert_close(cosine, matrix[pairs[:, 0], pairs[:, 1]])
    assert (cosine.diff() <= 0).all()
    # A zero row is in no pair, however low the threshold.
    pairs = pairs_above(queries, keys, threshold=-2, chunk=chunk)[1]
    assert len(pairs) == 7 * 10


def test_lengths_do_not_matter():
    queries, keys = random_rows(4), random_rows(6, seed=1)
    lengths = torch.tensor([1e-12, 1e-3, 1.0, 1e3, 1e12, 7.0])
    plain, scaled = nearest(queries, keys, k=2), nearest(queries, keys * lengths[:, None], k=2)
    torch.testing.assert_close(scaled[0], plain[0])
    assert (scaled[1] == plain[1]).all()


def test_row_cosine_by_hand():
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[4.0, 3.0], [-2.0, 0.0], [1.0, 1.0]])
    # (12 + 12) / 25, opposite, and no angle with nothing.
    expected = torch.tensor([0.96, -1.0, torch.nan])
    torch.testing.assert_close(row_cosine(a, b), expected, equal_nan=True)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"chunk": 0}, {"exclude_self": True}])
def test_refuses_what_cannot_be(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        nearest(random_rows(2), random_rows(3), **wrong)


def test_nothing_asked_is_nothing_found():
    cosine, where = nearest(random_rows(0), random_rows(3), k=2)
    assert cosine.shape == where.shape == (0, 2)
    cosine, where = nearest(random_rows(2), random_rows(0), k=1)
    assert cosine.isnan().all()
    assert (where == -1).all()
