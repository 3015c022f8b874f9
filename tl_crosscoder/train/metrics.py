"""Site scales: in training every site has a mean squared norm equal to its width.

Measured on the first rows of the text; folded into the dictionary at save and recorded in its
sites. Shapes: rows of activations, `[n_sites, d_model]` or `[d_in]` (see `site.row_shape`).

What a run says about itself while it trains: metrics.jsonl, the progress bar, W&B.

Limit: these are figures of single training batches; `analysis` measures on held-out text.
"""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.config.training import TrainConfig
from tl_crosscoder.crosscoder.loss import difference_fve, fve
from tl_crosscoder.crosscoder.training import StepLoss
from tl_crosscoder.models.site import Site, row_shape, site_parts, subtracted_sites
from tl_crosscoder.train.checkpoint import TrainState


def site_scales(
    activations: Float[Tensor, "tokens n_sites d_model"],
) -> tuple[float, ...]:
    """For each site the factor that makes its mean squared norm equal to its width."""
    mean_squared_norm = activations.pow(2).sum(dim=-1).cpu().double().mean(dim=0)
    return tuple((activations.shape[-1] / mean_squared_norm).sqrt().tolist())


def scales_of_rows(rows: Float[Tensor, "tokens *row"], sites: Sequence[Site]) -> tuple[float, ...]:
    """The same of rows of either shape."""
    if len(row_shape(sites)) == 2:
        return site_scales(rows)
    return tuple(site_scales(part[:, None])[0] for part in site_parts(rows, sites))


def row_factors(scales: Sequence[float], sites: Sequence[Site]) -> Float[Tensor, "..."]:
    """What a row is multiplied by: `[n_sites, 1]`, or `[d_in]` with each site's factor repeated."""
    factors = torch.tensor(scales)
    if len(row_shape(sites)) == 2:
        return factors[:, None]
    return factors.repeat_interleave(torch.tensor([site.d_model for site in sites]))


@torch.no_grad()
def step_metrics(
    output: StepLoss, *, sites: tuple[Site, ...], scales: Tensor, is_dead: Tensor
) -> dict[str, float]:
    """Losses, FVE of each site, L0 and the share of dead latents.

    And the FVE of the difference of the compared sites, where one can be subtracted from the other.

    Args:
        output: of one training step, in the space of training.
        sites: of the crosscoder.
        scales: what rows were multiplied by, see `row_factors`.
        is_dead: `[d_sae]`.
    """
    shape = (len(output.x), *row_shape(sites))
    x = site_parts(output.x.view(shape) / scales, sites)
    x_hat = site_parts(output.x_hat.view(shape) / scales, sites)
    metrics = {"loss": output.loss} | {f"loss/{n}": v for n, v in output.losses.items()}
    for site, part, part_hat in zip(sites, x, x_hat, strict=True):
        metrics[f"fve/{site.name}"] = fve(part[:, None], part_hat[:, None]).squeeze()
    pair = subtracted_sites(sites)
    if pair is not None:
        both = (torch.stack([parts[i] for i in pair], dim=1) for parts in (x, x_hat))
        metrics["fve/difference"] = difference_fve(*both)
    metrics["l0"] = output.codes.l0()
    metrics["dead_share"] = is_dead.float().mean()
    return {name: value.item() for name, value in metrics.items()}


class MetricsLog:
    """Appends metrics to a JSONL file and, on demand, to Weights & Biases.

    A NaN metric is written as null. What a broken run wrote after its last checkpoint is cut
    off, so that a resumed file reads like an unbroken one.
    """

    def __init__(self, output: Path | None, config: TrainConfig, state: TrainState) -> None:
        self.path = output / "metrics.jsonl" if output else None
        self._started, self._first_step = time.perf_counter(), state.step
        self._batch_size = config.batch_size
        self._wandb: Any = None
        if self.path and self.path.exists():
            with self.path.open("rb+") as file:
                file.truncate(state.metrics_bytes)
        if config.wandb_project:
            self._wandb = _open_wandb(output, config)

    def write(self, step: int, metrics: dict[str, float]) -> int:
        """Log the metrics of a step; returns the length of the file in bytes."""
        row = {"step": step, "n_tokens": step * self._batch_size} | metrics
        row["tokens_per_s"] = self.tokens_per_s(step)
        if self._wandb:
            self._wandb.log(row, step=step)
        if self.path is None:
            return 0
        row = {
            n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            return file.tell()

    def tokens_per_s(self, step: int) -> float:
        """Mean speed since this process began to train."""
        elapsed = time.perf_counter() - self._started
        return (step - self._first_step) * self._batch_size / max(elapsed, 1e-9)

    def close(self) -> None:
        """Finish the W&B run, if there is one."""
        if self._wandb:
            self._wandb.finish()


def _open_wandb(output: Path | None, config: TrainConfig) -> Any:
    """A W&B run; the same folder continues the same one."""
    import wandb

    where = str(output.resolve()) if output else None
    run_id = hashlib.sha256(where.encode()).hexdigest()[:16] if where else None
    return wandb.init(
        project=config.wandb_project,
        name=output.name if output else None,
        config=asdict(config),
        dir=where,
        id=run_id,
        resume="allow",
    )


def bar_text(metrics: dict[str, float]) -> str:
    """The metrics of a step as the progress bar shows them."""
    sites = [n.removeprefix("fve/") for n in metrics if n.startswith("fve/")]
    shown = [f"FVE {s} {metrics['fve/' + s]:.3f}" for s in sites]
    return "  ".join([*shown, f"L0 {metrics['l0']:.1f}", f"dead {metrics['dead_share']:.1%}"])
