import os
from itertools import product
from math import nan
from pathlib import Path

import pytest
import torch
from analysis.hand_made import by_nu, sites
from models.random_models import random_crosscoder
from reference import nano_crosscoder as nano
from safetensors.torch import load_file

from tl_crosscoder import Crosscoder
from tl_crosscoder.analysis.latent_scaling import LatentScaling, ScalingSums
from tl_crosscoder.crosscoder.config import CrosscoderConfig
from tl_crosscoder.crosscoder.crosscoder import sparse_codes
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.models.site import site_parts

TARGETS = ("error", "reconstruction", "activation", "activation_no_bias")


def dictionary() -> Crosscoder:
    made = random_crosscoder(sites(6), 10)
    with torch.no_grad():
        made.b_enc[3] = -1e6  # never fires
    return made


def scaled(made: Crosscoder, x, codes=None, **options) -> dict[str, LatentScaling]:
    return summed(made, x, codes, **options).result()


def summed(made: Crosscoder, x, codes=None, *, batches=None, **options) -> ScalingSums:
    sums = ScalingSums(made, pair=(0, 1), **options)
    for rows in batches or [x]:
        sums.add(site_parts(rows, made.sites), codes or sparse_codes(made, rows))
    return sums


@pytest.fixture(scope="module")
def case():
    made = dictionary()
    x = torch.randn(200, 2, 6, generator=torch.Generator().manual_seed(1))
    return made, x


def test_all_betas_are_those_of_the_reference(case):  # spec: A2
    made, x = case
    weights = nano.Weights(
        W_enc=[],
        b_enc=made.b_enc,
        W_dec=[made.decoder(m).detach().double() for m in (0, 1)],
        b_dec=[made.decoder_bias(m).detach().double() for m in (0, 1)],
    )
    codes, rows = made.encode(x).detach().double(), [*x.double().unbind(dim=1)]
    sums = summed(made, x)
    found = sums.result()
    assert set(found) == {"finetuned", "base", "random", "other"}
    for name, table in found.items():
        order = (1, 0) if name == "base" else (0, 1)
        for j, (row, site) in product(range(10), enumerate(order)):
            direction = sums.directions[name][j]
            betas = nano.latent_scaling(weights, rows, codes, j, direction, site)
            for target, beta in betas.items():
                ours = getattr(table, f"beta_{target}")[row, j]
                torch.testing.assert_close(ours, beta, equal_nan=True, rtol=1e-6, atol=1e-9)
        assert table.beta_error[:, 3].isnan().all()  # the latent that never fires


def test_controls_are_directions_that_mean_nothing(case):
    made, _ = case
    sums = ScalingSums(made, pair=(0, 1))
    own, other, noise = (sums.directions[name] for name in ("finetuned", "other", "random"))
    # Row j of another latent: each row is there once, and none in its own place.
    places = (other[:, None] == own).all(dim=-1).nonzero()[:, 1]
    assert sorted(places.tolist()) == list(range(10))
    assert (places != torch.arange(10)).all()
    torch.testing.assert_close(noise.norm(dim=1), own.norm(dim=1))
    assert not torch.equal(ScalingSums(made, pair=(0, 1), seed=1).directions["random"], noise)


def test_specific_latents_are_below_both_borders_in_size():
    # (nu_error, nu_reconstruction): both small; too large, each with both signs; undefined.
    nu = [(0.1, 0.4), (-0.1, -0.4), (0.3, 0.4), (-0.3, 0.4), (0.1, 0.6), (0.1, -0.6), (nan, 0.0)]
    table = by_nu("finetuned", *zip(*nu, strict=True))
    assert table.is_specific.tolist() == [True, True, *[False] * 5]


def test_one_latent_by_hand():
    # One latent, one dimension, d^0 = 1, d^1 = 2, no bias; codes 1 and 3, so C = 1 + 9 = 10.
    made = Crosscoder(CrosscoderConfig(d_in=2, d_sae=1, sites=sites(1)))
    made.load_state_dict(
        {n: torch.zeros_like(t) for n, t in made.state_dict().items()}
        | {"W_dec": torch.tensor([[1.0, 2.0]])}
    )
    x = torch.tensor([[[1.0], [2.0]], [[2.0], [7.0]]])
    codes = SparseCodes.of_dense(torch.tensor([[1.0], [3.0]]))
    found = scaled(made, x, codes, controls=())
    # d = 2, C d^2 = 40. Activation: base sum f x = 1 + 6 = 7, times 2 / 40; fine-tuned 2 + 21 = 23.
    assert found["finetuned"].beta_activation[:, 0].tolist() == [14 / 40, 46 / 40]
    # Reconstruction: base f, sum f f = 10, times 2 / 40; fine-tuned 2 f: 20 times 2 / 40.
    assert found["finetuned"].beta_reconstruction[:, 0].tolist() == [0.5, 1.0]
    # With its own part added back the error is x itself here, so nu_error = 7 / 23.
    assert found["finetuned"].nu_error.item() == pytest.approx(7 / 23)
    assert found["finetuned"].nu_reconstruction.item() == 0.5
    # Towards the base (d = 1, C d^2 = 10): fine-tuned over base.
    assert found["base"].nu_reconstruction.item() == 2.0


def test_neither_the_batches_nor_their_order_matter(case):  # spec: A1
    made, x = case
    whole = scaled(made, x)["finetuned"]
    parts = summed(made, x, batches=[*reversed(x.split(37))]).result()["finetuned"]
    torch.testing.assert_close(parts.beta_error, whole.beta_error, equal_nan=True)


def test_betas_are_of_the_space_in_which_sites_are_of_one_size(case):
    made, x = case
    scales = torch.tensor([3.0, 0.5])
    raw = dictionary()
    raw.fold_site_scales_([3.0, 0.5])
    ours, normalised = scaled(raw, x / scales[:, None]), scaled(made, x)
    for name in ("finetuned", "base"):
        torch.testing.assert_close(
            ours[name].beta_activation, normalised[name].beta_activation,
            equal_nan=True, rtol=1e-5, atol=1e-6,
        )  # fmt: skip


def test_what_a_latent_explains_of_the_difference_is_the_change_of_the_error(case):
    made, x = case
    codes = made.encode(x).detach().double()
    found = summed(made, x).difference_by_latent()
    v = (made.decoder(1) - made.decoder(0)).detach().double()
    bias = (made.decoder_bias(1) - made.decoder_bias(0)).detach().double()
    delta = (x[:, 1] - x[:, 0]).double()
    variance = (delta - delta.mean(dim=0)).square().sum()
    error = delta - codes @ v - bias
    for j in range(10):
        own = torch.outer(codes[:, j], v[j])
        alone = (delta.square().sum() - (delta - own).square().sum()) / variance
        lost = ((error + own).square().sum() - error.square().sum()) / variance
        torch.testing.assert_close(found.explained_difference[j], alone)
        torch.testing.assert_close(found.explained_difference_drop[j], lost)


@pytest.mark.parametrize("name", ["batchtopk", "l1"])
def test_the_betas_of_the_papers_own_code_are_reproduced(name):
    root = Path(__file__).parents[2]
    shared = Path(os.environ.get("TL_CROSSCODER_SHARED", root.parent / "shared"))
    folder = shared / "data/formats/dictionary_learning" / name
    if not folder.is_dir():
        pytest.skip(f"no reference dictionary at {folder}: set TL_CROSSCODER_SHARED")
    weights, reference = (load_file(folder / f"{n}.safetensors") for n in ("model", "reference"))
    _, d_model, d_sae = weights["encoder.weight"].shape
    norms = weights["decoder.weight"].norm(dim=-1).sum(dim=0)
    made = Crosscoder(CrosscoderConfig(d_in=2 * d_model, d_sae=d_sae, sites=sites(d_model)))
    made.load_state_dict(
        {
            "W_enc": weights["encoder.weight"].reshape(2 * d_model, d_sae),
            "b_enc": weights["encoder.bias"],
            "W_dec": weights["decoder.weight"].transpose(0, 1).reshape(d_sae, 2 * d_model),
            "b_dec": weights["decoder.bias"].reshape(-1),
            # Theirs is compared with codes times norms.
            "threshold": weights.get("threshold", torch.zeros(1)) / norms,
        }
    )
    x = reference["x"]
    torch.testing.assert_close(made.encode(x), reference["codes"], rtol=1e-4, atol=1e-5)
    table = scaled(made, x)["finetuned"]
    assert torch.equal(table.n_active.float(), reference["count_active"])
    for target in ("error", "reconstruction", "activation"):
        ours = getattr(table, f"beta_{target}").float()
        theirs = torch.stack([reference[f"beta_{target}_{s}"] for s in ("base", "finetuned")])
        active = table.n_active > 0
        assert active.sum() > 40
        deviation = (ours - theirs)[:, active].abs() / theirs[:, active].abs().clamp(min=1e-4)
        assert deviation.max() < 1e-4, target
