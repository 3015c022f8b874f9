"""Every member trains, is calibrated, saved and loaded, and says the same on both sides."""

import json
from unittest.mock import patch

import pytest
import torch
from dictionaries import D_SAE, new_training, planted
from members import MEMBERS
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import TrainingSAE

from tl_crosscoder import Crosscoder, CrosscoderTraining, CrosscoderTrainingConfig
from tl_crosscoder.hub.export import export_concat

BOTH = ("base", "finetuned")
X = planted(200, seed=900)
every_member = pytest.mark.parametrize("name", MEMBERS)


def trained(name: str, *, k: float = 3, n_steps: int = 40) -> CrosscoderTraining:
    training = new_training(**MEMBERS[name](k, BOTH))
    training._sparse_step.max_density = float("inf")
    optimizer = torch.optim.Adam(training.parameters(), lr=1e-2)
    for step in range(n_steps):
        optimizer.zero_grad()
        training.step_loss(planted(64, seed=step), step=step).loss.backward()
        optimizer.step()
    return training


@pytest.fixture(scope="module", params=MEMBERS)
def saved(request, tmp_path_factory):
    """(training, dictionary, folder) of each member."""
    training = trained(request.param)
    training.calibrate_threshold_([planted(1000, seed=s) for s in (500, 501)])
    made = training.to_inference()
    return training, made, made.save(tmp_path_factory.mktemp(request.param) / "d")


@every_member
def test_training_lowers_the_loss(name):
    losses = [trained(name, n_steps=n).step_loss(X, step=50).loss for n in (0, 40)]
    assert losses[1] < 0.7 * losses[0]


def test_loaded_dictionaries_give_the_same_codes(saved, tmp_path):
    _, made, folder = saved
    codes = made.encode(X)
    assert 0 < (codes > 0).sum() < codes.numel()
    assert torch.equal(Crosscoder.load(folder).encode(X), codes)
    again = SAE.load_from_disk(folder)
    assert isinstance(again, Crosscoder)
    assert torch.equal(again.encode(X), codes)
    plain = SAE.load_from_disk(export_concat(tmp_path / "plain", made))
    assert type(plain) is JumpReLUSAE
    assert torch.equal(plain.encode(X.flatten(1)), codes)
    assert torch.equal(plain(X.flatten(1)), made(X.flatten(1)))


def test_inference_thresholds_as_training_does_in_eval_mode(saved):
    """Folding multiplies codes by n_j and divides the decoder by it; nothing is rounded there."""
    training, made, _ = saved
    training.eval()
    with patch.object(training.cfg, "compute_dtype", None):
        codes = training.encode(X) * training.get_W_dec_norm()
    training.train()
    torch.testing.assert_close(made.encode(X), codes, atol=1e-5, rtol=1e-4)
    ones = made.decoder_norms().sum(dim=-1)
    torch.testing.assert_close(ones, torch.ones(D_SAE))


def test_rules_of_the_parts_are_in_the_saved_weights(saved):
    training, _, folder = saved
    loaded = Crosscoder.load(folder)
    for p, latents in training.cfg.placed_partitions():
        for m, site in enumerate(BOTH):
            if p.reads is not None and site not in p.reads:
                assert loaded.encoder(m)[:, latents].count_nonzero() == 0
            if p.writes is not None and site not in p.writes:
                assert loaded.decoder(m)[latents].count_nonzero() == 0
        if p.tied:
            assert torch.equal(loaded.decoder(0)[latents], loaded.decoder(1)[latents])


def test_a_checkpoint_goes_on_with_the_same_loss(saved, tmp_path):
    """Parts, running threshold and running mean come back with it."""
    training, _, _ = saved
    training.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    assert again.cfg.to_dict() == training.cfg.to_dict()
    again._sparse_step.max_density = float("inf")
    losses = [model.step_loss(X, step=50).loss for model in (training, again)]
    assert torch.equal(*losses)
    for name, tensor in training.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@every_member
def test_configs_survive_json(name):
    cfg = new_training(**MEMBERS[name](3, BOTH)).cfg
    again = CrosscoderTrainingConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert again.to_dict() == cfg.to_dict()
    for field in ("sites", "sparsity", "auxk", "partitions", "delta_loss", "matryoshka", "kernels"):
        assert getattr(again, field) == getattr(cfg, field)
    assert json.loads(json.dumps(cfg.get_inference_sae_cfg_dict()))["sites"]


@pytest.mark.parametrize("name", ["dual-k", "topk-dual-k", "delta-masked", "delta-with-bias"])
def test_parts_with_their_own_k_keep_their_own_threshold_and_l0(name):
    training = trained(name, k=2, n_steps=100)
    training.calibrate_threshold_([planted(1000, seed=s) for s in range(500, 504)])
    active = (training.to_inference().encode(planted(4000, seed=600)) > 0).double()
    groups = training.cfg.selection_groups()
    assert len(groups) == 2
    for part, k in groups:
        assert len(training.threshold[part].unique()) == 1
        assert active[:, part].sum(dim=-1).mean().item() == pytest.approx(k, rel=0.1)
    first, second = (training.threshold[part][0] for part, _ in groups)
    assert first != second


@pytest.mark.parametrize("name", ["jumprelu", "jumprelu-ste-to-input"])
def test_a_jumprelu_has_the_codes_of_training_at_inference(name):
    """No selection over a batch, so the codes of a step are those of the saved dictionary."""
    training = trained(name)
    codes = training.step_loss(X).codes.to_dense()
    folded = codes * training.get_W_dec_norm()
    torch.testing.assert_close(training.to_inference().encode(X), folded, atol=1e-5, rtol=1e-4)
    thresholds = training.log_threshold.exp()
    assert thresholds.unique().numel() > 1
    before = training.to_inference().threshold
    training.calibrate_threshold_([planted(100)])
    assert torch.equal(training.to_inference().threshold, before)
