"""Necessity of methods at equal numbers of directions: how much each removes, and at what cost.

    directions d_1..d_n   x^1 - Q Q' (x^1 - x^0)                     Q spans the first n
    latents 1..n          x^1 - sum_{j <= n} f_j (d_j^1 - d_j^0)     the first n of a ranking

so that with as many directions as the activation is wide the first is the whole base activation.
Contract: trials for `run_trials`, one for each method and size, with Gaussian controls whose edits
are of the same norm at every token; `CausalRow.latents` is the method and `n_latents` the size.
Limit: directions act at every token, latents where they are active, so compare at equal cost too
(`figures.cost_curves`).
"""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.baselines.directions import replacement
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.controls import gaussian_rows, of_same_norm
from tl_crosscoder.interventions.edits import Edit
from tl_crosscoder.interventions.latent_edits import ablation, ablation_along
from tl_crosscoder.interventions.trials import ControlSettings, Trial

SIZES = (1, 2, 3, 5, 10, 20, 30)
"""Numbers of directions at which methods are compared."""


def check_sizes(sizes: Sequence[int]) -> None:
    """Raise ValueError unless there are sizes, all from 1 on."""
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes are {list(sizes)}: give numbers of directions from 1 on.")


def curve_trials(
    ctx: InterventionContext,
    *,
    directions: Mapping[str, Float[Tensor, "n d_model"]],
    latents: Sequence[int] = (),
    sizes: Sequence[int] = SIZES,
    settings: ControlSettings | None = None,
    factors: Mapping[str, Tensor | None] | None = None,
) -> list[Trial]:
    """Trials of necessity for the first directions of some methods, and for ranked latents.

    Args:
        ctx: the models, and the dictionary where there are latents.
        directions: of each method by its name, raw space, the first ones first.
        latents: ranked; none leaves them out.
        sizes: numbers of directions; a method has those that it is rich enough for.
        settings: of the controls.
        factors: of the Gaussian controls, from `controls.gaussian_factors`; None is isotropic
            directions alone.

    Raises:
        ValueError: sizes below 1, or no method with as many directions.
    """
    settings = settings or ControlSettings()
    check_sizes(sizes)
    factors = {"random": None} if factors is None else factors

    def trial(name: str, rows: Tensor, own: Edit, ids: Tensor | None) -> Trial:
        drawn = gaussian_rows(rows, n=settings.n_random, seed=settings.seed, factors=factors)
        controls = of_same_norm(
            own,
            drawn,
            stream=ctx.finetuned,
            make=lambda r: (
                replacement(ctx, r) if ids is None else ablation_along(ctx, ids, r, "delta")
            ),
        )
        return Trial(test="necessity", name=name, n_latents=len(rows), own=own, controls=controls)

    found = [
        trial(name, rows[:n], replacement(ctx, rows[:n]), None)
        for name, rows in directions.items()
        for n in sizes
        if n <= len(rows)
    ]
    for n in [n for n in sizes if n <= len(latents)]:
        ids = ctx.latents(latents[:n])
        found.append(trial("latents", ctx.difference[ids], ablation(ctx, ids), ids))
    if not found:
        rich = {name: len(rows) for name, rows in directions.items()} | {"latents": len(latents)}
        raise ValueError(f"no method has as many directions as {list(sizes)}: they have {rich}.")
    return found
