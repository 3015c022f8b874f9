"""Every table of the room is loaded as it was saved, NaN included."""

from collections.abc import Callable
from dataclasses import fields, replace
from math import nan

import pytest
import torch
from analysis.hand_made import by_nu, crosscoder, firing, latent_measures

from tl_crosscoder import agreement_over_seeds
from tl_crosscoder.analysis.agreement import agreement
from tl_crosscoder.analysis.geometry import decoupled_pairs, similar_latents
from tl_crosscoder.analysis.latent_scaling import DifferenceByLatent
from tl_crosscoder.analysis.latents import in_order
from tl_crosscoder.analysis.saelens_evals import SiteEval, SiteEvals
from tl_crosscoder.results.tables import Tabular

# Latent 0 is finetuned-only, 1 base-only in the same direction, 2 writes nothing.
DICTIONARY = crosscoder(
    torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]),
    torch.tensor([[6.0, 8.0], [0.0, 0.0], [0.0, 0.0]]),
)
TABLES: dict[str, Callable[[], Tabular]] = {
    "agreement": lambda: agreement(DICTIONARY, DICTIONARY),
    "agreement_over_seeds": lambda: agreement_over_seeds([DICTIONARY] * 2, subsets=[[2], [0, 1]]),
    "decoupled_pairs": lambda: decoupled_pairs(DICTIONARY),
    "similar_latents": lambda: similar_latents(DICTIONARY, [0, 2]),
    "firing": lambda: replace(firing(torch.tensor([3.0, 0.0, 7.0]).double()), sources=("a", "b")),
    "scaling": lambda: by_nu("finetuned", [0.1, nan, 0.3], [0.2, 0.0, nan]),
    "difference": lambda: DifferenceByLatent(
        explained_difference=torch.tensor([0.1, nan]).double(),
        explained_difference_drop=torch.tensor([-0.1, 0.2]).double(),
    ),
    "ranking": lambda: in_order(
        latent_measures([0.1, 0.0], [0.9, 0.0], [20, 3]), [1, 0], order="x"
    ),
    "evals": lambda: SiteEvals(
        rows=tuple(
            SiteEval(site=site, **{f.name: 0.25 for f in fields(SiteEval)[1:]}) for site in "ab"
        ),
        n_tokens=7,
        n_contexts=2,
        left_out_ids=(0, 2),
        sae_lens_version="6",
    ),
}


@pytest.mark.parametrize("ending", ["json", "parquet"])
@pytest.mark.parametrize("name", TABLES)
def test_a_saved_table_is_loaded_equal(tmp_path, name, ending):
    table = TABLES[name]()
    loaded = type(table).load(table.save(tmp_path / f"table.{ending}"))
    for field in fields(type(table)):  # type: ignore[arg-type]
        one, other = getattr(table, field.name), getattr(loaded, field.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)
        else:
            assert repr(other) == repr(one)  # repr tells NaN from null


def test_a_table_of_another_kind_is_refused(tmp_path):
    path = TABLES["scaling"]().save(tmp_path / "scaling.json")
    with pytest.raises(ValueError, match="holds a LatentScaling, not a DifferenceByLatent"):
        DifferenceByLatent.load(path)
    frame = TABLES["scaling"]().to_frame()
    assert frame["beta_error.0"].isna().tolist() == [False, True, False]
