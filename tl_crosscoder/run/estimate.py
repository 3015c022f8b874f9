"""What a run takes in memory, disk and FLOPs, before anything is downloaded.

Contract: of each model `estimate` reads `config.json` and nothing else; parameters are counted on
the meta device, exactly. Limits: hooks are taken to be as wide as the residual stream, and all
experts of a mixture to run. Not counted: reading and tokenising the text, and the measures at the
end but for the models' part.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tl_crosscoder.config.training import HarvestConfig, Plan, RunConfig
from tl_crosscoder.crosscoder.partition import placed
from tl_crosscoder.crosscoder.sparse.step import MAX_DENSITY
from tl_crosscoder.models.site import Site
from tl_crosscoder.run.model_cost import ModelCost, model_cost
from tl_crosscoder.run.sources import sites_of
from tl_crosscoder.train.checkpoint import N_KEPT
from tl_crosscoder.train.presets import recipe_of


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes and FLOPs of a run; `str()` is a table."""

    models: tuple[ModelCost, ...]
    d_in: int
    d_sae: int
    n_parameters: int
    """Of the crosscoder."""
    n_tokens: int
    """Through the models: to train on, to calibrate and to measure."""
    memory_bytes: dict[str, int]
    disk_bytes: dict[str, int]
    flops: dict[str, int]

    @property
    def download_bytes(self) -> int:
        """Weights that are not here yet, adapters aside."""
        return sum(model.download_bytes or 0 for model in self.models)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the totals."""
        totals = {
            "download_bytes": self.download_bytes,
            "total_memory_bytes": sum(self.memory_bytes.values()),
            "total_disk_bytes": sum(self.disk_bytes.values()),
            "total_flops": sum(self.flops.values()),
        }
        return asdict(self) | totals

    def __str__(self) -> str:
        rows = [("model", "parameters", "layers run", "download", "in memory")]
        rows += [
            (
                m.name if m.adapter is None else f"  + {m.adapter}",
                _si(m.n_parameters),
                f"{m.n_layers_run} of {m.n_layers}",
                "adapter" if m.download_bytes is None else _bytes(m.download_bytes),
                _bytes(m.memory_bytes),
            )
            for m in self.models
        ]
        crosscoder = (
            f"crosscoder: {self.d_sae:,} latents on {self.d_in:,} inputs, "
            f"{_si(self.n_parameters)} parameters; "
        ) * bool(self.d_sae) + f"{_si(self.n_tokens)} tokens"
        parts: list[tuple[str, Mapping[str, float], Callable[[float], str]]] = [
            ("memory", self.memory_bytes, _bytes),
            ("disk", self.disk_bytes | {"download": self.download_bytes}, _bytes),
            ("FLOPs", self.flops, _si),
        ]
        return "\n".join([_table(rows), crosscoder, *(_sum(*part) for part in parts)])


def _sum(name: str, parts: Mapping[str, float], show: Callable[[float], str]) -> str:
    """`memory 3.0 GB: models 1.0 GB, text 2.0 GB`; what is nothing is left out."""
    shown = ", ".join(f"{part} {show(value)}" for part, value in parts.items() if value)
    return f"{name}: {show(sum(parts.values()))} ({shown})"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *rest = widths
    lines = (
        f"{row[0]:<{first}}" + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], rest, strict=True))
        for row in rows
    )
    return "\n".join(lines)


def _si(value: float) -> str:
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    return f"{_si(value)}B" if value >= 1e3 else f"{value:.0f} B"


DEAD_SHARE = 0.3
"""Latents that AuxK is taken to revive at any time. [open]: Kassem et al. report 8 to 64 % dead at
the end of training."""
N_DENSE_BUFFERS = 6
"""As large as all codes of a batch, in a dense step (training_step.json: 6.1); a sparse one holds
less than one."""
TEXT_BYTES = 7
"""Held for each token of the text."""
CACHE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class Size:
    """A crosscoder's size."""

    d_in: int
    d_sae: int
    k: float | None
    """Active latents where the step takes the sparse way; None where it is dense, or may be."""

    @property
    def n_parameters(self) -> int:
        """Weights and biases."""
        return 2 * self.d_in * self.d_sae + self.d_in + self.d_sae

    def step_flops(self) -> tuple[int, int]:
        """A token's, of dense and of sparse products: one and four, or six and none."""
        dense = 2 * self.d_in * self.d_sae
        return (6 * dense, 0) if self.k is None else (dense, round(4 * 2 * self.d_in * self.k))

    def auxk_flops(self) -> int:
        """A token's, of five dense products with the dead latents."""
        return round(5 * 2 * self.d_in * DEAD_SHARE * self.d_sae)


def estimate(config: RunConfig, *, cache_dtype: str | None = None) -> Estimate:
    """What `config` will take; `cache_dtype` adds a cache of its activations in that format.

    Raises:
        ValueError: a config that names no models, a model whose config.json cannot be had, a layer
            that it does not have, or an unknown `cache_dtype`.
        FileNotFoundError: an embedded model that there is not.
    """
    if cache_dtype is not None and cache_dtype not in CACHE_BYTES:
        raise ValueError(
            f"cache_dtype is {cache_dtype!r}; it is one of {', '.join(CACHE_BYTES)}, or None for "
            "no cache."
        )
    if not config.base or not config.hook_name:
        raise ValueError(
            f"base is {config.base!r} and hook_name {config.hook_name!r}: an estimate needs both. "
            "Give the models; a run from a cache has none to wait for."
        )
    models, widths = _models(config)
    d_in = widths[0] if config.difference else sum(widths)
    plan = config.plan(d_model=max(widths), k=getattr(config.preset, "k", 16))
    d_sae = plan.d_sae
    n_tokens = plan.n_tokens + config.n_calibration_tokens + config.n_measured_tokens
    size = Size(d_in=d_in, d_sae=d_sae, k=_active_latents(config, d_sae))
    dense, sparse = size.step_flops()
    flops = {
        "harvest": n_tokens * sum(m.flops_per_token for m in models),
        "dense products": plan.n_tokens * dense,
        "sparse products": plan.n_tokens * sparse,
        "AuxK": plan.n_tokens * size.auxk_flops() if config.auxk_weight else 0,
    }
    return Estimate(
        models=models,
        d_in=d_in,
        d_sae=d_sae,
        n_parameters=size.n_parameters,
        n_tokens=n_tokens,
        memory_bytes=_memory(config, plan, models, size),
        disk_bytes={
            "dictionary": 4 * size.n_parameters,
            "checkpoints": N_KEPT * 3 * 4 * size.n_parameters,
            "cache": n_tokens * d_in * CACHE_BYTES[cache_dtype] if cache_dtype else 0,
        },
        flops=flops,
    )


def estimate_harvest(config: HarvestConfig) -> Estimate:
    """What a cache will take. Raises as `estimate` does."""
    models, widths = _models(config)
    d_in = widths[0] if config.difference else sum(widths)
    row_bytes = d_in * CACHE_BYTES[config.store]
    flops = {"harvest": config.n_tokens * sum(m.flops_per_token for m in models)}
    return Estimate(
        models=models,
        d_in=d_in,
        d_sae=0,
        n_parameters=0,
        n_tokens=config.n_tokens,
        memory_bytes={
            "models": sum(m.memory_bytes for m in models),
            "forward pass": config.harvest_batch_size * max(m.score_bytes for m in models),
            # Its parts as they come, the whole, and a copy while it is written.
            "shard": 3 * config.shard_tokens * row_bytes,
            "text": TEXT_BYTES * config.n_tokens,
        },
        disk_bytes={"cache": config.n_tokens * (row_bytes + TEXT_BYTES + 1)},
        flops=flops,
    )


def _models(config: RunConfig | HarvestConfig) -> tuple[tuple[ModelCost, ...], list[int]]:
    """Every model once, and the width of every site."""
    by_model: dict[tuple[str, str | None, str | None], list[Site]] = {}
    for site in sites_of(config):
        by_model.setdefault((site.model_name, site.adapter, site.revision), []).append(site)
    how = {"dtype": config.dtype, "context_size": config.context_size}
    costs = tuple(model_cost(own, **how) for own in by_model.values())
    sites = zip(costs, by_model.values(), strict=True)
    return costs, [cost.d_model for cost, own in sites for _ in own]


def _active_latents(config: RunConfig, d_sae: int) -> float | None:
    """See `Size.k`."""
    recipe = recipe_of(config.preset, n_steps=1)
    groups = recipe.sparsity.groups(placed(recipe.partitions, d_sae), d_sae)
    k = sum(k for _, k in groups)
    return None if config.kernels == "dense" or not 0 < k <= MAX_DENSITY * d_sae else k


def _memory(
    config: RunConfig, plan: Plan, models: tuple[ModelCost, ...], size: Size
) -> dict[str, int]:
    n_rows = plan.batch_size // config.n_accumulated
    n_buffers = N_DENSE_BUFFERS if size.k is None else 1
    contexts = max(config.buffer_contexts, 2 * plan.batch_size // config.context_size + 1)
    return {
        "models": sum(m.memory_bytes for m in models),
        "forward pass": config.harvest_batch_size * max(m.score_bytes for m in models),
        # Weights, gradients, two moments of Adam.
        "crosscoder": 4 * 4 * size.n_parameters,
        # Buffers as large as all codes; rows, reconstruction and its gradient.
        "batch": 4 * n_rows * (n_buffers * size.d_sae + 3 * size.d_in),
        "mixing buffer": 4 * contexts * config.context_size * size.d_in,
        "text": TEXT_BYTES * plan.n_tokens,
    }
