import pytest
import torch
from analysis.hand_made import sites

from tl_crosscoder import Crosscoder, CrosscoderConfig
from tl_crosscoder.crosscoder import crosscoder as inference
from tl_crosscoder.crosscoder.crosscoder import sparse_codes
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes


def dictionary(**options) -> Crosscoder:
    generator = torch.Generator().manual_seed(0)
    made = Crosscoder(CrosscoderConfig(d_in=12, d_sae=40, sites=sites(6), **options))
    made.load_state_dict(
        {n: torch.randn(t.shape, generator=generator) for n, t in made.state_dict().items()}
    )
    return made


@pytest.mark.parametrize("options", [{}, {"apply_b_dec_to_input": True}])
@pytest.mark.parametrize("n_rows", [1, 4096])
def test_entries_are_those_of_encode_to_the_bit(options, n_rows, monkeypatch):
    monkeypatch.setattr(inference, "N_ROWS", 7 if n_rows == 1 else n_rows)
    made = dictionary(**options)
    assert (made.threshold < 0).any()
    x = torch.randn(20, 2, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        codes = torch.cat([made.encode(rows) for rows in x.split(inference.N_ROWS)])
    found = sparse_codes(made, x)
    assert torch.equal(found.to_dense(), codes)
    assert (found.values > 0).all()
    assert found.batch == 20


def test_no_rows_have_no_entries():
    found = sparse_codes(dictionary(), torch.zeros(0, 2, 6))
    assert (found.batch, len(found.values)) == (0, 0)


def test_some_entries_and_sums_of_rows():
    codes = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
    sparse = SparseCodes.of_dense(codes)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    # 2 (0, 1) + 1 (1, 1) = (1, 3); nothing; 3 (1, 0) + 4 (1, 1) = (7, 4).
    assert sparse.times(rows).tolist() == [[1, 3], [0, 0], [7, 4]]
    large = sparse.where(sparse.values > 1.5)
    assert large.to_dense().tolist() == [[0, 2, 0], [0, 0, 0], [3, 0, 4]]
