"""What a run takes in memory, disk and FLOPs, before anything is downloaded.

Contract: of each model `config.json` is read and nothing else; parameters are counted on the meta
device, exactly. Limits: decoder-only language models; hooks are taken to be as wide as the residual
stream, all experts of a mixture to run, and the weights of a quantised checkpoint count in full.
Not counted: reading and tokenising the text, and the measures at the end but for the models' part.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from tl_crosscoder import files
from tl_crosscoder.config.inputs import CONTEXT_SIZE
from tl_crosscoder.config.scan import ScanSettings
from tl_crosscoder.config.training import HarvestConfig, Plan, RunConfig
from tl_crosscoder.crosscoder.partition import placed
from tl_crosscoder.crosscoder.sparse.step import MAX_DENSITY
from tl_crosscoder.interventions.layer_scan_result import n_recommendable
from tl_crosscoder.mesh import DIGITS
from tl_crosscoder.models.devices import BLOCK, NF4, precision
from tl_crosscoder.models.hooked import last_stop_layer
from tl_crosscoder.models.hub_errors import explained
from tl_crosscoder.models.pretrained import resolve_model
from tl_crosscoder.models.site import Site, sites_of
from tl_crosscoder.results.render import Section, as_text
from tl_crosscoder.train.checkpoint import N_KEPT
from tl_crosscoder.train.presets import Recipe, recipe_of


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """One model of a run."""

    name: str
    """Hub name or folder; of the base where there is an adapter."""
    adapter: str | None
    n_parameters: int
    """Parameters, tied ones once and an adapter's not at all."""
    n_layers: int
    n_layers_run: int
    """All of them where a hook is outside the blocks; then the head runs too."""
    d_model: int
    download_bytes: int | None
    """0 where the weights are here; None for an adapter, which is small beside its base."""
    memory_bytes: int
    """Size of the weights; a base with an adapter is a second copy."""
    score_bytes: int
    """Attention scores of one layer on one context: most of what a forward pass holds."""
    flops_per_token: int


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
    about_hook: str = ""
    """What happens where no hook point is named."""
    mesh: tuple[int, int] = (1, 1)
    """Processes that share out the tokens, and the latents; memory is that of each."""
    n_steps: int = 0
    sent_bytes: dict[str, int] = field(default_factory=dict)
    """What each process sends in a step."""

    def hours(self, *, tflops: float, gb_s: float) -> float:
        """Hours of a run at what each device computes, and sends, in a second.

        Nothing is taken to overlap, and memory to keep up; a device reaches a third to two thirds
        of its nominal rate.
        """
        n = self.mesh[0] * self.mesh[1]
        computing = sum(self.flops.values()) / n / (tflops * 1e12)
        return (computing + self.n_steps * sum(self.sent_bytes.values()) / (gb_s * 1e9)) / 3600

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
            *([self.about_hook] if self.about_hook else []),
            crosscoder,
            _sum("memory" + self._of_each(), self.memory_bytes, _bytes),
            _sum("disk", self.disk_bytes | {"download": self.download_bytes}, _bytes),
            _sum("FLOPs", self.flops, _si),
            *([_sum("sent by each in a step", self.sent_bytes, _bytes)] if self.sent_bytes else []),
        ]
        return as_text([Section(columns=columns, notes=notes)])

    def _of_each(self) -> str:
        n_data, n_latents = self.mesh
        if n_data * n_latents == 1:
            return ""
        return f" of each of {n_data * n_latents} processes ({n_data} x {n_latents})"


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
"""Buffers as large as all codes of a batch, in a dense step (training_step.json: 6.1); a sparse one
holds less than one."""
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
    if not config.base:
        raise ValueError(
            f"base is {config.base!r}: an estimate needs the models. Give them; a run from a cache "
            "has none to wait for."
        )
    scan_flops, about_hook = 0, ""
    if not config.hook_name:
        hook_name, scan_flops, about_hook = _scan_first(config)
        config = replace(config, hook_name=hook_name)
    models, d_in, d_model = _models(config)
    plan = config.plan(d_model=d_model, k=getattr(config.preset, "k", 16))
    n_tokens = plan.n_tokens + config.n_calibration_tokens + config.n_measured_tokens
    n_parameters = 2 * d_in * plan.d_sae + d_in + plan.d_sae
    k = _active_latents(config, plan.d_sae)
    product = plan.n_tokens * 2 * d_in * plan.d_sae
    flops = {
        **({"layer scan": scan_flops} if scan_flops else {}),
        "harvest": n_tokens * sum(m.flops_per_token for m in models),
        # The search, and four products with the active latents; or six products with all.
        "dense products": product if k is not None else 6 * product,
        "sparse products": plan.n_tokens * round(4 * 2 * d_in * (k or 0)),
        "AuxK": round(5 * DEAD_SHARE * product) if config.auxk_weight else 0,
    }
    step = _step_memory(config, plan, d_in, k)
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
        about_hook=about_hook,
        mesh=_mesh(config),
        n_steps=plan.n_steps,
        sent_bytes=_sent_bytes(config, plan, d_in),
    )


def _mesh(config: RunConfig) -> tuple[int, int]:
    return config.data_parallel or 1, config.latent_parallel


def _sent_bytes(config: RunConfig, plan: Plan, d_in: int) -> dict[str, int]:
    """What each process of a mesh sends in a step; a ring sends a sum about twice."""
    n_data, n_latents = _mesh(config)
    recipe = recipe_of(config.preset, n_steps=plan.n_steps)
    n_groups = len(recipe.sparsity.groups(placed(recipe.partitions, plan.d_sae), plan.d_sae))
    batch = 4 * plan.batch_size * d_in // n_data
    n_ranges = _n_ranges(recipe)
    auxk = config.auxk_weight > 0 and recipe.sparsity.has_auxk
    of_data, of_latents = (2 * (n - 1) / n for n in (n_data, n_latents))
    n, per_group = n_data * n_latents, 8 * sum(2**width for _, width in DIGITS)
    every = {
        "decoded": of_latents * batch * n_ranges,
        "AuxK": of_latents * batch * auxk,
        "gradients": of_data * 4 * ((2 * d_in + 1) * plan.d_sae / n_latents + d_in),
        "selection": 2 * (n - 1) / n * per_group * n_groups * config.n_accumulated,
        "rows": 0 if config.cache else (n - 1) / n * batch,
    }
    return {name: round(value) for name, value in every.items() if value}


def _n_ranges(recipe: Recipe) -> int:
    """Ranges of latents that are decoded apart."""
    edges = {round(share * 1e6) for share in recipe.matryoshka}
    if recipe.delta_loss is not None and recipe.delta_loss.weight > 0:
        stops = [0, *(round(s * 1e6) for s in accumulate(p.share for p in recipe.partitions))]
        for p, start, stop in zip(recipe.partitions, stops, stops[1:], strict=False):
            if p.name == recipe.delta_loss.partition:
                edges |= {start, stop}
    return 1 + len(edges - {0, 1_000_000})


def _scan_first(config: RunConfig) -> tuple[str, int, str]:
    """What a layer scan may recommend at the latest, its FLOPs, and a sentence that says so."""
    settings = ScanSettings()
    models, _, _ = _models(replace(config, hook_name="ln_final.hook_normalized"))
    base, finetuned, n_layers = models[0], models[-1], models[0].n_layers
    hook_name = settings.hook_names(n_layers)[max(0, n_recommendable(n_layers) - 1)]
    n_tokens = settings.n_prompts * max(config.context_size, CONTEXT_SIZE)
    # The fine-tuned model goes on from every layer: through half of its layers on average.
    per_token = 2 * base.flops_per_token + (2 + n_layers / 2) * finetuned.flops_per_token
    about = (
        f"No hook point is named: a layer scan on {settings.n_prompts} documents comes first and "
        f"recommends one. What follows is for {hook_name}, the last that it takes where something "
        "passes below it; for another give --hook-name."
    )
    return hook_name, round(n_tokens * per_token), about


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
    costs = tuple(_model_cost(own, **how) for own in by_model.values())
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


def _step_memory(config: RunConfig, plan: Plan, d_in: int, k: float | None) -> dict[str, int]:
    """Bytes of the crosscoder, of a batch, and of the text, in each process of a mesh.

    k is what `_active_latents` has.
    """
    n_data, n_latents = _mesh(config)
    n_rows, d_sae = plan.batch_size // config.n_accumulated // n_data, plan.d_sae // n_latents
    n_buffers = N_DENSE_BUFFERS if k is None else 1
    contexts = max(config.buffer_contexts, 2 * plan.batch_size // config.context_size + 1)
    # What a process of several makes, and what it is dealt.
    share = 1 / n_data + (1 / (n_data * n_latents) if n_data * n_latents > 1 else 0)
    return {
        # Weights, gradients, two moments of Adam.
        "crosscoder": 4 * 4 * ((2 * d_in + 1) * d_sae + d_in),
        # Buffers as large as all codes; rows, reconstruction and its gradient.
        "batch": 4 * n_rows * (n_buffers * d_sae + 3 * d_in),
        "mixing buffer": round(4 * contexts * config.context_size * d_in * share),
        "text": TEXT_BYTES * plan.n_tokens,
    }


def _active_latents(config: RunConfig, d_sae: int) -> float | None:
    """Active latents a token where the step is sparse; None where it is dense, or may be."""
    recipe = recipe_of(config.preset, n_steps=1)
    groups = recipe.sparsity.groups(placed(recipe.partitions, d_sae), d_sae)
    k = sum(k for _, k in groups)
    return None if config.kernels == "dense" or not 0 < k <= MAX_DENSITY * d_sae else k


# --- one model ------------------------------------------------------------------------------------


def _model_cost(sites: Sequence[Site], *, dtype: str, context_size: int) -> ModelCost:
    """The cost of the model that these sites share.

    Raises:
        ValueError: a config.json that cannot be read, or a layer that the model does not have.
        FileNotFoundError: an embedded model that there is not.
    """
    site = sites[0]
    hf_config, is_local = _read_config(site.model_name, site.model_revision)
    text = hf_config.get_text_config()
    n_layers, width = text.num_hidden_layers, text.hidden_size
    stop = last_stop_layer([s.hook_name for s in sites])
    if stop is not None and stop > n_layers:
        raise ValueError(
            f"hook_name {site.hook_name!r} is at a layer that {site.model_name!r} does not have: "
            f"its {n_layers} layers are blocks.0 to blocks.{n_layers - 1}. Choose one of them."
        )
    n_parameters, layers = _count(hf_config, site.model_name)
    n_run_layers = n_layers if stop is None else stop
    n_run = sum(layers[:n_run_layers])
    head = text.vocab_size * width if stop is None else 0
    size = _compute_dtype(dtype).itemsize
    return ModelCost(
        name=site.model_name,
        adapter=site.adapter,
        n_parameters=n_parameters,
        n_layers=n_layers,
        n_layers_run=n_run_layers,
        d_model=width,
        download_bytes=_download(hf_config, n_parameters, is_local) if not site.adapter else None,
        memory_bytes=_weight_bytes(n_parameters, sum(layers), dtype),
        # The scores, their softmax in float32, and that rounded.
        score_bytes=text.num_attention_heads * context_size**2 * (2 * size + 4),
        # Scores and their product with the values, as wide as the model together.
        flops_per_token=2 * (n_run + head) + 4 * context_size * width * n_run_layers,
    )


def _read_config(name: str, revision: str | None) -> tuple[Any, bool]:
    """A model's config, of the hub no other file; and whether its weights are here."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from transformers import AutoConfig

    found = resolve_model(name)
    path = files.user_path(found)
    with explained(name, revision):
        if path.is_dir():
            return AutoConfig.from_pretrained(path), True
        file = hf_hub_download(str(found), "config.json", revision=revision)
        weights = ("model.safetensors", "model.safetensors.index.json")
        cached = (try_to_load_from_cache(str(found), w, revision=revision) for w in weights)
        is_cached = any(isinstance(c, str) for c in cached)
        return AutoConfig.from_pretrained(Path(file).parent), is_cached


def _count(hf_config: Any, name: str) -> tuple[int, list[int]]:
    """Parameters of a model, and of each of its layers."""
    from transformers import AutoModelForCausalLM

    with explained(name, None), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    n_layers = hf_config.get_text_config().num_hidden_layers
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    blocks = next((m for m in lists if len(m) == n_layers), None)
    if blocks is None:
        raise ValueError(
            f"{name!r} ({type(model).__name__}) has no list of {n_layers} layers, so that what "
            "runs up to the hook cannot be counted. Give a decoder-only language model."
        )
    layers = [sum(p.numel() for p in block.parameters()) for block in blocks]
    return sum(p.numel() for p in model.parameters()), layers


def _download(hf_config: Any, n_parameters: int, is_local: bool) -> int:
    """Bytes of the weights in the format that they are stored in; 0 where they are here."""
    stored = getattr(hf_config, "dtype", None) or torch.float32
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    return 0 if is_local else n_parameters * stored.itemsize


def _compute_dtype(dtype: str) -> torch.dtype:
    return torch.bfloat16 if dtype == NF4 else precision(dtype).dtype


def _weight_bytes(n_parameters: int, n_in_blocks: int, dtype: str) -> int:
    """In memory; NF4 holds half a byte a weight of the blocks, and a float32 scale for some."""
    size = _compute_dtype(dtype).itemsize
    in_blocks = 0.5 + 4 / BLOCK if dtype == NF4 else size
    return round(n_in_blocks * in_blocks) + (n_parameters - n_in_blocks) * size
