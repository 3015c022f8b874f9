"""The loss with and without torch.compile: run by test_training.py, without shape checks."""

import torch
from dictionaries import new_training, planted, randomised

from tl_crosscoder.config.presets import preset
from tl_crosscoder.train.presets import recipe_of

losses, grads = [], []
for compiled in (False, True):
    training = randomised(
        new_training(**vars(recipe_of(preset("delta", k=3), n_steps=0)), compile=compiled)
    )
    output = training.step_loss(planted(32), is_dead=torch.arange(32) > 28)
    output.loss.backward()
    losses.append(output.loss.detach())
    grads.append({n: p.grad for n, p in training.named_parameters()})
torch.testing.assert_close(*losses)
print("loss")
for name, grad in grads[0].items():
    torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5)
    print(name)
