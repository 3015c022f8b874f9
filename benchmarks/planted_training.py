"""Training on a planted world: what `Trainer` does, from rows instead of models and text.

Each site is scaled by its measured size, Adam is fused, gradients are clipped, dead latents get
AuxK, the threshold is calibrated on fresh rows. Batches of a seed are the same for all recipes.
Limit: nothing is logged or saved.
"""

from collections.abc import Iterator

import torch
from planted_world import D_MODEL, PlantedWorld
from torch import Tensor

from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.crosscoder.config import CrosscoderTrainingConfig
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.training import CrosscoderTraining
from tl_crosscoder.models.site import Site
from tl_crosscoder.train.metrics import row_factors, scales_of_rows
from tl_crosscoder.train.presets import recipe_of

N_INITIAL_ROWS = 8192
"""Rows from which scales and decoder bias are measured, as in `Trainer`."""
TRAINING, CALIBRATION, MEASURING = range(3)
"""Streams of rows that have nothing in common."""


def sites_of(is_difference: bool) -> tuple[Site, ...]:
    names = ("difference",) if is_difference else ("base", "finetuned")
    return tuple(Site(name=n, d_model=D_MODEL, hook_name="", model_name="planted") for n in names)


def rows_of(
    world: PlantedWorld, n: int, *, sites: tuple[Site, ...], stream: int, index: int = 0
) -> Tensor:
    """Rows as these sites have them: `[n, 2, d_model]`, or the difference, `[n, d_model]`."""
    rows = world.rows(n, stream=stream, index=index)
    return rows if len(sites) > 1 else rows[:, 1] - rows[:, 0]


def new_crosscoder(config: RunConfig, sites: tuple[Site, ...]) -> CrosscoderTraining:
    plan = config.plan(d_model=D_MODEL)
    recipe = recipe_of(config.preset, n_steps=plan.n_steps)
    cfg = CrosscoderTrainingConfig(
        d_in=sum(s.d_model for s in sites),
        d_sae=plan.d_sae,
        sites=sites,
        sparsity=recipe.sparsity,
        partitions=recipe.partitions,
        delta_loss=recipe.delta_loss,
        matryoshka=recipe.matryoshka,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return CrosscoderTraining(cfg)


def train(crosscoder: CrosscoderTraining, batches: Iterator[Tensor], config: RunConfig) -> None:
    """`Trainer.step` over scaled batches."""
    plan = config.plan(d_model=D_MODEL)
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=config.lr, fused=True)
    tokens_since_fired = torch.zeros(crosscoder.cfg.d_sae, dtype=torch.int64)
    for step, batch in zip(range(plan.n_steps), batches, strict=False):
        optimizer.param_groups[0]["lr"] = plan.learning_rate(step)
        output = crosscoder.step_loss(
            batch,
            coefficients=crosscoder.cfg.sparsity.coefficients_at(step),
            is_dead=tokens_since_fired >= plan.n_tokens // 10,
            step=step,
        )
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(crosscoder.parameters(), config.max_grad_norm)
        optimizer.step()
        tokens_since_fired += len(batch)
        tokens_since_fired[output.codes.fired()] = 0


def fit(config: RunConfig, world: PlantedWorld) -> Crosscoder:
    """A trained dictionary for raw rows of this world."""
    sites = sites_of(config.difference)
    crosscoder = new_crosscoder(config, sites)
    first = rows_of(world, N_INITIAL_ROWS, sites=sites, stream=TRAINING)
    scales = scales_of_rows(first, sites)
    factors = row_factors(scales, sites)
    crosscoder.initialize_from_(first * factors)
    plan = config.plan(d_model=D_MODEL)
    train(
        crosscoder,
        (
            factors * rows_of(world, plan.batch_size, sites=sites, stream=TRAINING, index=1 + step)
            for step in range(plan.n_steps)
        ),
        config,
    )
    held_out = rows_of(world, config.n_calibration_tokens, sites=sites, stream=CALIBRATION)
    crosscoder.calibrate_threshold_((factors * held_out).split(N_INITIAL_ROWS))
    trained = crosscoder.to_inference()
    trained.fold_site_scales_(scales)
    return trained
