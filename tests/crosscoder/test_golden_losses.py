"""A refactor reproduces these losses: 200 steps of each sparsity on planted activations, float64.

To renew them after a change that is meant to change them, run this file as a script.
"""

import json
from pathlib import Path

import pytest
import torch
from dictionaries import new_training, planted
from sae_lens.saes.sae import TrainStepInput

from tl_crosscoder import L1, BatchTopK

PATH = Path(__file__).with_name("golden_losses.json")
SPARSITIES = {"l1": L1(coefficient=0.05), "batchtopk": BatchTopK(k=4)}


def curve(name: str) -> list[float]:
    """Every tenth loss; the last eight of 40 latents count as dead, so that AuxK takes part."""
    training = new_training(sparsity=SPARSITIES[name], d_sae=40, dtype="float64")
    dead = torch.arange(40) >= 32
    optimizer = torch.optim.Adam(training.parameters(), lr=3e-3)
    losses = []
    for step in range(200):
        output = training.training_forward_pass(
            TrainStepInput(
                sae_in=planted(64, seed=step).double(),
                coefficients={"l1": 0.05},
                dead_neuron_mask=dead,
                n_training_steps=step,
                is_logging_step=False,
            )
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    return losses[::10]


@pytest.mark.parametrize("name", sorted(SPARSITIES))
def test_losses_are_the_golden_ones(name):
    golden = json.loads(PATH.read_text())[name]
    assert curve(name) == pytest.approx(golden, rel=1e-5)
    assert golden[-1] < golden[0] / 4


if __name__ == "__main__":
    PATH.write_text(json.dumps({name: curve(name) for name in SPARSITIES}, indent=1) + "\n")
