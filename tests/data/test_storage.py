"""Number formats: what is read is what was stored, up to the rounding of each."""

import pytest
import torch

from tl_crosscoder.data.storage import bytes_per_row, decode, encode


@pytest.fixture
def rows(cache):
    return cache.read(torch.arange(cache.n_rows))


@pytest.mark.parametrize(
    ("store", "atol", "rtol"),
    [("float32", 0.0, 0.0), ("bfloat16", 0.0, 2**-8), ("float16", 1e-7, 2**-11)],
)
def test_float_formats_round_as_they_say(rows, cache, store, atol, rtol):
    stored = encode(rows, cache.sites, store)
    assert stored["rows"].dtype == getattr(torch, store)
    torch.testing.assert_close(decode(stored, cache.sites), rows, atol=atol, rtol=rtol)


def test_int8_errs_by_half_a_step_of_its_row_and_the_error_is_measured(
    taboo_pair, small, rows, cache, write, tmp_path
):
    rounded = write(taboo_pair, *small, tmp_path / "int8", store="int8")
    x, y = rows, rounded.read(torch.arange(cache.n_rows))
    step = x.abs().amax(dim=2, keepdim=True) / 127
    assert bool(((x - y).abs() <= step * 0.5001).all())
    measured = rounded.manifest["storage_error"]
    error, total = ((t**2).sum(dim=(0, 2)).double() for t in (x - y, x))
    assert measured["base"] == pytest.approx((error / total)[0].item(), rel=1e-4)
    assert measured["finetuned"] == pytest.approx((error / total)[1].item(), rel=1e-4)
    difference, its_error = (t[:, 1] - t[:, 0] for t in (x, x - y))
    expected = (its_error**2).sum() / (difference**2).sum()
    assert measured["difference"] == pytest.approx(expected.item(), rel=1e-4)
    # One byte a value and four a scale, in place of four a value.
    assert bytes_per_row(cache.sites, "int8") == 2 * 96 + 2 * 4
    assert rounded.n_bytes < 0.35 * cache.n_bytes


def test_a_row_of_zeros_stays_zeros_in_int8(cache):
    rows = torch.zeros(3, 2, 96)
    assert torch.equal(decode(encode(rows, cache.sites, "int8"), cache.sites), rows)


def test_float16_refuses_what_it_cannot_hold(cache):
    with pytest.raises(ValueError, match="an activation of 100,000 does not fit in float16"):
        encode(torch.full((1, 2, 96), 1e5), cache.sites, "float16")
