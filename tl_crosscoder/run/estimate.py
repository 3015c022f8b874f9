"""What a run takes in memory, disk and FLOPs, before anything is downloaded.

Contract: of each model `estimate` reads `config.json` and nothing else; parameters are counted on
the meta device, exactly. Limits: hooks are taken to be as wide as the residual stream, and all
experts of a mixture to run. Not counted: reading and tokenising the text, and the measures at the
end but for the models' part.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tl_crosscoder.config.training import HarvestConfig, Plan, RunConfig
from tl_crosscoder.crosscoder.partition import placed
from tl_crosscoder.crosscoder.sparse.step import MAX_DENSITY
from tl_crosscoder.models.site import Site, sites_of
from tl_crosscoder.results.render import Section, as_text
from tl_crosscoder.run.model_cost import ModelCost, model_cost
from tl_crosscoder.train.checkpoint import N_KEPT
from tl_crosscoder.train.presets import recipe_of


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes and FLOPs of a run; `str()` is a table."""

    models: tuple[ModelCost, ...]
    d_in: int
    d_sae: int
    n_parameters: int
    """Weights and biases of the crosscoder."""
    n_tokens: int
    """Through the models: to train on, to calibrate and to measure."""
    memory_bytes: dict[str, int]
    disk_bytes: dict[str, int]
    flops: dict[str, int]

    @property
    def download_bytes(self) -> int:
        """Weights that are not here yet, adapters aside."""
        return sum(model.download_bytes or 0 for model in self.models)

    def __str__(self) -> str:
        """A table of the models, then a line for each kind of cost."""
        columns = {
            "model": [m.name if m.adapter is None else f"  + {m.adapter}" for m in self.models],
            "parameters": [_si(m.n_parameters) for m in self.models],
            "layers run": [f"{m.n_layers_run} of {m.n_layers}" for m in self.models],
            "download": [
                "adapter" if m.download_bytes is None else _bytes(m.download_bytes)
                for m in self.models
            ],
            "in memory": [_bytes(m.memory_bytes) for m in self.models],
        }
        crosscoder = (
            f"crosscoder: {self.d_sae:,} latents on {self.d_in:,} inputs, "
            f"{_si(self.n_parameters)} parameters; "
        ) * bool(self.d_sae) + f"{_si(self.n_tokens)} tokens"
        notes = [
            crosscoder,
            _sum("memory", self.memory_bytes, _bytes),
            _sum("disk", self.disk_bytes | {"download": self.download_bytes}, _bytes),
            _sum("FLOPs", self.flops, _si),
        ]
        return as_text([Section(columns=columns, notes=notes)])


def _sum(name: str, parts: Mapping[str, float], show: Callable[[float], str]) -> str:
    """`memory 3.0 GB: models 1.0 GB, text 2.0 GB`; what is nothing is left out."""
    shown = ", ".join(f"{part} {show(value)}" for part, value in parts.items() if value)
    return f"{name}: {show(sum(parts.values()))} ({shown})"


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


def estimate(config: RunConfig) -> Estimate:
    """What a training run will take.

    Raises:
        ValueError: a config that names no models, a model whose config.json cannot be had, or a
            layer that it does not have.
        FileNotFoundError: an embedded model that there is not.
    """
    if not config.base or not config.hook_name:
        raise ValueError(
            f"base is {config.base!r} and hook_name {config.hook_name!r}: an estimate needs both. "
            "Give the models; a run from a cache has none to wait for."
        )
    models, d_in, d_model = _models(config)
    plan = config.plan(d_model=d_model, k=getattr(config.preset, "k", 16))
    n_tokens = plan.n_tokens + config.n_calibration_tokens + config.n_measured_tokens
    n_parameters = 2 * d_in * plan.d_sae + d_in + plan.d_sae
    k = _active_latents(config, plan.d_sae)
    product = plan.n_tokens * 2 * d_in * plan.d_sae
    flops = {
        "harvest": n_tokens * sum(m.flops_per_token for m in models),
        # The search, and four products with the active latents; or six products with all.
        "dense products": product if k is not None else 6 * product,
        "sparse products": plan.n_tokens * round(4 * 2 * d_in * (k or 0)),
        "AuxK": round(5 * DEAD_SHARE * product) if config.auxk_weight else 0,
    }
    step = _step_memory(config, plan, d_in, n_parameters, k)
    disk = {
        "dictionary": 4 * n_parameters,
        "checkpoints": N_KEPT * 3 * 4 * n_parameters,
    }
    return Estimate(
        models=models,
        d_in=d_in,
        d_sae=plan.d_sae,
        n_parameters=n_parameters,
        n_tokens=n_tokens,
        memory_bytes=_model_memory(config, models) | step,
        disk_bytes=disk,
        flops=flops,
    )


def estimate_harvest(config: HarvestConfig) -> Estimate:
    """What a cache will take. Raises as `estimate` does."""
    models, d_in, _ = _models(config)
    row_bytes = d_in * CACHE_BYTES[config.store]
    memory = _model_memory(config, models) | {
        # Its parts as they come, the whole, and a copy while it is written.
        "shard": 3 * config.shard_tokens * row_bytes,
        "text": TEXT_BYTES * config.n_tokens,
    }
    return Estimate(
        models=models,
        d_in=d_in,
        d_sae=0,
        n_parameters=0,
        n_tokens=config.n_tokens,
        memory_bytes=memory,
        disk_bytes={"cache": config.n_tokens * (row_bytes + TEXT_BYTES + 1)},
        flops={"harvest": config.n_tokens * sum(m.flops_per_token for m in models)},
    )


def _models(config: RunConfig | HarvestConfig) -> tuple[tuple[ModelCost, ...], int, int]:
    """Every model once, the width of a row, and that of the widest site."""
    by_model: dict[tuple[str, str | None, str | None], list[Site]] = {}
    for site in sites_of(config):
        by_model.setdefault((site.model_name, site.adapter, site.revision), []).append(site)
    how = {"dtype": config.dtype, "context_size": config.context_size}
    costs = tuple(model_cost(own, **how) for own in by_model.values())
    sites = zip(costs, by_model.values(), strict=True)
    widths = [cost.d_model for cost, own in sites for _ in own]
    return costs, widths[0] if config.difference else sum(widths), max(widths)


def _model_memory(
    config: RunConfig | HarvestConfig, models: tuple[ModelCost, ...]
) -> dict[str, int]:
    """Bytes of the models and of what a forward pass holds."""
    return {
        "models": sum(m.memory_bytes for m in models),
        "forward pass": config.harvest_batch_size * max(m.score_bytes for m in models),
    }


def _step_memory(
    config: RunConfig, plan: Plan, d_in: int, n_parameters: int, k: float | None
) -> dict[str, int]:
    """Bytes of the crosscoder, of a batch, and of the text; k as `_active_latents` has it."""
    n_rows = plan.batch_size // config.n_accumulated
    n_buffers = N_DENSE_BUFFERS if k is None else 1
    contexts = max(config.buffer_contexts, 2 * plan.batch_size // config.context_size + 1)
    return {
        # Weights, gradients, two moments of Adam.
        "crosscoder": 4 * 4 * n_parameters,
        # Buffers as large as all codes; rows, reconstruction and its gradient.
        "batch": 4 * n_rows * (n_buffers * plan.d_sae + 3 * d_in),
        "mixing buffer": 4 * contexts * config.context_size * d_in,
        "text": TEXT_BYTES * plan.n_tokens,
    }


def _active_latents(config: RunConfig, d_sae: int) -> float | None:
    """Active latents a token where the step is sparse; None where it is dense, or may be."""
    recipe = recipe_of(config.preset, n_steps=1)
    groups = recipe.sparsity.groups(placed(recipe.partitions, d_sae), d_sae)
    k = sum(k for _, k in groups)
    return None if config.kernels == "dense" or not 0 < k <= MAX_DENSITY * d_sae else k
