"""A refactor reproduces these losses: 200 steps of each preset on planted activations, float64.

Both steps, dense and sparse, give the same curve. To renew the curves after a change that is meant
to change them, run this file as a script.
"""

import json
from pathlib import Path

import pytest
import torch
from dictionaries import D_MODEL, new_training, planted

from tl_crosscoder.config.presets import PRESETS, preset
from tl_crosscoder.train.presets import Recipe, recipe_of

PATH = Path(__file__).with_name("golden_losses.json")
OPTIONS = {
    "l1": {"coefficient": 0.05},
    "dsf": {"coefficient": 0.05},
    "jumprelu": {"coefficient": 0.1, "bandwidth": 0.2},
    "dual-k": {"k": 6},
    "delta": {"k": 6, "delta_loss_weight": 0.5},
    "structured": {"k": 6},
}


def recipe(name: str) -> Recipe:
    return recipe_of(preset(name, **OPTIONS.get(name, {"k": 4})), n_steps=0)


def curve(name: str, *, kernels: str, n_steps: int = 200) -> list[float]:
    """Every tenth loss; the last eight of 40 latents count as dead, so that AuxK takes part."""
    widths = (D_MODEL,) if name == "diff-sae" else (D_MODEL, D_MODEL)
    training = new_training(
        *widths, d_sae=40, dtype="float64", kernels=kernels, **vars(recipe(name))
    )
    dead = torch.arange(40) >= 32
    optimizer = torch.optim.Adam(training.parameters(), lr=3e-3)
    losses = []
    for step in range(n_steps):
        x = planted(64, seed=step).double()
        x = x[:, 1] - x[:, 0] if name == "diff-sae" else x
        output = training.step_loss(x, is_dead=dead, step=step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    return losses[::10]


@pytest.mark.parametrize("n_steps", [60, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PRESETS)
def test_losses_are_the_golden_ones(name, n_steps):  # spec: T5
    """The whole curve in the slow tests; what moves a loss shows in its beginning."""
    golden = json.loads(PATH.read_text())[name]
    assert len(golden) == 20
    assert golden[-1] < golden[0] / 2
    for kernels, n in (("auto", n_steps), ("dense", n_steps // 4)):
        expected = golden[: len(range(0, n, 10))]
        assert curve(name, kernels=kernels, n_steps=n) == pytest.approx(expected, rel=1e-5)


if __name__ == "__main__":
    curves = {name: curve(name, kernels="dense") for name in PRESETS}
    PATH.write_text(json.dumps(curves, indent=1) + "\n")
