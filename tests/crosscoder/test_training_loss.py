import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dictionaries import D_MODEL, new_training, planted, randomised, sites
from sae_lens.saes.sae import TrainStepInput

from tl_crosscoder import L1, BatchTopK, CrosscoderTrainingConfig
from tl_crosscoder.crosscoder.config import AuxK
from tl_crosscoder.crosscoder.loss import auxk_codes, auxk_loss, reconstruction_loss
from tl_crosscoder.crosscoder.site_views import geometric_median


def step_input(x, *, dead=None, **coefficients):
    return TrainStepInput(
        sae_in=x,
        coefficients=coefficients,
        dead_neuron_mask=dead,
        n_training_steps=0,
        is_logging_step=False,
    )


def test_sites_start_from_one_draw_with_the_encoder_transposed():
    training = new_training(sparsity=L1())
    assert torch.equal(training.decoder("base"), training.decoder("finetuned"))
    assert torch.equal(training.W_enc, training.W_dec.T)
    norms = training.decoder("base").norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, 0.05))
    norms = new_training(sparsity=BatchTopK(k=2)).decoder(1).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_reconstruction_reductions_by_hand():
    errors = torch.tensor([[3.0, 4.0, 0.0, 2.0], [0.0, 0.0, 1.0, 0.0]])
    two = sites(2, 2)
    # sum: (9 + 16 + 4) and 1, mean 15; mean over the two dimensions of a site halves that;
    # norm: (5 + 2) and (0 + 1), mean 4.
    assert reconstruction_loss(errors, 0 * errors, two, reduction="sum").item() == 15.0
    assert reconstruction_loss(errors, 0 * errors, two, reduction="mean").item() == 7.5
    assert reconstruction_loss(errors, 0 * errors, two, reduction="norm").item() == 4.0


def test_auxk_is_in_the_loss_and_its_gradient_reaches_the_encoder_of_dead_latents():
    training = randomised(new_training(sparsity=BatchTopK(k=1)))
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[3, 5]] = True
    with torch.no_grad():
        training.b_enc[dead] -= 5.0  # never selected ...
        training.W_enc[:, dead] *= 3.0  # ... yet positive on some tokens
    output = training.training_forward_pass(step_input(planted(64), dead=dead))
    assert output.losses["auxk"] > 0
    assert output.loss.item() == pytest.approx(sum(v.item() for v in output.losses.values()))
    only_aux = torch.autograd.grad(output.losses["auxk"], training.W_enc)[0]
    assert only_aux[:, dead].abs().sum() > 0
    assert only_aux[:, ~dead].abs().sum() == 0


def test_auxk_by_hand():
    # One token pair, residuals +-1 in one dimension: variance 1. The dead latent reconstructs
    # 0.5 of the first: errors (1 - 0.5)^2 = 0.25 and 1, mean 0.625.
    residual = torch.tensor([[1.0], [-1.0]])
    codes = auxk_codes(torch.tensor([[0.5], [-3.0]]), torch.ones(1), k=1)
    loss = auxk_loss(residual, codes @ torch.ones(1, 1), AuxK(weight=1.0, k=1))
    assert loss.item() == pytest.approx(0.625)


def test_auxk_takes_the_largest_weighted_codes_of_each_token():
    pre = torch.tensor([[1.0, 3.0, 2.0], [-1.0, 1.0, 5.0]])
    norms = torch.tensor([9.0, 1.0, 1.0])
    # f n = [[9, 3, 2], [0, 1, 5]]
    codes = auxk_codes(pre, norms, k=2)
    assert torch.equal(codes, torch.tensor([[1.0, 3.0, 0.0], [0.0, 1.0, 5.0]]))


def test_without_dead_latents_auxk_is_zero_and_without_auxk_absent():
    alive = torch.zeros(32, dtype=torch.bool)
    output = new_training().training_forward_pass(step_input(planted(8), dead=alive))
    assert output.losses["auxk"].item() == 0
    output = new_training(auxk=None).training_forward_pass(step_input(planted(8), dead=~alive))
    assert set(output.losses) == {"reconstruction"}


def test_in_eval_mode_a_tokens_latents_do_not_depend_on_its_neighbours():
    training = new_training()
    for step in range(5):
        training.training_forward_pass(step_input(planted(64, seed=step)))
    x = planted(20, seed=9)
    training.eval()
    torch.testing.assert_close(training.encode(x)[:1], training.encode(x[:1]))
    training.train()
    assert training.encode(x).count_nonzero() == 4 * 20


def test_the_running_threshold_starts_at_its_first_observation():
    training = new_training(sparsity=BatchTopK(k=4, threshold_momentum=0.9))
    x = planted(64)
    first = training.training_forward_pass(step_input(x))
    norms = training.get_W_dec_norm()
    smallest = (first.feature_acts * norms)[first.feature_acts > 0].min()
    torch.testing.assert_close(training.threshold, smallest.detach().expand(32))
    training.training_forward_pass(step_input(2 * x))
    # 0.9 of the first and 0.1 of the second, which is twice as large (no bias yet).
    torch.testing.assert_close(training.threshold, (1.1 * smallest).detach().expand(32))


def test_calibration_brings_inference_l0_within_five_percent_of_k():
    training = new_training()
    optimizer = torch.optim.Adam(training.parameters(), lr=3e-3)
    for step in range(120):
        output = training.training_forward_pass(step_input(planted(128, seed=step)))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    training.calibrate_threshold_([planted(2000, seed=500), planted(2000, seed=501)])
    l0 = (training.to_inference().encode(planted(4000, seed=600)) > 0).sum(dim=-1).double().mean()
    assert l0.item() == pytest.approx(4, rel=0.05)


def test_b_dec_starts_at_the_geometric_median_of_each_site():
    training = new_training()
    x = planted(200)
    x[0] = 1e4  # an attention sink does not move the median far
    training.initialize_b_dec_(x)
    torch.testing.assert_close(training.decoder_bias("base"), geometric_median(x[:, 0]))
    assert (training.decoder_bias("base") - x[1:, 0].mean(dim=0)).norm() < 2


def test_geometric_median_of_a_triangle_is_its_fermat_point():
    # An equilateral triangle's Fermat point is its centre.
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])
    expected = torch.tensor([0.5, 3**0.5 / 6])
    torch.testing.assert_close(geometric_median(corners), expected, atol=1e-4, rtol=0)
    # With three points on one spot, the median is that spot whatever the fourth is.
    spot = torch.tensor([[1.0, 2.0]] * 3 + [[90.0, -7.0]])
    torch.testing.assert_close(geometric_median(spot), spot[0], atol=1e-3, rtol=0)


def test_swapping_sites_mirrors_the_codes():
    training = randomised(new_training())
    x = planted(32)
    mirrored = new_training()
    with torch.no_grad():
        mirrored.W_enc.copy_(training.W_enc.view(2, D_MODEL, 32).flip(0).reshape(-1, 32))
        mirrored.W_dec.copy_(training.W_dec.view(32, 2, D_MODEL).flip(1).reshape(32, -1))
        mirrored.b_dec.copy_(training.b_dec.view(2, D_MODEL).flip(0).flatten())
        mirrored.b_enc.copy_(training.b_enc)
    torch.testing.assert_close(mirrored.encode(x.flip(1)), training.encode(x))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": BatchTopK(k=33)}, "k is 33, but the dictionary has only 32"),
        ({"sites": sites(4, 4)}, r"d_in is 24, but .* \[4, 4\], together 8"),
        ({"sites": (sites(12)[0],) * 2}, "site names must differ"),
        ({"sparsity": L1(), "normalize_activations": "layer_norm"}, "mixes the sites"),
    ],
)
def test_configs_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CrosscoderTrainingConfig(**({"d_in": 24, "d_sae": 32} | fields))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_terms_give_the_same_loss_and_gradients():
    """In a process of its own: the shape checks of the tests cannot be compiled."""
    script = Path(__file__).with_name("compiled_parity.py")
    subprocess.run([sys.executable, str(script)], check=True)
