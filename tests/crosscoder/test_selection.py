"""The search for active latents against the reference, and the bounds that it rests on.

Most problems here are exact: float32 makes no rounding error in them, bfloat16 makes large ones.
So the same entries are asked for, ties included, and not nearly the same.
"""

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import nano_crosscoder as nano
from torch import Tensor

from tl_crosscoder.crosscoder.sparse import selection
from tl_crosscoder.crosscoder.sparse.codes import GROUP, at_least
from tl_crosscoder.crosscoder.sparse.selection import Scores, batch_topk, token_topk

few = settings(max_examples=40, deadline=None)
GUESSES = [None, 0.0, 1e-30, 0.3, 5.0, 1e30, float("inf"), float("nan")]
with_and_without_bounds = pytest.mark.parametrize(
    ("dtype", "prefilter"),
    [(torch.float32, True), (torch.float32, False), (torch.float64, False)],
    ids=["bounds", "float32", "float64"],
)


class Numbers:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, *shape: int, most: int) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=self.generator).double()

    def powers_of_two(self, *shape: int, most: int) -> Tensor:
        return 2 ** self.integers(*shape, most=most)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


def grid(numbers: Numbers, n: int, d: int, d_sae: int) -> dict[str, Tensor]:
    """Quarters, every latent twice: many ties."""
    pairs = torch.arange(d_sae) // 2 * 2
    return {
        "x": numbers.integers(n, d, most=4) / 4,
        "W": (numbers.integers(d_sae, d, most=4) / 4)[pairs],
        "bias": (numbers.integers(d_sae, most=4) / 4)[pairs],
        "scale": numbers.powers_of_two(d_sae, most=1)[pairs],
    }


def negative(numbers: Numbers, n: int, d: int, d_sae: int) -> dict[str, Tensor]:
    """No score is positive: |x w| is at most d <= 8."""
    return grid(numbers, n, d, d_sae) | {"bias": torch.full((d_sae,), -9.0).double()}


def wide(numbers: Numbers, n: int, d: int, d_sae: int) -> dict[str, Tensor]:
    """Ten bits, of which bfloat16 keeps eight; rows and latents over six orders of magnitude.

    d <= 8 products of 20 bits have sums of 23.
    """
    return {
        "x": numbers.integers(n, d, most=1023) * numbers.powers_of_two(n, 1, most=10),
        "W": numbers.integers(d_sae, d, most=1023) * numbers.powers_of_two(d_sae, 1, most=10),
        "bias": torch.zeros(d_sae).double(),
        "scale": numbers.powers_of_two(d_sae, most=10),
    }


def cancelling(numbers: Numbers, n: int, d: int, d_sae: int) -> dict[str, Tensor]:
    """The bias takes away nearly all of the first token's product: bfloat16 sees noise alone."""
    x = numbers.integers(1, d, most=1023) + numbers.integers(n, d, most=2)
    W = numbers.integers(d_sae, d, most=500)
    bias = numbers.integers(d_sae, most=8) - W @ x[0]
    return {"x": x, "W": W, "bias": bias, "scale": numbers.powers_of_two(d_sae, most=3)}


EXACT = [grid, negative, wide, cancelling]


@st.composite
def problems(draw, kinds=EXACT) -> dict[str, Tensor]:
    numbers = Numbers(draw(st.integers(0, 2**31)))
    d_sae = draw(st.one_of(st.integers(2, 40), st.sampled_from([16, 32, 48, 64])))
    kind = draw(st.sampled_from(kinds))
    problem = kind(numbers, draw(st.integers(1, 30)), draw(st.integers(1, 8)), d_sae)
    if draw(st.booleans()):
        problem["floor"] = numbers.integers(d_sae, most=4) / 4
    return problem


@st.composite
def column_parts(draw, d_sae: int) -> list[slice]:
    """One to three ranges of latents, one after the other."""
    inner = draw(st.lists(st.integers(1, d_sae - 1), max_size=2, unique=True))
    edges = [0, *sorted(inner), d_sae]
    return [slice(a, b) for a, b in pairwise(edges)]


def scores_of(problem: dict[str, Tensor], dtype: torch.dtype, prefilter: bool) -> Scores:
    return Scores(**{k: v.to(dtype) for k, v in problem.items()}, prefilter=prefilter)


def dense_scores(problem: dict[str, Tensor]) -> Tensor:
    """In float64, `[batch, d_sae]`."""
    pre = problem["x"] @ problem["W"].T + problem["bias"]
    return (pre - problem.get("floor", 0)) * problem["scale"]


def positions_of(kept: Tensor, part: slice, d_sae: int) -> list[int]:
    rows, columns = kept.nonzero().unbind(dim=1)
    return (rows * d_sae + columns + part.start).tolist()


def assert_found(found: selection.Found, expected: list[int], problem: dict[str, Tensor]) -> None:
    assert found.positions.tolist() == expected
    pre = problem["x"] @ problem["W"].T + problem["bias"]
    assert found.pre.tolist() == pre.flatten()[found.positions].tolist()


@with_and_without_bounds
@few
@given(data=st.data())
def test_the_search_finds_what_the_reference_keeps(dtype, prefilter, data):  # spec: C6 C7
    problem = data.draw(problems())
    scores, dense = scores_of(problem, dtype, prefilter), dense_scores(problem)
    k = data.draw(st.sampled_from([0.01, 0.5, 1, 2.5, 7, 100]))
    guess = data.draw(st.sampled_from(GUESSES))
    with patch.object(selection, "CHUNK", 7):
        for part in data.draw(column_parts(scores.d_sae)):
            own = dense[:, part]
            expected = positions_of(nano.batch_topk(own, k) > 0, part, scores.d_sae)
            for _ in range(2):  # Again with the limit that it gave for the next batch.
                found, guess = batch_topk(scores, round(k * len(own)), part, guess=guess)
                assert_found(found, expected, problem)
            n = data.draw(st.integers(1, own.shape[1]))
            expected = positions_of(nano.topk(own, n) > 0, part, scores.d_sae)
            assert_found(token_topk(scores, n, part), expected, problem)


def spread(numbers: Numbers, n: int, d: int, d_sae: int) -> dict[str, Tensor]:
    """Rounded in float32 too: rows of 1e-3 to 1e3, latents over six orders of magnitude."""
    return {
        "x": numbers.normal(n, d) * 10 ** (3 * numbers.normal(n, 1).clamp(-1, 1)),
        "W": numbers.normal(d_sae, d) * 10 ** (3 * numbers.normal(d_sae, 1).clamp(-1, 1)),
        "bias": numbers.normal(d_sae),
        "scale": 10 ** numbers.normal(d_sae).clamp(-3, 3),
    }


def nearly_cancelling(numbers: Numbers, n: int, d: int, d_sae: int) -> dict[str, Tensor]:
    """All tokens are nearly one, at which every pre-activation nearly vanishes."""
    x, W = numbers.normal(1, d) + 1e-3 * numbers.normal(n, d), numbers.normal(d_sae, d)
    bias = 1e-3 * numbers.normal(d_sae) - W @ x[0]
    return {"x": x, "W": W, "bias": bias, "scale": 10 ** numbers.normal(d_sae).clamp(-3, 3)}


def midpoints(numbers: Numbers, n: int, d: int, d_sae: int) -> dict[str, Tensor]:
    """1 + 2^-8, halfway between two numbers of bfloat16, and what lies just beside it.

    All errors go one way where |x| and |w| do: the bounds have nothing to spare but their factors.
    """
    ulp = 2.0**-23

    def beside(*shape: int) -> Tensor:
        return 1 + 2.0**-8 + ulp * numbers.integers(*shape, most=2)

    sign = 1 - 2 * (numbers.integers(1, d, most=1) > 0).double()
    return {
        "x": sign * beside(n, d) * numbers.powers_of_two(n, 1, most=3),
        "W": sign * beside(d_sae, d) * numbers.powers_of_two(d_sae, 1, most=3),
        "bias": beside(d_sae) * numbers.integers(d_sae, most=1),
        "scale": beside(d_sae) * numbers.powers_of_two(d_sae, most=3),
    }


ROUNDED = [spread, nearly_cancelling, midpoints]


@few
@given(problem=problems(EXACT + ROUNDED), part_of=st.data())
def test_what_reaches_a_limit_is_found_by_bounds(problem, part_of):
    """The exact scores of a few tokens are the limit in turn: reached, and by nothing at all."""
    scores = scores_of(problem, torch.float32, True)
    everything = torch.arange(len(scores.x) * scores.d_sae)
    exact = scores.of(found_at(scores, everything))
    part = part_of.draw(st.sampled_from(part_of.draw(column_parts(scores.d_sae))))
    own = exact.view(-1, scores.d_sae)[:, part]
    for limit in own[::11].unique().clamp(min=0).tolist():
        found, _ = scores.reaching(limit, part)
        expected = positions_of(own >= limit, part, scores.d_sae)
        assert set(expected) <= set(found.positions.tolist())
        assert torch.equal(found.pre, scores.pre_at(found.positions))


def found_at(scores: Scores, positions: Tensor) -> selection.Found:
    return selection.Found(positions, scores.pre_at(positions))


@pytest.mark.parametrize("heavy", range(4))
def test_bounds_cover_what_float32_rounds_in_a_sum(heavy):
    """9/8 * 29/32 = 261/256 lies midway between two numbers of bfloat16, the even one below.

    The other terms are below half a unit of float32: whether they count depends on the order of
    the sum, and so does which of the two the bound and the score are rounded to.
    """
    tails = torch.randint(1, 4, (200, 4), generator=torch.Generator().manual_seed(heavy))
    x, W = torch.ones(1, 4), tails * 2.0**-25
    x[:, heavy], W[:, heavy] = 9 / 8, 29 / 32
    scores = Scores(x=x, W=W, bias=torch.zeros(200), scale=torch.ones(200), prefilter=True)
    exact = scores.of(found_at(scores, torch.arange(200)))
    for latent, limit in enumerate(exact.tolist()):
        assert latent in scores.reaching(limit, slice(0, 200))[0].positions


def assert_largest_up_to_rounding(
    kept: Tensor, dense: Tensor, rounding: Tensor, n_kept: int
) -> None:
    """No entry left out is larger than one kept by more than float32 can tell, nor kept below 0."""
    lower, upper = dense - rounding, dense + rounding
    assert (upper[kept] >= 0).all()
    assert min(n_kept, int((lower > 0).sum())) <= int(kept.sum()) <= n_kept
    if kept.any() and not kept.all():
        assert upper[kept].min() >= lower[~kept].max() or int(kept.sum()) < n_kept


@pytest.mark.parametrize("prefilter", [True, False])
@few
@given(problem=problems(ROUNDED), k=st.integers(1, 9), guess=st.sampled_from(GUESSES))
def test_where_float32_rounds_the_largest_are_found_up_to_its_rounding(
    prefilter, problem, k, guess
):
    scores, dense = scores_of(problem, torch.float32, prefilter), dense_scores(problem)
    k, part = min(k, scores.d_sae), slice(0, scores.d_sae)
    size = problem["x"].norm(dim=-1, keepdim=True) * problem["W"].norm(dim=-1)
    size = size + problem["bias"].abs() + torch.as_tensor(problem.get("floor", 0.0)).abs()
    rounding = 1e-5 * size * problem["scale"]
    kept = torch.zeros_like(dense, dtype=torch.bool)
    kept.view(-1)[batch_topk(scores, k * len(dense), part, guess=guess)[0].positions] = True
    assert_largest_up_to_rounding(kept, dense, rounding, k * len(dense))
    kept = torch.zeros_like(dense, dtype=torch.bool)
    kept.view(-1)[token_topk(scores, k, part).positions] = True
    for own in zip(kept, dense, rounding, strict=True):
        assert_largest_up_to_rounding(*own, k)


def test_batch_topk_by_hand():
    # Scores (x - 1) * [1, 2, 4] are [[1, 2, 4], [2, 4, 8]]: of the two 4s the first token's stays.
    scores = Scores(
        x=torch.tensor([[1.0], [2.0]]),
        W=torch.ones(3, 1),
        bias=torch.ones(3),
        scale=torch.tensor([1.0, 2.0, 4.0]),
        floor=torch.ones(3),
    )
    found, following = batch_topk(scores, 2, slice(0, 3))
    assert found.positions.tolist() == [2, 5]
    assert found.pre.tolist() == [2.0, 3.0]  # Without floor and scale.
    # 1.3 * 2 rounds to 3, of which two were found: the limit of the next batch is the last one.
    assert following == 4.0


@with_and_without_bounds
def test_with_nothing_positive_nothing_is_found(dtype, prefilter):
    """A batch that no latent answers to: after a jump of the loss, say."""
    scores = scores_of(negative(Numbers(0), 4, 3, 32), dtype, prefilter)
    found, following = batch_topk(scores, 8, slice(0, 32), guess=1.0)
    assert found.positions.tolist() == token_topk(scores, 2, slice(0, 32)).positions.tolist() == []
    assert following == selection.TINY


SPECIAL = [0.0, -0.0, 1.0, 1.0078125, -1.0, 2.0**-126, -(2.0**-126), float("inf"), -float("inf")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@few
@given(data=st.data())
def test_at_least_is_the_plain_comparison(dtype, data):
    """Also of infinities and of scores that equal the limit."""
    m, n = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 7, 15, 16, 17, 32, 48]))
    numbers = st.one_of(st.sampled_from(SPECIAL), st.floats(-1e6, 1e6))
    values = st.lists(numbers, min_size=m * n, max_size=m * n)
    scores = torch.tensor(data.draw(values), dtype=dtype).view(m, n)
    rows = data.draw(st.sampled_from([1, m]))
    limits = scores[:rows, :1].abs() if data.draw(st.booleans()) else scores.new_zeros(rows, 1)
    reached = scores >= limits
    if n % GROUP == 0:  # There bits are compared, and -0.0 counts as negative.
        reached &= ~scores.signbit()
    expected = reached.flatten().nonzero().squeeze(-1)
    assert at_least(scores, limits).tolist() == expected.tolist()
