"""Curves on a run's folder: what `tl-crosscoder curves` does.

Contract: latents in every order and directions of methods without a dictionary, at equal numbers,
by every effect; results are JSON in the folder (`curves_predictions.json`,
`curves_behaviour_NAME.json`). Latents are ranked on other documents than they are tested on, and
directions are of text. Limit: see `interventions.curves`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar, get_args

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.baselines.difference import component_rows, mean_rows
from tl_crosscoder.baselines.frozen_sae import sae_directions
from tl_crosscoder.baselines.weights import weight_directions
from tl_crosscoder.config.causal import METHODS, CurvesQuestion, Order
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.causal_rows import CausalTest
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.costs import OffTarget
from tl_crosscoder.interventions.curves import curve_trials
from tl_crosscoder.interventions.trials import Trial
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.progress import note
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
T = TypeVar("T")


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
    n, text = max(question.sizes), question.text
    makers = {
        order: partial(ranked_latents, run, n=n, order=order, text=text)
        for order in question.orders or get_args(Order)
    }
    return _available(makers, is_asked=question.orders is not None)


def directions_of(run: Run, question: CurvesQuestion, neutral: TokenizedText) -> dict[str, Rows]:
    """The first directions of each method asked for, or of all that these models have."""
    n, models = max(question.sizes), run.models
    makers: dict[str, Callable[[], Rows]] = {
        "pca": lambda: component_rows(models, held_out_text(run, question.text), n),
        "pca-neutral": lambda: component_rows(models, neutral, n),
        "adl": lambda: mean_rows(models, neutral, n),
        "weights": lambda: weight_directions(models, n=n),
        "sae": lambda: _of_sae(models, question.sae, neutral, n),
    }
    if question.methods is None:
        methods = [method for method in METHODS if method != "sae" or question.sae]
    else:
        methods = [*question.methods]
    is_asked = question.methods is not None
    return _available({method: makers[method] for method in methods}, is_asked=is_asked)


def _available(makers: Mapping[str, Callable[[], T]], *, is_asked: bool) -> dict[str, T]:
    """What each makes; one that cannot is left out, and named, unless it was asked for."""
    found: dict[str, T] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ValueError as error:  # such as decoder norms of a diff-SAE, which has one site
            if is_asked:
                raise
            note(f"{name} is left out: {error}", is_warning=True)
    return found


def _of_sae(models: ModelPair, sae: str | None, text: TokenizedText, n: int) -> Rows:
    if sae is None:
        raise ValueError("the method sae needs an SAE of the base model: name its folder (--sae).")
    return sae_directions(models, sae, text, n=n)
