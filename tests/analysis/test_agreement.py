import pytest
import torch
from hand_made import crosscoder

from tl_crosscoder.analysis.agreement import (
    agreement,
    agreement_over_seeds,
)


def rows(*angles: float | None) -> torch.Tensor:
    """Directions in the plane, in degrees; None writes nothing."""
    radians = torch.tensor([0.0 if a is None else a for a in angles]).deg2rad()
    found = torch.stack([radians.cos(), radians.sin()], dim=1)
    found[[a is None for a in angles]] = 0
    return found


def made(*angles: float | None):
    """Writes the same to both models."""
    return crosscoder(rows(*angles), rows(*angles))


def random_dictionary(n: int, *, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return crosscoder(*torch.randn(2, n, 6, generator=generator).unbind())


def test_by_hand():
    first, second = made(0, 20, 90, None), made(10, 180, 92)
    found = agreement(first, second)
    # 0 is 10 degrees from 10, and 20 too, 90 is 2 from 92; the nearest to 10 is 0 or 20.
    degrees = torch.tensor([10.0, 10.0, 2.0, torch.nan])
    torch.testing.assert_close(found.cosine, degrees.deg2rad().cos(), equal_nan=True)
    assert found.match.tolist() == [0, 0, 2, -1]
    assert found.is_mutual[:2].sum() == 1
    assert found.is_mutual.tolist()[2:] == [True, False]
    cos10, cos2 = degrees[1:3].deg2rad().cos().tolist()
    assert found.n_latents() == 3
    assert found.mean_max_cosine() == pytest.approx((2 * cos10 + cos2) / 3)
    assert found.mutual_share(0.9) == pytest.approx(2 / 3)
    assert found.mutual_share(0.99) == pytest.approx(1 / 3)
    assert found.mutual_share(0.9, subset=[2, 3]) == 1.0
    # The other way, 180 is nearest to 92's partner, and that is not mutual.
    back = agreement(second, first)
    assert back.match[1:].tolist() == [2, 2]
    assert back.is_mutual.tolist() == [True, False, True]


def test_equals_the_whole_matrix():
    first, second = random_dictionary(30, seed=0), random_dictionary(40, seed=1)
    unit = [c.W_dec / c.W_dec.norm(dim=1, keepdim=True) for c in (first, second)]
    matrix = (unit[0] @ unit[1].T).detach()
    best = matrix.max(dim=1)
    found = agreement(first, second)
    torch.testing.assert_close(found.cosine, best.values)
    assert torch.equal(found.match, best.indices)
    mutual = [matrix[:, j].argmax() == i for i, j in enumerate(best.indices)]
    assert found.is_mutual.tolist() == mutual
    assert 0 < sum(mutual) < 30


def test_one_site_alone_and_active_latents_alone():
    first = crosscoder(rows(0, 90), rows(0, 90))
    second = crosscoder(rows(0, 90), rows(90, 0))
    assert agreement(first, second, sites=["base"]).match.tolist() == [0, 1]
    assert agreement(first, second, sites=["finetuned"]).match.tolist() == [1, 0]
    active = torch.tensor([True, False]), torch.tensor([False, True])
    found = agreement(first, second, active=active, sites=["base"])
    assert found.match.tolist() == [1, -1]
    assert found.cosine[0].item() == pytest.approx(0.0, abs=1e-6)


def test_over_seeds():
    dictionaries = [random_dictionary(20, seed=s) for s in (0, 1, 1)]
    table = agreement_over_seeds(dictionaries)
    assert [(r.first, r.second) for r in table.rows] == [
        (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)
    ]  # fmt: skip
    same = table.rows[3]
    assert (same.mutual_share_above_0_7, same.mutual_share_above_0_9) == (1.0, 1.0)
    one = agreement(dictionaries[0], dictionaries[1])
    assert table.rows[0].mean_max_cosine == one.mean_max_cosine()
    assert table.rows[0].mutual_share_above_0_7 == one.mutual_share(0.7)
    best = [one.cosine.topk(4).indices, [0, 1], [2]]
    few = agreement_over_seeds(dictionaries, subsets=best)
    assert few.rows[0].mean_max_cosine == pytest.approx(one.cosine.topk(4).values.mean().item())
    assert [r.n_latents for r in few.rows] == [4, 4, 2, 2, 1, 1]


def test_refusals_name_what_is_valid():
    first, wide = made(0, 90), random_dictionary(3, seed=0)
    with pytest.raises(ValueError, match=r"of other sites.*same models at the same hooks"):
        agreement(first, wide)
    with pytest.raises(ValueError, match="site 'chat' is not in this crosscoder"):
        agreement(first, first, sites=["chat"])
    with pytest.raises(ValueError, match=r"masks of \[2, 1\].*of \[2, 2\]"):
        agreement(first, first, active=(torch.ones(2).bool(), torch.ones(1).bool()))
    with pytest.raises(ValueError, match=r"latents \[7\] of the subset.*0 to 1"):
        agreement(first, first).mutual_share(subset=[0, 7])
    with pytest.raises(ValueError, match="1 dictionaries and no subsets"):
        agreement_over_seeds([first])
