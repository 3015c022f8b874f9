import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tl_crosscoder.analysis.norms import (
    LATENT_CLASSES,
    decoder_cosine,
    delta_norm,
    latent_class_ids,
    relative_decoder_norm,
)


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
    # (12 + 12) / (5 * 5), orthogonal, opposite, and 0 where one row is zero
    expected = torch.tensor([0.96, 0.0, -1.0, 0.0, 0.0])
    torch.testing.assert_close(decoder_cosine(base, finetuned), expected)


@given(
    ratio=st.floats(0, 1, width=32), finetuned=st.floats(2**-10, 2**10, width=32, exclude_min=True)
)
def test_both_norms_are_functions_of_the_ratio_of_the_two(ratio, finetuned):
    """With r = ||d^0|| / ||d^1|| <= 1: Delta-norm = 1 - r/2 and R = 1 / (1 + r)."""
    norms = torch.tensor([ratio * finetuned]), torch.tensor([finetuned])
    assert delta_norm(*norms).item() == pytest.approx(1 - ratio / 2, abs=1e-6)
    assert relative_decoder_norm(*norms).item() == pytest.approx(1 / (1 + ratio), abs=1e-6)


NORMS = st.one_of(st.just(0.0), st.floats(2**-10, 2**10, width=32))


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
