"""`runner_cfg.json`: how a dictionary was made, and whether a folder may be written to.

The record is written before anything else and compared on resume, so that a run never continues
with other models, text or settings. Limit: models are identified by name and revision.

Checkpoints: all that a run needs to go on as if it had never stopped.

A checkpoint is a folder `step_00001500` with `weights.safetensors`, `optimizer.safetensors` and
`state.json`. It appears under its name complete or not at all. Limit: the last two are kept.
"""

import hashlib
import json
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.config.training import TrainConfig
from tl_crosscoder.crosscoder.config import CrosscoderTrainingConfig
from tl_crosscoder.crosscoder.crosscoder import CFG_NAME, WEIGHTS_NAME
from tl_crosscoder.crosscoder.partition import with_renamed_keys
from tl_crosscoder.data.loader import Position
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.source import ActivationSource

RECORD_NAME = "runner_cfg.json"
_PACKAGES = ("tl-crosscoder", "torch", "transformer-lens", "sae-lens", "transformers")
# What may differ between a run and its continuation.
_FREE = ("environment", "training.output", "training.wandb_project", "training.prefetch")


def run_record(
    source: ActivationSource,
    text: TokenizedText,
    held_out: TokenizedText,
    config: TrainConfig,
    cfg: CrosscoderTrainingConfig,
) -> dict[str, Any]:
    """Everything that decides the weights of a run, as plain JSON."""
    dictionary = cfg.to_dict()
    return {
        "sites": [s.to_dict() for s in source.sites],
        "weight_processing": source.weight_processing,
        "cache_id": source.cache_id,
        "training": config.to_dict(),
        **{
            n: dictionary[n] for n in ("sparsity", "partitions", "delta_loss", "matryoshka", "auxk")
        },
        "d_sae": cfg.d_sae,
        "text": _describe(text),
        "held_out": _describe(held_out),
        "environment": {p: version(p) for p in _PACKAGES}
        | {
            "python": platform.python_version(),
            "device": str(source.device),
            "n_threads": torch.get_num_threads(),
        },
    }


def check_output(output: Path, *, resume: bool) -> None:
    """Refuse a folder that a run may not write to. Raises ValueError."""
    files.check_folder(output, RECORD_NAME, what="run", resume=resume)


def open_run(output: Path, record: dict[str, Any], *, resume: bool) -> bool:
    """Claim `output` for this run; True if it holds the run complete already.

    Raises:
        ValueError: the folder holds another run, or files that are no run; nothing is changed.
    """
    check_output(output, resume=resume)
    path = output / RECORD_NAME
    if not path.is_file():
        files.write_json(path, record)
        return False
    differing = sorted(files.differences(read_record(output), record, free=_FREE))
    if differing:
        raise ValueError(
            f"{output} holds another run: {', '.join(differing)}. Resume with the same settings, "
            "or choose another output folder."
        )
    return (output / CFG_NAME).is_file() and (output / WEIGHTS_NAME).is_file()


def read_record(output: Path) -> dict[str, Any]:
    """The record of a run folder; FileNotFoundError where there is none."""
    path = output / RECORD_NAME
    if not path.is_file():
        what = f"it has no {RECORD_NAME}" if output.is_dir() else "there is no such folder"
        raise FileNotFoundError(
            f"{output} is not a run: {what}. Give a folder that `tl-crosscoder train` or `demo` "
            "wrote, or a dictionary of `tl-crosscoder list`."
        )
    return with_renamed_keys(json.loads(path.read_text(encoding="utf-8")))


def _describe(text: TokenizedText) -> dict[str, Any]:
    bits = text.tokens.numpy().tobytes() + text.dropped.numpy().tobytes()
    return {
        "n_contexts": len(text),
        "context_size": text.context_size,
        "n_tokens": text.n_tokens,
        "tokens_by_mask": text.mask_counts,
        "tokens_by_source": text.source_counts,
        "tokens_by_role": text.role_counts,
        "norm_limits": None if text.norm_limits is None else list(text.norm_limits),
        "sha256": hashlib.sha256(bits).hexdigest(),
    }


N_KEPT = 2


@dataclass(kw_only=True)
class TrainState:
    """What changes while a run goes on, apart from weights and optimizer."""

    step: int = 0
    """Completed steps."""
    position: Position
    """Next batch of the loader."""
    tokens_since_fired: Tensor
    """`[d_sae]`, int64: tokens since each latent was last active."""
    scales: tuple[float, ...]
    """What each site's activations are multiplied by."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl at this step; what a broken run wrote after it is cut off."""


def checkpoint_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step_{step:08d}"


def save_checkpoint(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: TrainState
) -> Path:
    """Write a checkpoint into `folder` and delete all but the last `N_KEPT`."""
    path = folder / checkpoint_name(state.step)
    plain = asdict(state)
    fired = plain.pop("tokens_since_fired")
    with files.replacing(path) as temporary:
        files.write_tensors(temporary / "weights.safetensors", model.state_dict())
        files.write_tensors(
            temporary / "optimizer.safetensors",
            {"tokens_since_fired": fired} | _optimizer_tensors(model, optimizer),
        )
        files.write_json(temporary / "state.json", plain)
    for old in sorted(folder.glob("step_*"))[:-N_KEPT]:
        shutil.rmtree(old)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step, if there is one."""
    return max(folder.glob("step_*"), default=None)


def load_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> TrainState:
    """Put weights and optimizer back as they were, and return the state."""
    model.load_state_dict(load_file(path / "weights.safetensors"))
    tensors = load_file(path / "optimizer.safetensors")
    fired = tensors.pop("tokens_since_fired")
    _restore_optimizer(model, optimizer, tensors)
    plain: dict[str, Any] = json.loads((path / "state.json").read_text())
    return TrainState(
        step=plain["step"],
        position=Position(**plain["position"]),
        tokens_since_fired=fired.to(next(model.parameters()).device),
        scales=tuple(plain["scales"]),
        metrics_bytes=plain["metrics_bytes"],
    )


def _optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Adam's moments and step counts under `parameter/moment`, by parameter name."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    state = optimizer.state_dict()
    parameters = list(model.named_parameters())
    grouped: dict[int, dict[str, Tensor]] = {}
    for i, (name, parameter) in enumerate(parameters):
        own = {k.split("/")[1]: t for k, t in tensors.items() if k.startswith(f"{name}/")}
        # Fused Adam walks through memory: moments need the strides of their parameter, and the
        # encoder's memory is transposed.
        grouped[i] = {
            key: torch.empty_like(parameter).copy_(t) if t.shape == parameter.shape else t
            for key, t in own.items()
        }
    optimizer.load_state_dict({**state, "state": grouped})
