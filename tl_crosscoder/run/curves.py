"""Curves on a run's folder: what `tl-crosscoder curves` does.

Contract: latents in every order and directions of methods without a dictionary, at equal numbers,
by every effect; results are JSON in the folder (`curves_predictions.json`,
`curves_behaviour_NAME.json`). Latents are ranked on other documents than they are tested on, and
directions are of text. Limit: see `interventions.curves`.
"""

import sys
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_crosscoder.baselines.difference import activation_difference, difference_pca
from tl_crosscoder.config.causal import CurvesQuestion, Order
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.causal_rows import CausalTest
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.costs import OffTarget
from tl_crosscoder.interventions.curves import curve_trials
from tl_crosscoder.interventions.trials import Trial
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.run.causal import (
    control_settings,
    each_effect,
    held_out_text,
    neutral_text,
    null_of,
    ranked_latents,
)
from tl_crosscoder.run.run import Run

Rows = Float[Tensor, "n d_model"]


def curves_run(run: Run, question: CurvesQuestion | None = None) -> list[CausalTest]:
    """Necessity and sufficiency by number of latents, of every effect; kept in the folder.

    Raises:
        FileNotFoundError, ValueError: no text, no behaviour, or an order that the latents lack.
    """
    question = question or CurvesQuestion()
    ctx, latents = InterventionContext.of(run.models, run.crosscoder), run.measurement().latents
    settings = control_settings(question, n_matched=question.n_matched)
    neutral = neutral_text(run, question.text, neutral=question.neutral)
    null = null_of(run, question)

    def trials() -> list[Trial]:
        orders = orders_of(run, question)
        if not all(orders.values()):
            return []
        directions = directions_of(run, question, neutral)
        how = {"sizes": question.sizes, "settings": settings, "null": null}
        return curve_trials(
            ctx, neutral, latents=latents, orders=orders, directions=directions, **how
        )

    costs = OffTarget(ctx=ctx, text=neutral)
    return each_effect(run, question, costs, trials, settings=settings, name="curves")


def orders_of(run: Run, question: CurvesQuestion) -> dict[str, list[int]]:
    """The first latents of each order asked for, or of all that these latents have."""
    found: dict[str, list[int]] = {}
    for order in question.orders or get_args(Order):
        try:
            found[order] = ranked_latents(
                run, n=max(question.sizes), order=order, text=question.text
            )
        except ValueError as error:  # such as decoder norms of a diff-SAE, which has one site
            if question.orders is not None:
                raise
            tqdm.write(f"The order {order} is left out: {error}", file=sys.stderr)
    return found


def directions_of(run: Run, question: CurvesQuestion, neutral: TokenizedText) -> dict[str, Rows]:
    """The first directions of each method asked for, at the run's hook."""
    n = max(question.sizes)
    makers = {
        "pca": lambda: _components(run.models, held_out_text(run, question.text), n),
        "pca-neutral": lambda: _components(run.models, neutral, n),
        "adl": lambda: _means(run.models, neutral, n),
    }
    return {method: makers[method]() for method in question.methods}


def _components(models: ModelPair, text: TokenizedText, n: int) -> Rows:
    """Principal components of x^1 - x^0."""
    d_model = models.model_sites[0].d_model
    return difference_pca(models, text, n_components=min(n, d_model)).components


def _means(models: ModelPair, text: TokenizedText, n: int) -> Rows:
    """Mean of x^1 - x^0, then at as many positions as there are directions, if contexts reach."""
    n_positions = max(1, min(n - 1, text.context_size // 2))
    found = activation_difference(models, text, n_positions=n_positions)
    positions = [w for w in found.which() if w != "mean"]
    return torch.stack([found.direction(w) for w in ("mean", *positions)])
