"""Curves: how much the first latents of an order do, or the first directions of a method.

    necessity     fine-tuned model, x^1 - sum_{j <= n} f_j v_j      or x^1 - Q Q' (x^1 - x^0)
    sufficiency   base model,       x^0 + sum_{j <= n} f_j v_j      or x^0 + Q Q' (x^1 - x^0)

with v_j = d_j^1 - d_j^0 and Q an orthonormal basis of the first n directions, so that as many
directions as the activation is wide are all of the other model's activation. Contract: trials for
`run_trials`, one for each test, order or method, and number; `CausalRow.latents` is the order or
method, and `ALL` is all latents at once. Controls are of the first order alone, since each is a
pass: its random directions are as long as its own edit at every token, its matched sets fire as
often as its latents. Limit: directions act at every token, latents where they are active, so
compare at equal cost too (`figures.cost_curves`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.analysis.latents import LatentMeasures
from tl_crosscoder.config.causal import CURVE_SIZES
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.causal import TrialMaker, checked
from tl_crosscoder.interventions.causal_rows import ALL
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.controls import gaussian_factors
from tl_crosscoder.interventions.edits import ProjectOut
from tl_crosscoder.interventions.trials import ControlSettings, Trial

TESTS = ("necessity", "insert")


def curve_trials(
    ctx: InterventionContext,
    neutral: TokenizedText,
    *,
    latents: LatentMeasures,
    orders: Mapping[str, Sequence[int]],
    directions: Mapping[str, Float[Tensor, "n d_model"]] | None = None,
    sizes: Sequence[int] = CURVE_SIZES,
    tests: Sequence[str] = TESTS,
    settings: ControlSettings,
    null: Crosscoder | None = None,
) -> list[Trial]:
    """The first latents of some orders, and the first directions of some methods, for `run_trials`.

    Args:
        ctx: models and dictionary.
        neutral: text for the directions with the covariance of the difference.
        latents: measures of the dictionary: firing rates, for matched latents.
        orders: latents by the name of their order, the first ones first; the first order has the
            controls.
        directions: of methods without a dictionary by their names, raw space, the first ones first.
        sizes: numbers of latents and directions; each has those that it is rich enough for.
        tests: which of `TESTS`.
        settings: of the controls.
        null: another dictionary at the same hook, of a null pair or of another fine-tune: its
            directions are one more control.

    Raises:
        ValueError: sizes below 1, or none that an order or method has as many for; latents out of
            range or that never fire.
    """
    rich = {**orders, **(directions or {})}
    if not any(1 <= n <= len(each) for n in sizes for each in rich.values()) or min(sizes) < 1:
        raise ValueError(
            f"sizes are {list(sizes)}: give numbers from 1 on, of which an order or method has as "
            f"many. They have { ({name: len(each) for name, each in rich.items()}) }."
        )
    maker = TrialMaker(
        ctx=ctx,
        latents=latents,
        settings=settings,
        null=null,
        factors=gaussian_factors(ctx, neutral, settings.controls),
    )
    return [
        trial
        for test in tests
        for trial in (
            *_of_orders(maker, test, orders, sizes),
            *_of_directions(ctx, test, directions or {}, sizes),
            *([_of_all(maker, test)] if orders else []),
        )
    ]


def _of_orders(
    maker: TrialMaker, test: str, orders: Mapping[str, Sequence[int]], sizes: Sequence[int]
) -> Iterator[Trial]:
    ctx = maker.ctx
    for i, (name, ranked) in enumerate(orders.items()):
        for n in [n for n in sizes if n <= len(ranked)]:
            ids = checked(ctx, ranked[:n], maker.latents, name)
            yield maker.trial(test, name, ids, has_controls=i == 0)


def _of_all(maker: TrialMaker, test: str) -> Trial:
    every = maker.ctx.latents(range(maker.ctx.dictionary.cfg.d_sae))
    return replace(maker.trial(test, ALL, every, has_controls=False), latents=())


def _of_directions(
    ctx: InterventionContext,
    test: str,
    directions: Mapping[str, Float[Tensor, "n d_model"]],
    sizes: Sequence[int],
) -> Iterator[Trial]:
    for name, rows in directions.items():
        for n in [n for n in sizes if n <= len(rows)]:
            own = exchanged(ctx, rows[:n], test=test)
            yield Trial(test=test, name=name, n_latents=n, own=own, controls={})


def exchanged(
    ctx: InterventionContext, rows: Float[Tensor, "n d_model"], *, test: str = "necessity"
) -> ProjectOut:
    """One model's activation with the other model's projection on the span of some rows.

    Of necessity the fine-tuned model's, of insertion the base's.
    """
    pair = (ctx.finetuned, ctx.base) if test == "necessity" else (ctx.base, ctx.finetuned)
    return ProjectOut(site=pair[0], stream=pair[0], directions=rows, replacement=pair[1])
