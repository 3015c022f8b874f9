"""Latent Scaling of the package against the reference; the step is in tests/crosscoder."""

import torch
from crosscoder.dictionaries import new_training, planted, randomised
from reference import nano_crosscoder as nano

from tl_crosscoder.analysis.latent_scaling import ScalingSums
from tl_crosscoder.crosscoder.crosscoder import sparse_codes
from tl_crosscoder.models.site import site_parts


def test_betas_are_those_of_the_reference():  # spec: A2
    training = randomised(new_training())
    training.calibrate_threshold_([planted(500)])
    made, x = training.to_inference(), planted(80, seed=3)
    codes, sums = sparse_codes(made, x), ScalingSums(made, pair=(0, 1), controls=())
    sums.add(site_parts(x, made.sites), codes)
    decoders = [made.decoder(m).detach().double() for m in (0, 1)]
    biases = [made.decoder_bias(m).detach().double() for m in (0, 1)]
    w = nano.Weights(W_enc=[], b_enc=made.b_enc, W_dec=decoders, b_dec=biases)
    f, rows = codes.to_dense().detach().double(), [*x.double().unbind(dim=1)]
    found = sums.result()["finetuned"]
    for j in range(made.cfg.d_sae):
        for m in (0, 1):
            betas = nano.latent_scaling(w, rows, f, j, decoders[1][j], m)
            for target, beta in betas.items():
                ours = getattr(found, f"beta_{target}")[m, j]
                torch.testing.assert_close(ours, beta, equal_nan=True, rtol=1e-6, atol=1e-9)
