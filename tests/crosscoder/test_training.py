"""A dictionary of every kind trains, is calibrated, saved and loaded; and where training begins."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from dictionaries import (
    BOTH,
    D_MODEL,
    D_SAE,
    MEMBERS,
    members,
    new_training,
    planted,
    randomised,
    sites,
)
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import TrainingSAE, TrainStepInput

from tl_crosscoder import L1, BatchTopK, Crosscoder, CrosscoderTraining
from tl_crosscoder.crosscoder.config import CrosscoderTrainingConfig
from tl_crosscoder.crosscoder.loss import auxk_codes, auxk_loss, reconstruction_loss
from tl_crosscoder.crosscoder.training import geometric_median
from tl_crosscoder.hub.export import export_concat

X = planted(200, seed=900)


@dataclass(frozen=True)
class Trained:
    training: CrosscoderTraining
    losses: tuple[float, float]
    """On X, before and after."""
    made: Crosscoder
    folder: Path


@pytest.fixture(scope="module", params=MEMBERS)
def trained(request, tmp_path_factory) -> Trained:
    training = new_training(**members(3)[request.param])
    optimizer = torch.optim.Adam(training.parameters(), lr=1e-2)
    before = training.step_loss(X, step=50).loss.item()
    for step in range(40):
        optimizer.zero_grad()
        training.step_loss(planted(64, seed=step), step=step).loss.backward()
        optimizer.step()
    after = training.step_loss(X, step=50).loss.item()
    training.calibrate_threshold_([planted(1000, seed=s) for s in (500, 501)])
    made = training.to_inference()
    folder = made.save(tmp_path_factory.mktemp(request.param) / "d")
    return Trained(training, (before, after), made, folder)


def test_training_lowers_the_loss(trained):
    assert trained.losses[1] < 0.7 * trained.losses[0]


def test_loaded_dictionaries_give_the_same_codes(trained, tmp_path):  # spec: C12
    made = trained.made
    codes = made.encode(X)
    assert 0 < (codes > 0).sum() < codes.numel()
    sae = SAE.load_from_disk(trained.folder)
    sae.save_model(tmp_path / "saved by saelens")
    for again in (sae, *map(Crosscoder.load, (trained.folder, tmp_path / "saved by saelens"))):
        assert isinstance(again, Crosscoder)
        assert again.cfg.sites == made.cfg.sites
        assert torch.equal(again.encode(X), codes)
        for name, tensor in made.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
    plain = SAE.load_from_disk(export_concat(tmp_path / "plain", made))
    assert type(plain) is JumpReLUSAE
    assert torch.equal(plain.encode(X.flatten(1)), codes)
    assert torch.equal(plain(X.flatten(1)), made(X.flatten(1)))


def test_inference_thresholds_as_training_does_in_eval_mode(trained):  # spec: C4 C5
    """Folding multiplies codes by n_j and divides the decoder by it; nothing is rounded there."""
    training = trained.training.eval()
    with patch.object(training.cfg, "compute_dtype", None):
        codes = training.encode(X) * training.get_W_dec_norm()
    training.train()
    torch.testing.assert_close(trained.made.encode(X), codes, atol=1e-5, rtol=1e-4)
    if not training.cfg.selection_groups():  # Others select over the training batch.
        folded = training.step_loss(X).codes.to_dense() * training.get_W_dec_norm()
        torch.testing.assert_close(trained.made.encode(X), folded, atol=1e-5, rtol=1e-4)
        assert all(learned.unique().numel() > 1 for learned in training._learned().values())
    ones = trained.made.decoder_norms().sum(dim=-1)
    torch.testing.assert_close(ones, torch.ones(D_SAE))


def test_rules_of_partitions_are_in_the_saved_weights(trained):  # spec: C8
    loaded = Crosscoder.load(trained.folder)
    for p, own in trained.training.cfg.placed_partitions():
        for m, site in enumerate(BOTH):
            assert p.reads is None or site in p.reads or not loaded.encoder(m)[:, own].any()
            assert p.writes is None or site in p.writes or not loaded.decoder(m)[own].any()
        assert not p.tied or torch.equal(loaded.decoder(0)[own], loaded.decoder(1)[own])


def test_each_k_is_kept_at_inference_by_a_threshold_of_its_own(trained):  # spec: C5
    training = trained.training
    active = (trained.made.encode(planted(4000, seed=600)) > 0).double()
    groups = training.cfg.selection_groups()
    for own, k in groups:
        assert len(training.threshold[own].unique()) == 1
        assert active[:, own].sum(dim=-1).mean().item() == pytest.approx(k, rel=0.1)
    assert len(training.threshold.unique()) == max(1, len(groups))


def test_a_checkpoint_goes_on_with_the_same_loss(trained, tmp_path):  # spec: T2
    """Partitions, running threshold and running mean come back with it."""
    training = trained.training
    training.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    assert isinstance(again, CrosscoderTraining)
    assert again.cfg.to_dict() == training.cfg.to_dict()
    again._sparse_step.max_density = float("inf")
    for name, tensor in training.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    losses = [model.step_loss(X, step=50).loss for model in (training, again)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", MEMBERS)
def test_configs_survive_json(name):
    cfg = new_training(**members(3)[name]).cfg
    again = CrosscoderTrainingConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert again.to_dict() == cfg.to_dict()
    for field in ("sites", "sparsity", "auxk", "partitions", "delta_loss", "matryoshka", "kernels"):
        assert getattr(again, field) == getattr(cfg, field)
    assert json.loads(json.dumps(cfg.get_inference_sae_cfg_dict()))["sites"]


def test_sites_start_from_one_draw_with_the_encoder_transposed():
    for sparsity, norm in ((L1(), 0.05), (BatchTopK(k=2), 1.0)):
        training = new_training(sparsity=sparsity)
        assert torch.equal(training.decoder("base"), training.decoder("finetuned"))
        assert torch.equal(training.W_enc, training.W_dec.T)
        norms = training.decoder("base").norm(dim=-1)
        torch.testing.assert_close(norms, torch.full_like(norms, norm))


def test_reconstruction_reductions_by_hand():
    errors = torch.tensor([[3.0, 4.0, 0.0, 2.0], [0.0, 0.0, 1.0, 0.0]])
    # sum: (9 + 16 + 4) and 1, mean 15; mean over the two dimensions of a site halves that;
    # norm: (5 + 2) and (0 + 1), mean 4.
    for reduction, expected in (("sum", 15.0), ("mean", 7.5), ("norm", 4.0)):
        loss = reconstruction_loss(errors, 0 * errors, sites(2, 2), reduction=reduction)
        assert loss.item() == expected


def test_auxk_by_hand():  # spec: C9
    # One token pair, residuals +-1 in one dimension: variance 1. The dead latent reconstructs
    # 0.5 of the first: errors (1 - 0.5)^2 = 0.25 and 1, mean 0.625.
    residual = torch.tensor([[1.0], [-1.0]])
    codes = auxk_codes(torch.tensor([[0.5], [-3.0]]), torch.ones(1), k=1)
    loss = auxk_loss(residual, codes @ torch.ones(1, 1))
    assert loss.item() == pytest.approx(0.625)
    pre = torch.tensor([[1.0, 3.0, 2.0], [-1.0, 1.0, 5.0]])
    # With norms 9, 1, 1 the f n are [[9, 3, 2], [0, 1, 5]], of which two stay on each token.
    codes = auxk_codes(pre, torch.tensor([9.0, 1.0, 1.0]), k=2)
    assert torch.equal(codes, torch.tensor([[1.0, 3.0, 0.0], [0.0, 1.0, 5.0]]))


def forward(training: CrosscoderTraining, x, *, dead=None):
    """A training step as SAELens's trainer does it."""
    return training.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients={},
            dead_neuron_mask=dead,
            n_training_steps=0,
            is_logging_step=False,
        )
    )


def test_auxk_reaches_the_encoder_of_dead_latents_alone():  # spec: C9
    training = randomised(new_training(sparsity=BatchTopK(k=1)))
    dead = torch.arange(D_SAE) % 16 == 3
    with torch.no_grad():
        training.b_enc[dead] -= 5.0  # never selected ...
        training.W_enc[:, dead] *= 3.0  # ... yet positive on some tokens
    output = forward(training, planted(64), dead=dead)
    # Weighted as in the paper, whose reconstruction is divided by the variance of activations.
    variance = (output.sae_in - output.sae_in.mean(dim=0)).square().sum(dim=-1).mean()
    explained = training.auxk_fve(training.step_loss(planted(64), is_dead=dead)).item()
    assert explained < 1
    assert output.losses["auxk"].item() == pytest.approx((1 - explained) * variance.item() / 32)
    only_aux = torch.autograd.grad(output.losses["auxk"], training.W_enc)[0]
    assert only_aux[:, dead].abs().sum() > 0
    assert only_aux[:, ~dead].abs().sum() == 0
    assert forward(training, planted(8), dead=dead & ~dead).losses["auxk"].item() == 0
    output = forward(new_training(auxk=None), planted(8), dead=dead)
    assert set(output.losses) == {"reconstruction"}


def test_in_eval_mode_a_tokens_latents_do_not_depend_on_its_neighbours():
    training = new_training()
    for step in range(5):
        forward(training, planted(64, seed=step))
    x = planted(20, seed=9)
    training.eval()
    torch.testing.assert_close(training.encode(x)[:1], training.encode(x[:1]))
    training.train()
    assert training.encode(x).count_nonzero() == 4 * 20


def test_the_running_threshold_starts_at_its_first_observation():  # spec: C5
    training = new_training(sparsity=BatchTopK(k=4, threshold_momentum=0.9))
    x = planted(64)
    first = forward(training, x)
    norms = training.get_W_dec_norm()
    smallest = (first.feature_acts * norms)[first.feature_acts > 0].min()
    torch.testing.assert_close(training.threshold, smallest.detach().expand(D_SAE))
    forward(training, 2 * x)
    # 0.9 of the first and 0.1 of the second, which is twice as large (no bias yet).
    torch.testing.assert_close(training.threshold, (1.1 * smallest).detach().expand(D_SAE))


def test_b_dec_starts_at_the_geometric_median_of_each_site():
    training = new_training()
    x = planted(200)
    x[0] = 1e4  # an attention sink does not move the median far
    training.initialize_from_(x)
    torch.testing.assert_close(training.decoder_bias("base"), geometric_median(x[:, 0]))
    assert (training.decoder_bias("base") - x[1:, 0].mean(dim=0)).norm() < 2


def test_the_first_reconstruction_is_half_way_to_the_size_of_the_activations():
    training, drawn = new_training(sparsity=BatchTopK(k=12)), new_training(sparsity=BatchTopK(k=12))
    x = planted(300) + torch.randn(2, D_MODEL)
    factor = training.initialize_from_(x)
    assert 0 < factor < 1
    for name in ("W_enc", "W_dec"):
        ours, theirs = training.get_parameter(name), drawn.get_parameter(name)
        torch.testing.assert_close(ours, factor**0.5 * theirs)
    # Activations at the bias have no pre-activation.
    torch.testing.assert_close(training.b_enc, -(training.b_dec @ training.W_enc))
    out = training.step_loss(x)
    decoded, centred = out.x_hat - training.b_dec, out.x - training.b_dec
    # The size that is best for this reconstruction is a; half of its logarithm is left to training.
    best = (decoded * centred).sum() / decoded.square().sum()
    assert best.item() == pytest.approx(factor)


@pytest.mark.parametrize(
    "options", [{"encoder_init": "transposed"}, {"sparsity": L1(), "decoder_init_norm": 1e-3}]
)
def test_rows_keep_their_length_where_it_is_asked_for_or_short(options):
    training, drawn = new_training(**options), new_training(**options)
    assert training.initialize_from_(planted(100)) == 1
    assert torch.equal(training.W_enc, drawn.W_enc)
    assert torch.equal(training.W_dec, drawn.W_dec)


def test_geometric_median_of_a_triangle_is_its_fermat_point():
    # An equilateral triangle's Fermat point is its centre.
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])
    expected = torch.tensor([0.5, 3**0.5 / 6])
    torch.testing.assert_close(geometric_median(corners), expected, atol=1e-4, rtol=0)
    # With three points on one spot, the median is that spot whatever the fourth is.
    spot = torch.tensor([[1.0, 2.0]] * 3 + [[90.0, -7.0]])
    torch.testing.assert_close(geometric_median(spot), spot[0], atol=1e-3, rtol=0)


def test_a_bfloat16_crosscoder_is_saved_as_float32():
    assert new_training(dtype="bfloat16").to_inference().W_dec.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_terms_give_the_same_loss_and_gradients():
    """In a process of its own: the shape checks of the tests cannot be compiled."""
    script = Path(__file__).with_name("compiled_parity.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["loss", "W_enc", "W_dec", "b_enc", "b_dec"]
