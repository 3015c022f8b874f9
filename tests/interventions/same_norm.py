"""What controls of a trial must have in common with its edit."""

import torch

from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.trials import Trial


def assert_of_same_norm(ctx: InterventionContext, text, trial: Trial) -> None:
    """Controls move the activation as far as the edit at every token, and elsewhere."""
    acts = ctx.acts(torch.arange(len(text)), text)
    x = acts.x[trial.own.site]
    own = trial.own(acts) - x
    assert own.norm() > 0.1
    for kind, edits in trial.controls.items():
        for edit in edits if kind != "matched" else ():
            shift = edit(acts) - x
            torch.testing.assert_close(
                shift.norm(dim=-1), own.norm(dim=-1), rtol=1e-3, atol=1e-4, msg=kind
            )
            assert (shift - own).norm() > 0.1 * own.norm(), kind
