"""Methods without a dictionary on a run's folder: what `tl-crosscoder baselines` does.

Contract: mean difference and principal components in the tests that latents have; tokens and texts
that the difference of the logits shows; results are JSON in the folder
(`baselines_behaviour_NAME.json`, `mined_tokens.json` and so on). Limit: directions at the hook one
by one; many together, beside latents, are in `curves`.
"""

from collections.abc import Sequence
from dataclasses import replace

from tl_crosscoder.baselines.difference import (
    ActivationDifference,
    activation_difference,
    difference_pca,
)
from tl_crosscoder.baselines.generations import Generations, generations, prefills
from tl_crosscoder.baselines.mining import DiffMining, diff_mining
from tl_crosscoder.config.causal import EffectQuestion
from tl_crosscoder.files import GENERATIONS_NAMES, MINED_NAME
from tl_crosscoder.interventions.causal_rows import CausalTest
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.controls import gaussian_factors
from tl_crosscoder.interventions.costs import OffTarget
from tl_crosscoder.interventions.trials import Trial
from tl_crosscoder.run.causal import control_settings, each_effect, neutral_text
from tl_crosscoder.run.run import Run


def baseline_run(
    run: Run,
    question: EffectQuestion,
    *,
    strengths: Sequence[float] = (0.5, 1.0, 2.0),
) -> tuple[list[CausalTest], ActivationDifference]:
    """The tests of what needs no dictionary, and the mean difference by position.

    Directions are taken of neutral text, at positions 1 and 2 and over all, and the first two
    principal components, of which both signs are steered by.
    """
    ctx = InterventionContext.of(run.models)
    neutral = neutral_text(run, question.text, neutral=question.neutral)
    adl = activation_difference(ctx.models, neutral)
    pca = difference_pca(ctx.models, neutral, n_components=2)
    settings = control_settings(question, n_matched=0, alphas=tuple(strengths))
    signed = replace(settings, alphas=tuple(sign * s for s in strengths for sign in (-1, 1)))

    def trials() -> list[Trial]:
        how = {"factors": gaussian_factors(ctx, neutral, settings.controls), "shared": {}}
        means = [adl.trials(ctx, w, settings=settings, **how) for w in (1, 2, "mean")]
        components = [pca.trials(ctx, w, settings=signed, **how) for w in (0, 1)]
        return [trial for own in (*means, *components) for trial in own]

    costs = OffTarget(ctx=ctx, text=neutral)
    return each_effect(run, question, costs, trials, settings=settings, name="baselines"), adl


def mined_tokens(run: Run, question: EffectQuestion) -> DiffMining:
    """Diff Mining on neutral text; kept in the folder."""
    found = diff_mining(run.models, neutral_text(run, question.text, neutral=question.neutral))
    found.save(run.path / MINED_NAME)
    return found


def written_texts(run: Run, question: EffectQuestion, *, n: int, alpha: float) -> list[Generations]:
    """What the fine-tuned model, and amplified logits, write from random beginnings; kept, too."""
    neutral = neutral_text(run, question.text, neutral=question.neutral)
    beginnings = prefills(neutral, run.models, n=n, seed=question.seed)
    found = []
    for name, strength in zip(GENERATIONS_NAMES, (0.0, alpha), strict=True):
        found.append(generations(run.models, beginnings, alpha=strength, seed=question.seed))
        found[-1].save(run.path / name)
    return found
