"""With one site a crosscoder is an SAE: it trains like SAELens's, where the losses coincide.

Set for that: in SAELens `apply_b_dec_to_input=False`, for JumpReLU the `tanh` sparsity loss and no
pre-activation loss; here `auxk=None`, since the two AuxK terms are normalised differently. Theirs
is a buffer's worth apart in three more ways, which change no loss: codes are scaled by the decoder
norm and back, theta itself is the parameter and not its logarithm, and the matryoshka's last width
is the whole dictionary.
"""

import pytest
import torch
from dictionaries import D_MODEL, new_training, planted
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

from tl_crosscoder import L1, BatchTopK, CrosscoderTraining, JumpReLU, TopK

D_SAE = 40
SIZE = {"d_in": D_MODEL, "d_sae": D_SAE, "apply_b_dec_to_input": False, "dtype": "float64"}
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
both_twins = pytest.mark.parametrize("kernels", ["auto", "dense"])
PAIRS = {
    "topk": (
        lambda: TopKTrainingSAE(TopKTrainingSAEConfig(k=3, **SIZE)),
        {"sparsity": TopK(k=3)},
    ),
    "batchtopk": (
        lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=3, **SIZE)),
        {"sparsity": BatchTopK(k=3)},
    ),
    # 0.25, 0.5 and 1 of 40 latents, and the whole in either case.
    "matryoshka": (
        lambda: MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(k=3, matryoshka_widths=[10, 20, 40], **SIZE)
        ),
        {"sparsity": BatchTopK(k=3), "matryoshka": (0.25, 0.5)},
    ),
    "l1": (
        lambda: StandardTrainingSAE(StandardTrainingSAEConfig(l1_coefficient=0.2, **SIZE)),
        {"sparsity": L1(coefficient=0.2)},
    ),
}


def ours(kernels: str, **fields) -> CrosscoderTraining:
    training = new_training(
        D_MODEL, d_sae=D_SAE, auxk=None, dtype="float64", kernels=kernels, **fields
    )
    training._sparse_step.max_density = float("inf")
    return training


def batch(step: int) -> Tensor:
    return planted(64, seed=step)[:, 1].double()


def their_loss(sae: TrainingSAE, x: Tensor) -> Tensor:
    names = {"l1": 0.2, "l0": 0.7}
    step_input = TrainStepInput(
        sae_in=x,
        coefficients=names,
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )
    return sae.training_forward_pass(step_input).loss


@both_twins
@pytest.mark.parametrize("name", PAIRS)
def test_one_site_trains_like_saelens(name, kernels):
    """The same loss over 50 steps of Adam, and the same weights after them."""
    make, fields = PAIRS[name]
    torch.manual_seed(0)
    theirs, training = make(), ours(kernels, **fields)
    with torch.no_grad():
        for weight in WEIGHTS:
            getattr(training, weight).copy_(getattr(theirs, weight))
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (training, theirs)]
    for step in range(50):
        losses = [training.step_loss(batch(step)).loss, their_loss(theirs, batch(step))]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-9)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for weight in WEIGHTS:
        torch.testing.assert_close(getattr(training, weight), getattr(theirs, weight))


@both_twins
@pytest.mark.parametrize("ste_to_input", [False, True])
def test_one_site_jumprelu_has_saelenss_loss_and_gradients(ste_to_input, kernels):
    """At each of 30 steps of theirs; ours are with respect to log theta, which is theta times."""
    torch.manual_seed(0)
    theirs = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            jumprelu_sparsity_loss_mode="tanh",
            jumprelu_init_threshold=0.25,
            jumprelu_bandwidth=0.5,
            jumprelu_ste_to_input=ste_to_input,
            **SIZE,
        )
    )
    sparsity = JumpReLU(coefficient=0.7, bandwidth=0.5, ste_to_input=ste_to_input)
    training = ours(kernels, sparsity=sparsity)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for step in range(30):
        copy_from_(training, theirs)
        losses = [training.step_loss(batch(step)).loss, their_loss(theirs, batch(step))]
        torch.testing.assert_close(*losses)
        for model, loss in zip((training, theirs), losses, strict=True):
            model.zero_grad()
            loss.backward()
        for weight in WEIGHTS:
            torch.testing.assert_close(
                getattr(training, weight).grad, getattr(theirs, weight).grad, atol=1e-9, rtol=1e-6
            )
        # Their theta is float32.
        by_log = theirs.threshold.grad.double() * theirs.threshold.double()
        torch.testing.assert_close(training.log_threshold.grad, by_log, atol=1e-6, rtol=1e-5)
        optimizer.step()
    assert theirs.threshold.unique().numel() > 1


@torch.no_grad()
def copy_from_(training: CrosscoderTraining, theirs: JumpReLUTrainingSAE) -> None:
    for weight in WEIGHTS:
        getattr(training, weight).copy_(getattr(theirs, weight))
    training.log_threshold.copy_(theirs.threshold.double().log())
