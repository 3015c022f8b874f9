import pytest
import torch

from tl_crosscoder import Site
from tl_crosscoder.models.site import compared_sites, row_shape, site_parts, subtracted_sites
from tl_crosscoder.train.metrics import check_rows, row_factors, scales_of_rows


def sites(*places: tuple[str, int]) -> list[Site]:
    return [
        Site(name=str(i), d_model=width, hook_name=hook, model_name="m")
        for i, (hook, width) in enumerate(places)
    ]


ONE, TWO, THREE = (sites(*[("a", 4)] * n) for n in (1, 2, 3))
UNEQUAL = sites(("a", 4), ("b", 6))


@pytest.mark.parametrize(
    ("of", "shape"), [(ONE, (4,)), (TWO, (2, 4)), (THREE, (3, 4)), (UNEQUAL, (10,))]
)
def test_rows_are_stacked_where_several_sites_have_one_width(of, shape):
    assert row_shape(of) == shape
    rows = torch.arange(5.0 * sum(s.d_model for s in of)).view(5, *shape)
    parts = site_parts(rows, of)
    assert [p.shape for p in parts] == [(5, s.d_model) for s in of]
    assert torch.equal(torch.cat(parts, dim=1), rows.flatten(1))
    assert parts[0].data_ptr() == rows.data_ptr()


@pytest.mark.parametrize(
    ("places", "compared"),
    [
        ([("a", 4)], None),
        ([("a", 4), ("a", 4)], (0, 1)),
        # Base, SFT, RL: the last model.
        ([("a", 4)] * 3, (0, 2)),
        # Two layers of one model: the last layer.
        ([("a", 4), ("b", 4)], (0, 1)),
        # Two layers of two models, model by model: the first layer in both.
        ([("a", 4), ("b", 4), ("a", 4), ("b", 4)], (0, 2)),
    ],
)
def test_which_sites_stand_for_base_and_finetuned(places, compared):
    assert compared_sites(sites(*places)) == subtracted_sites(sites(*places)) == compared


def test_sites_of_unequal_width_are_compared_and_not_subtracted():
    assert compared_sites(UNEQUAL) == (0, 1)
    assert subtracted_sites(UNEQUAL) is None


@pytest.mark.parametrize("of", [ONE, TWO, THREE, UNEQUAL])
def test_scaled_rows_have_the_width_as_mean_squared_norm(of):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1000, *row_shape(of), generator=generator)
    for i, part in enumerate(site_parts(rows, of)):
        part.mul_(10.0 ** (i - 1))
    scales = scales_of_rows(rows, of)
    assert len(scales) == len(of)
    scaled = site_parts(rows * row_factors(scales, of), of)
    found = [part.pow(2).sum(dim=1).mean().item() for part in scaled]
    assert found == pytest.approx([s.d_model for s in of])


def test_the_scales_of_stacked_rows_are_those_of_the_same_rows_side_by_side():
    rows = torch.randn(100, 2, 4, generator=torch.Generator().manual_seed(1))
    flat = [
        torch.tensor(scales_of_rows(part, [s]))
        for part, s in zip(site_parts(rows, TWO), TWO, strict=True)
    ]
    torch.testing.assert_close(torch.cat(flat), torch.tensor(scales_of_rows(rows, TWO)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, 1].fill_(3), r"site '1' \(a\) are the same for all .* 100 tokens.*is 6\)"),
        (lambda x: x[:, 0].zero_(), r"site '0' \(a\) are the same .*is 0\)"),
        # Beside so large an offset float32 has no digit left.
        (lambda x: x[:, 0].add_(1e15), r"the same for all .* up to rounding .* is 2e\+15\)"),
        (lambda x: x[:, 1].mul_(1e20), r"site '1' \(a\) reach .*e\+20: their squares are beyond"),
        (lambda x: x.resize_(0, 2, 4), "are empty: the masks leave out every token"),
    ],
)
def test_a_site_of_which_nothing_can_be_learned_is_refused(change, message):
    rows = torch.randn(100, 2, 4, generator=torch.Generator().manual_seed(1))
    check_rows(rows, TWO)
    change(rows)
    with pytest.raises(ValueError, match=message):
        check_rows(rows, TWO)
