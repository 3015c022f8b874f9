"""What a run measures of itself while it trains: site scales, metrics.jsonl, progress bar, W&B.

Rows are `[n_sites, d_model]` or `[d_in]` (see `site.row_shape`). In training every site has a mean
squared norm equal to its width; the scales are folded into the dictionary at save. Limit: metrics
are of single training batches; `analysis` measures on held-out text.
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
from tl_crosscoder.crosscoder.loss import BatchMean, own_mean
from tl_crosscoder.crosscoder.training import StepLoss
from tl_crosscoder.files import METRICS_NAME
from tl_crosscoder.models.site import Site, row_shape, site_parts, subtracted_sites
from tl_crosscoder.train.checkpoint import TrainState

_LEAST_VARIANCE = 1e-12
"""Share of the mean squared norm below which float32 has nothing but rounding."""


def check_rows(rows: Float[Tensor, "tokens *row"], sites: Sequence[Site]) -> None:
    """Raise ValueError for a site that nothing can be learned of, before the first step."""
    if not len(rows):
        raise ValueError("the first batches are empty: the masks leave out every token.")
    for site, part in zip(sites, site_parts(rows, sites), strict=True):
        x = part.cpu().double()
        square, largest = x.pow(2).sum(dim=-1).mean().item(), x.abs().max().item()
        variance = (x - x.mean(dim=0)).pow(2).sum(dim=-1).mean().item()
        what = f"activations of site {site.name!r} ({site.hook_name})"
        if not square < torch.finfo(torch.float32).max:
            raise ValueError(
                f"the {what} reach {largest:g}: their squares are beyond float32. Check the "
                "weights of its model, or choose another hook point."
            )
        if variance <= _LEAST_VARIANCE * square:
            raise ValueError(
                f"the {what} are the same for all of the first {len(rows):,} tokens, up to "
                f"rounding (their mean norm is {math.sqrt(square):g}): there is nothing to learn. "
                "Choose another hook point, other text, or models that differ."
            )


def scales_of_rows(rows: Float[Tensor, "tokens *row"], sites: Sequence[Site]) -> tuple[float, ...]:
    """For each site the factor that makes its mean squared norm equal to its width."""
    norms = [x.pow(2).sum(dim=-1).cpu().double().mean().item() for x in site_parts(rows, sites)]
    return tuple(math.sqrt(s.d_model / norm) for s, norm in zip(sites, norms, strict=True))


def row_factors(scales: Sequence[float], sites: Sequence[Site]) -> Float[Tensor, "..."]:
    """Factors of a row: `[n_sites, 1]`, or `[d_in]` with each site's factor repeated."""
    factors = torch.tensor(scales)
    if len(row_shape(sites)) == 2:
        return factors[:, None]
    return factors.repeat_interleave(torch.tensor([site.d_model for site in sites]))


def fve(
    x: Float[Tensor, "batch d_model"],
    x_hat: Float[Tensor, "batch d_model"],
    *,
    batch_mean: BatchMean = own_mean,
) -> Tensor:
    """Fraction of variance explained, 1 - mean ||x - x̂||^2 / mean ||x - mean||^2, a scalar.

    NaN where x is the same everywhere. The FVE of a site hides that of the difference, which can be
    a percent of the variance.
    """
    left, all_of_it = (v.pow(2).sum(dim=-1) for v in (x - x_hat, x - batch_mean(x)))
    return 1 - batch_mean(left) / batch_mean(all_of_it)


@torch.no_grad()
def step_metrics(
    output: StepLoss,
    *,
    sites: tuple[Site, ...],
    scales: Tensor,
    is_dead: Tensor,
    auxk_fve: Tensor | None = None,
    batch_mean: BatchMean = own_mean,
) -> dict[str, float]:
    """Losses, FVE of each site in raw space, L0 and the share of dead latents.

    With it the FVE of the difference of the compared sites, where one can be subtracted from the
    other.

    Args:
        output: of one training step, in the space of training.
        sites: of the crosscoder.
        scales: what rows were multiplied by, see `row_factors`.
        is_dead: `[d_sae]`.
        auxk_fve: of the residual by the dead latents; None without AuxK.
        batch_mean: over the whole batch, of which `output` may be a part.
    """
    shape = (len(output.x), *row_shape(sites))
    x, x_hat = (site_parts(v.view(shape) / scales, sites) for v in (output.x, output.x_hat))
    metrics = {"loss": output.loss} | {f"loss/{n}": v for n, v in output.losses.items()}
    for site, own, own_hat in zip(sites, x, x_hat, strict=True):
        metrics[f"fve/{site.name}"] = fve(own, own_hat, batch_mean=batch_mean)
    pair = subtracted_sites(sites)
    if pair is not None:
        base, finetuned = pair
        differences = (each[finetuned] - each[base] for each in (x, x_hat))
        metrics["fve/difference"] = fve(*differences, batch_mean=batch_mean)
    metrics["l0"] = output.codes.l0()
    metrics["dead_share"] = is_dead.float().mean()
    if auxk_fve is not None:
        metrics["auxk_fve"] = auxk_fve
    return {name: value.item() for name, value in metrics.items()}


def bar_text(metrics: dict[str, float]) -> str:
    """The metrics of a step as the progress bar shows them."""
    sites = [n.removeprefix("fve/") for n in metrics if n.startswith("fve/")]
    shown = [f"FVE {s} {metrics['fve/' + s]:.3f}" for s in sites]
    return "  ".join([*shown, f"L0 {metrics['l0']:.1f}", f"dead {metrics['dead_share']:.1%}"])


class MetricsLog:
    """Appends metrics to a JSONL file and, where a project is given, to Weights & Biases.

    A NaN metric is written as null. What a broken run wrote after its last checkpoint is cut off,
    so that a resumed file reads like an unbroken one; a file that has lost its end keeps the lines
    that are whole.
    """

    def __init__(self, output: Path | None, config: TrainConfig, state: TrainState) -> None:
        self.path = output / METRICS_NAME if output else None
        self._started, self._first_step = time.perf_counter(), state.step
        assert config.batch_size is not None, "the trainer fills its config in"
        self._batch_size = config.batch_size
        if self.path and self.path.exists():
            with self.path.open("rb+") as file:
                kept = file.read(state.metrics_bytes)
                state.metrics_bytes = file.truncate(kept.rfind(b"\n") + 1)
        self._wandb = _open_wandb(output, config) if config.wandb_project else None

    def write(self, step: int, metrics: dict[str, float]) -> int:
        """Log the metrics of a step; returns the length of the file in bytes."""
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        row = {"step": step, "n_tokens": step * self._batch_size} | metrics
        row["tokens_per_s"] = (step - self._first_step) * self._batch_size / elapsed
        if self._wandb:
            self._wandb.log(row, step=step)
        if self.path is None:
            return 0
        finite = {n: v if math.isfinite(v) else None for n, v in row.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")
            return file.tell()

    def close(self) -> None:
        """Finish the W&B run, if there is one."""
        if self._wandb:
            self._wandb.finish()


def _open_wandb(output: Path | None, config: TrainConfig) -> Any:
    """A W&B run; the same folder continues the same one."""
    import wandb  # an optional dependency

    where = str(output.resolve()) if output else None
    return wandb.init(
        project=config.wandb_project,
        name=output.name if output else None,
        config=asdict(config),
        dir=where,
        id=hashlib.sha256(where.encode()).hexdigest()[:16] if where else None,
        resume="allow",
    )
