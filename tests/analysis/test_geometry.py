"""Norms and angles of decoder rows, and the search for near ones."""

import pytest
import torch
from analysis.hand_made import crosscoder, sites
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models.random_models import random_crosscoder
from torch.nn.functional import cosine_similarity

from tl_crosscoder import Crosscoder
from tl_crosscoder.analysis import geometry
from tl_crosscoder.analysis.geometry import (
    LATENT_CLASSES,
    decoder_cosine,
    decoupled_pairs,
    delta_norm,
    latent_class_ids,
    latent_rows,
    nearest,
    pairs_above,
    relative_decoder_norm,
    row_cosine,
    similar_latents,
)

BASE = torch.tensor([[0.0, 0.0], [6.0, 8.0], [1.0, 0.0], [0.0, 5.0], [0.0, 0.0]])
FINETUNED = torch.tensor([[3.0, 4.0], [0.0, 0.5], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
ENCODER = torch.tensor(
    [
        [0.0, 4.0, 1.0, 0.0, 1.0],
        [0.0, 3.0, 0.0, 1.0, 1.0],
        [3.0, 0.0, 0.0, 0.0, 1.0],
        [4.0, 9.0, 2.0, -2.0, 1.0],
    ]
)


@pytest.fixture
def dictionary() -> Crosscoder:
    """Of two dimensions: 0 finetuned-only, 1 and 3 base-only, 2 shared, 4 dead."""
    made = crosscoder(BASE, FINETUNED)
    made.load_state_dict(made.state_dict() | {"W_enc": ENCODER})
    return made


def test_decoupled_pairs_by_hand(dictionary):
    found = decoupled_pairs(dictionary, threshold=0.5)
    # Latent 0 writes (3, 4) to the fine-tuned model. To the base, 1 writes (6, 8): cosine 1, with
    # delta-norm 1/2 (1 - 9.5/10) = 0.025; 3 writes (0, 5): cosine 4/5, delta-norm 0. They read
    # (3, 4), and (4, 3), (0, 1): cosines 24/25 and 4/5.
    values = [(r.finetuned_only, r.base_only, r.base_delta_norm) for r in found.rows]
    assert values == [(0, 1, pytest.approx(0.025)), (0, 3, 0.0)]
    assert [r.cosine for r in found.rows] == pytest.approx([1.0, 0.8])
    assert [r.encoder_cosine for r in found.rows] == pytest.approx([0.96, 0.8])
    assert (found.n_finetuned_only, found.n_base_only) == (1, 2)
    assert [r.base_only for r in decoupled_pairs(dictionary).rows] == [1]
    # The other way round, the same pairs change places.
    swapped = decoupled_pairs(dictionary, threshold=0.5, sites=("finetuned", "base"))
    assert [(r.finetuned_only, r.base_only) for r in swapped.rows] == [(1, 0), (3, 0)]


def test_similar_latents_by_hand(dictionary):
    found = similar_latents(dictionary, [2, 4, 0], k=2, site="finetuned")
    # (1, 0) is at 3/5 from (3, 4) and at 0 from (0, 1/2); (3, 4) at 4/5 from (0, 1/2) and 3/5 from
    # (1, 0); a latent that writes nothing has no neighbours.
    values = [(r.latent, r.rank, r.neighbour, pytest.approx(r.cosine)) for r in found.rows]
    assert values == [(2, 1, 0, 0.6), (2, 2, 1, 0.0), (0, 1, 1, 0.8), (0, 2, 2, 0.6)]
    both = similar_latents(dictionary, [1], k=1)
    # (6, 8 | 0, 1/2) and (0, 5 | 0, 0): 40 / (5 * sqrt(100.25))
    assert [(r.neighbour, r.cosine) for r in both.rows] == [(3, pytest.approx(8 / 100.25**0.5))]
    assert similar_latents(dictionary, [0], k=1, by="encoder", site="base").rows == ()


def test_nobody_is_its_own_neighbour_nor_lost_among_copies():
    rows = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    made = crosscoder(rows, rows)
    for latent in range(4):
        found = [r.neighbour for r in similar_latents(made, [latent], k=3).rows]
        assert sorted([*found, latent]) == [0, 1, 2, 3]


def test_folded_scales_change_no_row():
    """The normalised space is where training was, whatever the saved weights look like."""
    made = random_crosscoder(sites(), 6)
    before = [latent_rows(made, by=by) for by in ("decoder", "encoder")]
    made.fold_site_scales_([0.25, 3.0])
    for by, rows in zip(("decoder", "encoder"), before, strict=True):
        torch.testing.assert_close(latent_rows(made, by=by), rows)
    finetuned = latent_rows(made, sites=["finetuned"])
    torch.testing.assert_close(finetuned, 3 * made.decoder("finetuned"))


def test_refusals_name_what_is_valid(dictionary):
    with pytest.raises(ValueError, match=r"latents \[5, -1\].*0 to 4"):
        similar_latents(dictionary, [5, -1, 0])
    with pytest.raises(ValueError, match=r"site 'chat'.*'base', 'finetuned'"):
        similar_latents(dictionary, [0], site="chat")
    with pytest.raises(ValueError, match=r"two sites of one width among.*base first"):
        decoupled_pairs(dictionary, sites=("base", "base"))


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


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_blocks_give_what_the_whole_matrix_gives(monkeypatch, chunk):
    monkeypatch.setattr(geometry, "CHUNK", chunk)
    queries, keys = random_rows(13), random_rows(9, seed=1)
    queries[4] = keys[2] = 0
    matrix = cosine_similarity(queries[:, None], keys[None], dim=-1)
    matrix[:, 2] = matrix[4] = -torch.inf
    values, positions = matrix.topk(3)
    cosine, where = nearest(queries, keys, k=3)
    others = torch.arange(13) != 4
    torch.testing.assert_close(cosine[others], values[others])
    torch.testing.assert_close(where[others], positions[others])
    assert cosine[4].isnan().all()
    assert (where[4] == -1).all()
    cosine, pairs = pairs_above(queries, keys, threshold=0.4)
    assert sorted(pairs.tolist()) == (matrix > 0.4).nonzero().tolist()
    assert len(pairs) > 3
    torch.testing.assert_close(cosine, matrix[pairs[:, 0], pairs[:, 1]])
    assert (cosine.diff() <= 0).all()
    # A zero row is in no pair, however low the threshold.
    assert len(pairs_above(queries, keys, threshold=-2)[1]) == 12 * 8


def test_lengths_do_not_matter():
    queries, keys = random_rows(4), random_rows(6, seed=1)
    lengths = torch.tensor([1e-12, 1e-3, 1.0, 1e3, 1e12, 7.0])
    plain, scaled = nearest(queries, keys, k=2), nearest(queries, keys * lengths[:, None], k=2)
    torch.testing.assert_close(scaled[0], plain[0])
    assert (scaled[1] == plain[1]).all()


def test_no_queries_and_fewer_keys_than_requested():
    assert [t.shape for t in nearest(random_rows(0), random_rows(3), k=2)] == [(0, 2)] * 2
    assert [t.shape for t in nearest(random_rows(2), random_rows(1), k=2)] == [(2, 1)] * 2
    with pytest.raises(ValueError, match="must be 1 or more"):
        nearest(random_rows(2), random_rows(3), k=0)


def classes(delta_norms: torch.Tensor) -> list[str]:
    return [LATENT_CLASSES[i] for i in latent_class_ids(delta_norms).tolist()]


def test_norms_by_hand():
    base = torch.tensor([3.0, 0.0, 2.0, 1.0, 5.0, 0.0])
    finetuned = torch.tensor([1.0, 2.0, 2.0, 4.0, 0.0, 0.0])
    # 1/(3+1), 2/(0+2), 2/(2+2), 4/(1+4), 0/(5+0), and no norm at all.
    relative = torch.tensor([0.25, 1.0, 0.5, 0.8, 0.0, torch.nan])
    # 1/2 (1 - 2/3), 1/2 (1 + 2/2), 1/2 (1 + 0), 1/2 (1 + 3/4), 1/2 (1 - 5/5)
    delta = torch.tensor([1 / 6, 1.0, 0.5, 0.875, 0.0, torch.nan])
    torch.testing.assert_close(relative_decoder_norm(base, finetuned), relative, equal_nan=True)
    torch.testing.assert_close(delta_norm(base, finetuned), delta, equal_nan=True)
    assert classes(delta) == [
        "other", "finetuned-only", "shared", "other", "base-only", "other"
    ]  # fmt: skip


def test_decoder_cosine_by_hand():
    base = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    finetuned = torch.tensor([[4.0, 3.0], [0.0, 5.0], [-3.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    # (12 + 12) / (5 * 5), orthogonal, opposite, and 0 where one row is zero, or NaN where it has to
    # be told from a right angle.
    expected = torch.tensor([0.96, 0.0, -1.0, 0.0, 0.0])
    torch.testing.assert_close(decoder_cosine(base, finetuned), expected)
    expected[3:] = torch.nan
    torch.testing.assert_close(row_cosine(base, finetuned), expected, equal_nan=True)


NORMS = st.one_of(st.just(0.0), st.floats(2**-10, 2**10, width=32))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(NORMS, NORMS), min_size=1, max_size=8))
def test_swapping_the_models_mirrors_everything(pairs):
    base, finetuned = torch.tensor(pairs).T
    deltas = delta_norm(base, finetuned)
    mirrored = delta_norm(finetuned, base)
    torch.testing.assert_close(mirrored, 1 - deltas, equal_nan=True)
    torch.testing.assert_close(
        relative_decoder_norm(finetuned, base),
        1 - relative_decoder_norm(base, finetuned),
        equal_nan=True,
    )
    # A value within rounding of a border may fall on either side of it.
    assume(all(abs(d - b) > 1e-6 for d in deltas.tolist() for b in (0.1, 0.4, 0.6, 0.9)))
    swap = {"base-only": "finetuned-only", "finetuned-only": "base-only"}
    assert classes(mirrored) == [swap.get(c, c) for c in classes(deltas)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("border", "at", "below", "above"),
    [
        (0.1, "base-only", "base-only", "other"),
        (0.4, "shared", "other", "shared"),
        (0.6, "shared", "shared", "other"),
        (0.9, "finetuned-only", "other", "finetuned-only"),
    ],
)
def test_a_border_belongs_to_the_named_class(border, at, below, above, dtype):
    border = torch.tensor(border, dtype=dtype)
    neighbours = [torch.nextafter(border, border.new_tensor(to)) for to in (0.0, 1.0)]
    assert classes(torch.stack([border, *neighbours])) == [at, below, above]
