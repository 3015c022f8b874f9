"""Methods without a dictionary on a run's folder: what `tl-crosscoder baselines` does.

Contract: mean difference and principal components in the tests that latents have, then beside the
dictionary's latents at equal numbers of directions; results are JSON in the folder
(`baselines_behaviour.json`, `baselines_curves_behaviour.json` and so on). Limit: of the methods of
`baselines`, those that are directions at the hook.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tl_crosscoder.baselines.curves import SIZES, check_sizes, curve_trials
from tl_crosscoder.baselines.difference import (
    ActivationDifference,
    DifferencePCA,
    activation_difference,
    difference_pca,
)
from tl_crosscoder.config.causal import EffectQuestion
from tl_crosscoder.interventions.behaviour import Effect
from tl_crosscoder.interventions.causal_rows import CausalTest
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.controls import gaussian_factors
from tl_crosscoder.interventions.trials import TESTS, run_trials
from tl_crosscoder.run.causal import (
    control_settings,
    each_effect,
    held_out_text,
    neutral_text,
    ranked_latents,
)
from tl_crosscoder.run.run import Run

N_CONTROLS_OF_CURVES = 20
"""Controls of each kind at each point of a curve, at most."""


def baseline_run(
    run: Run,
    question: EffectQuestion,
    *,
    strengths: Sequence[float] = (0.5, 1.0, 2.0),
    sizes: Sequence[int] = SIZES,
) -> tuple[list[CausalTest], ActivationDifference]:
    """The tests of what needs no dictionary, and the mean difference by position.

    Directions are taken of neutral text, at positions 1 and 2 and over all, and the first two
    principal components, of which both signs are steered by. Then necessity at equal numbers of
    directions, beside that of the dictionary's latents; no sizes leave it out.
    """
    if sizes:
        check_sizes(sizes)  # before long work
    ctx = InterventionContext.of(run.models)
    neutral = neutral_text(run, question.text, neutral=question.neutral)
    n = min(max([2, *sizes]), ctx.models.model_sites[ctx.base].d_model)
    adl = activation_difference(ctx.models, neutral)
    pca = difference_pca(ctx.models, neutral, n_components=n)
    settings = control_settings(question, n_matched=0, alphas=tuple(strengths))
    signed = replace(settings, alphas=tuple(sign * s for s in strengths for sign in (-1, 1)))
    factors = gaussian_factors(ctx, neutral, settings.controls)
    trials = [
        *(
            t
            for w in (1, 2, "mean")
            for t in adl.trials(ctx, w, settings=settings, factors=factors)
        ),
        *(t for w in (0, 1) for t in pca.trials(ctx, w, settings=signed, factors=factors)),
    ]

    def test(effect: Effect, tests: Collection[str]) -> CausalTest:
        own = [t for t in trials if t.test in tests]
        how = {"trials": own, "settings": settings, "show_progress": True}
        return run_trials(ctx, effect, neutral, **how)

    results = each_effect(run, question, test, tests=TESTS, name="baselines")
    if sizes:
        results += _curves(run, question, pca, sizes=sizes, factors=factors)
    return results, adl


def _curves(
    run: Run,
    question: EffectQuestion,
    pca: DifferencePCA,
    *,
    sizes: Sequence[int],
    factors: Mapping[str, Tensor | None],
) -> list[CausalTest]:
    """Necessity at equal numbers of directions, with fewer controls: there are many trials.

    Components are of the run's held-out text, on which the dictionary was measured, and of neutral
    text alone.
    """
    ctx = InterventionContext.of(run.models, run.crosscoder)
    neutral = neutral_text(run, question.text, neutral=question.neutral)
    # As many positions as directions are asked for, as far as contexts reach.
    n_positions = max(1, min(max(sizes) - 1, neutral.context_size // 2))
    adl = activation_difference(ctx.models, neutral, n_positions=n_positions)
    positions = [w for w in adl.which() if w != "mean"]
    directions = {
        "PCA, neutral text": pca.components,
        "mean difference (ADL)": torch.stack([adl.direction(w) for w in ("mean", *positions)]),
    }
    held_out = held_out_text(run, question.text)
    if not torch.equal(held_out.tokens, neutral.tokens):
        all_text = difference_pca(ctx.models, held_out, n_components=len(pca.components))
        directions = {"PCA": all_text.components, **directions}
    settings = replace(
        control_settings(question, n_matched=0),
        n_random=min(question.n_random, N_CONTROLS_OF_CURVES),
    )
    ranked = ranked_latents(run, n=max(sizes), order="attribution", text=question.text)
    trials = curve_trials(
        ctx, directions=directions, latents=ranked, sizes=sizes, settings=settings, factors=factors
    )

    def test(effect: Effect, tests: Collection[str]) -> CausalTest:  # noqa: ARG001
        how = {"trials": trials, "settings": settings, "show_progress": True}
        return run_trials(ctx, effect, neutral, **how)

    return each_effect(run, question, test, tests=("necessity",), name="baselines_curves")
