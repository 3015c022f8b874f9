import math
from dataclasses import asdict

import pytest
import torch
from analysis.hand_made import crosscoder

from tl_crosscoder.analysis.geometry import LATENT_CLASSES
from tl_crosscoder.analysis.reconstruction import Moments, Reconstruction, ReconstructionSums
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.train.metrics import fve

NAMES = ["base", "finetuned"]
BASE_ONLY, SHARED, OTHER, FINETUNED_ONLY = range(4)


def random_case(n_tokens=60, d_sae=12, d_model=5, seed=0):
    """(activations, codes, crosscoder, class ids) with every class and a dead latent among them."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    made = crosscoder(draw(d_sae, d_model), draw(d_sae, d_model), b_dec=draw(2 * d_model))
    codes = draw(n_tokens, d_sae).relu()
    codes[:, 3] = 0
    x = made.decode(codes).view(n_tokens, 2, d_model).detach() + draw(n_tokens, 2, d_model)
    return x, codes, made, torch.arange(d_sae) % len(LATENT_CLASSES)


def measured(x, codes, made, class_ids, *, bounds=None) -> Reconstruction:
    """From batches that end at these tokens; None is one batch."""
    sums = ReconstructionSums(made, class_ids, pair=(0, 1))
    start = 0
    for end in bounds or (len(x),):
        sums.add(x[start:end], SparseCodes.of_dense(codes[start:end]))
        start = end
    return sums.result()


def naive(x, codes, made, class_ids) -> dict:
    """Token by token and latent by latent, in float64."""
    x, codes = x.double(), codes.double()
    base, finetuned, biases = (
        t.detach().double() for t in (made.decoder(0), made.decoder(1), made.b_dec.view(2, -1))
    )
    n, d_sae = codes.shape
    squares = lambda rows: sum(r.pow(2).sum().item() for r in rows)  # noqa: E731
    deviations = lambda rows: squares(r - sum(rows) / n for r in rows)  # noqa: E731
    x_hat = [
        [sum(codes[i, j] * rows[j] for j in range(d_sae)) + biases[m] for i in range(n)]
        for m, rows in enumerate((base, finetuned))
    ]
    errors = [[x[i, m] - x_hat[m][i] for i in range(n)] for m in (0, 1)]
    differences = [x[i, 1] - x[i, 0] for i in range(n)]
    variance = deviations(differences)
    by_class = {}
    for c, name in enumerate(LATENT_CLASSES):
        own = [j for j in range(d_sae) if class_ids[j] == c]
        left = [
            differences[i] - sum(codes[i, j] * (finetuned[j] - base[j]) for j in own)
            for i in range(n)
        ]
        by_class[name] = 1 - deviations(left) / variance
    of_site = [[x[i, m] for i in range(n)] for m in (0, 1)]
    error_differences = [e1 - e0 for e0, e1 in zip(*errors, strict=True)]
    n_active = [sum(codes[i, j].item() > 0 for i in range(n)) for j in range(d_sae)]
    return {
        "n_tokens": n,
        "fve": {s: 1 - squares(errors[m]) / deviations(of_site[m]) for m, s in enumerate(NAMES)},
        "difference_fve": 1 - squares(error_differences) / variance,
        "difference_fve_by_class": by_class,
        "difference_share": variance / deviations(of_site[1]),
        "l0": sum(n_active) / n,
        "dead_share": n_active.count(0) / d_sae,
    }


def test_reconstruction_by_hand():
    """Three tokens in one dimension.

    x^0 = 0, 2, 4 and x^1 = 0, 3, 6, so x^1 - x^0 = 0, 1, 2 with mean 1 and variance sum 2.
    Latent 0 writes 1 to both sites; latent 1 only to the fine-tuned; latent 2 never fires.
    """
    x = torch.tensor([[0.0, 0.0], [2.0, 3.0], [4.0, 6.0]])[:, :, None]
    made = crosscoder(torch.tensor([[1.0], [0.0], [9.0]]), torch.tensor([[1.0], [1.0], [0.0]]))
    codes = torch.tensor([[0.0, 0.0, 0.0], [2.0, 1.0, 0.0], [4.0, 1.0, 0.0]])
    # x̂^0 = 0, 2, 4 and x̂^1 = 0, 3, 5
    result = measured(x, codes, made, torch.tensor([SHARED, FINETUNED_ONLY, BASE_ONLY]))
    # Only the third token of the fine-tuned site has an error, of 1; x^1 has mean 3, 9 + 0 + 9.
    assert result.fve == pytest.approx({"base": 1.0, "finetuned": 1 - 1 / 18})
    assert result.difference_fve == pytest.approx(1 - 1 / 2)
    assert result.difference_share == pytest.approx(2 / 18)
    # Latent 1 gives 0, 1, 1 and leaves 0, 0, 1: deviations from 1/3 are 1/9 + 1/9 + 4/9 = 2/3.
    # Latent 0 writes the same to both sites and latent 2 is not active: they explain nothing.
    assert result.difference_fve_by_class == pytest.approx(
        {"base-only": 0.0, "shared": 0.0, "other": 0.0, "finetuned-only": 1 - (2 / 3) / 2}
    )
    assert result.n_tokens == 3
    assert result.l0 == pytest.approx(4 / 3)  # 0, 2 and 2 latents
    assert result.dead_share == pytest.approx(1 / 3)


@pytest.mark.parametrize("bounds", [(60,), (1, 11, 37, 60), (30, 30, 60)])
def test_sums_over_batches_equal_a_naive_loop_and_the_functions_of_one_batch(bounds):
    """Batches without tokens change nothing."""
    x, codes, made, class_ids = random_case()
    result = measured(x, codes, made, class_ids, bounds=bounds)
    expected = naive(x, codes, made, class_ids)
    assert asdict(result).keys() == expected.keys()
    for name, value in asdict(result).items():
        assert value == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    x_hat = made.decode(codes).view_as(x)
    for m, name in enumerate(NAMES):
        assert result.fve[name] == pytest.approx(fve(x[:, m], x_hat[:, m]).item(), rel=1e-4)
    difference = fve(x[:, 1] - x[:, 0], x_hat[:, 1] - x_hat[:, 0])
    assert result.difference_fve == pytest.approx(difference.item(), rel=1e-4)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_equal_models_and_a_constant_difference_have_nothing_to_explain(offset):
    base = torch.arange(8.0).view(4, 1, 2)
    x = torch.cat([base, base + offset], dim=1)
    made = crosscoder(torch.eye(2), torch.eye(2))
    result = measured(x, torch.ones(4, 2), made, torch.tensor([SHARED, SHARED]))
    assert result.difference_fve is None
    assert result.difference_fve_by_class is None
    assert result.difference_share == 0


@pytest.mark.parametrize("value", [0.0, 3.0, 1e15])
def test_a_site_that_is_the_same_at_all_tokens_has_no_fve(value):
    """Neither -inf nor -3e14, which is the rounding of the offset."""
    base = torch.arange(8.0).view(4, 1, 2)
    x = torch.cat([base, torch.full_like(base, value)], dim=1)
    made = crosscoder(torch.eye(2), torch.eye(2))
    result = measured(x, torch.ones(4, 2), made, torch.tensor([SHARED, SHARED]))
    assert math.isnan(result.fve["finetuned"])
    assert math.isfinite(result.fve["base"])
    assert result.difference_share is None
    assert result.difference_fve is None or math.isfinite(result.difference_fve)


def test_a_large_mean_does_not_drown_a_small_variance():
    """As at a residual stream with massive activations; in float32 squares this is lost."""
    generator = torch.Generator().manual_seed(0)
    x = 3000 + 0.05 * torch.randn(500, 4, generator=generator)
    exact = x.double().var(dim=0, correction=0).sum() * 500
    torch.testing.assert_close(Moments.of(x).sum_of_squared_deviations, exact, rtol=1e-6, atol=0)
