"""The files of a run beside its dictionary: `runner_cfg.json` and checkpoints.

`runner_cfg.json` records how a dictionary is made. It is written before anything else and compared
on resume, so that a run never continues with other models, text or settings. A checkpoint is a
folder `checkpoints/step_00001500` with `weights.safetensors`, `optimizer.safetensors` and
`state.json`: all that a run needs to continue as if it had never stopped. It appears under its name
complete or not at all, and its content is compared with its hashes: where the newest is damaged,
the one before it is used. Ctrl-C and SIGTERM wait for the step to be saved. Limits: models are told
apart by name, revision and, in folders, files; the last two checkpoints are kept; signals are
caught in the main thread only.
"""

import hashlib
import json
import platform
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.config.training import TrainConfig
from tl_crosscoder.crosscoder.config import CrosscoderTrainingConfig
from tl_crosscoder.crosscoder.partition import with_renamed_keys
from tl_crosscoder.data.loader import Position
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.files import CFG_NAME, RECORD_NAME, WEIGHTS_NAME
from tl_crosscoder.models.checks import folder_hashes
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.progress import note
from tl_crosscoder.train.parallel.shards import add_shard_, latents_of

N_KEPT = 2
_NAMES = "weights.safetensors", "optimizer.safetensors"
_PACKAGES = ("tl-crosscoder", "torch", "transformer-lens", "sae-lens", "transformers")
# What may differ between a run and its continuation.
_HASHES = "model_sha256"
_WEIGHTS = "weights_sha256"
_SAVED = ("checkpoints/step_*", WEIGHTS_NAME)
_FREE = (
    _WEIGHTS,
    "environment",
    *(
        f"training.{name}"
        for name in (
            "output",
            "wandb_project",
            "prefetch",
            "data_parallel",
            "latent_parallel",
        )
    ),
)


def run_record(
    source: ActivationSource,
    text: TokenizedText,
    held_out: TokenizedText,
    config: TrainConfig,
    cfg: CrosscoderTrainingConfig,
) -> dict[str, Any]:
    """Everything that decides the weights of a run, as plain JSON."""
    dictionary = cfg.to_dict()
    hashes = {} if source.cache_id else folder_hashes(source.sites)
    how = {
        "python": platform.python_version(),
        "device": str(source.device),
        "n_threads": torch.get_num_threads(),
    }
    return {
        "sites": [s.to_dict() for s in source.sites],
        "weight_processing": source.weight_processing,
        "tokenizer": source.tokenizer_name,
        "cache_id": source.cache_id,
        **({_HASHES: hashes} if hashes else {}),
        "training": config.to_dict(),
        **{
            n: dictionary[n] for n in ("sparsity", "partitions", "delta_loss", "matryoshka", "auxk")
        },
        "d_sae": cfg.d_sae,
        "text": _description(text),
        "held_out": _description(held_out),
        "environment": {p: version(p) for p in _PACKAGES} | how,
    }


def _description(text: TokenizedText) -> dict[str, Any]:
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


def check_output(output: Path, *, resume: bool) -> None:
    """Refuse a folder that a run may not write to. Raises ValueError."""
    files.check_folder(output, RECORD_NAME, what="run", resume=resume, saved=_SAVED)


def open_run(output: Path, record: dict[str, Any], *, resume: bool) -> bool:
    """Claim `output` for this run; True if it holds the run complete already.

    Raises:
        ValueError: the folder holds another run, or files that are not a run; nothing is changed.
    """
    check_output(output, resume=resume)
    path = output / RECORD_NAME
    if not path.is_file() or not files.holds(output, _SAVED):
        files.sweep(output)
        files.write_json(path, record)
        return False
    for folder in (output, output / "checkpoints"):
        files.sweep(folder)
    there = read_record(output)
    # Runs that an earlier version began have no hashes.
    free = _FREE if _HASHES in there else (*_FREE, _HASHES)
    files.check_same(there, record, what=f"{output} holds another run", free=free)
    return (output / CFG_NAME).is_file() and (output / WEIGHTS_NAME).is_file()


def record_weights(output: Path) -> None:
    """Write the hash of the weights of a run that is complete into its record, once."""
    record = read_record(output)
    if _WEIGHTS not in record:
        sha256 = files.sha256(output / WEIGHTS_NAME)
        files.write_json(output / RECORD_NAME, record | {_WEIGHTS: sha256})


def check_weights(output: Path, record: Mapping[str, Any]) -> None:
    """Raise ValueError for weights other than those that the record of a run has the hash of."""
    path = output / WEIGHTS_NAME
    if record.get(_WEIGHTS, sha256 := files.sha256(path)) != sha256:
        raise ValueError(
            f"{path} is damaged or was changed: its sha256 is not the one in {RECORD_NAME}. Copy "
            "it again; a dictionary that was changed belongs in a folder of its own."
        )


def read_record(output: Path) -> dict[str, Any]:
    """The record of a run folder; FileNotFoundError where there is none."""
    path = output / RECORD_NAME
    if not path.is_file():
        what = f"it has no {RECORD_NAME}" if output.is_dir() else "there is no such folder"
        raise FileNotFoundError(
            f"{output} is not a run: {what}. Give a folder that `tl-crosscoder train` or `demo` "
            "wrote, or a dictionary of `tl-crosscoder list`."
        )
    return with_renamed_keys(files.read_object(path, training=dict, held_out=dict))


@dataclass(kw_only=True)
class TrainState:
    """What changes while a run goes on, apart from weights and optimizer."""

    step: int = 0
    """Completed steps."""
    position: Position
    """Next batch of the loader."""
    tokens_since_fired: Int[Tensor, " d_sae"]
    """Tokens since each latent was last active."""
    scales: tuple[float, ...]
    """Factor of each site's activations."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl at this step; what a broken run wrote after it is cut off."""


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, in their order; no other folder that somebody keeps beside them."""
    found = (output / "checkpoints").glob("step_*")
    return sorted(p for p in found if p.is_dir() and re.fullmatch(r"step_\d{8}", p.name))


def save_checkpoint(
    output: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: TrainState
) -> Path:
    """Write a checkpoint of a run and delete all but the last `N_KEPT`."""
    path = checkpoint_path(output, state)
    with files.replacing(path) as temporary:
        write_shard(temporary, model, optimizer, state)
        write_state(temporary, state)
    remove_old(output)
    return path


def checkpoint_path(output: Path, state: TrainState) -> Path:
    """Where a checkpoint of this step belongs."""
    return output / "checkpoints" / f"step_{state.step:08d}"


def write_shard(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    *,
    index: int = 0,
    n_shards: int = 1,
) -> None:
    """Write the tensors of one shard of the latents, or of all, into a checkpoint's folder."""
    moments = {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    moments["tokens_since_fired"] = state.tokens_since_fired
    names = _names(index, n_shards)
    for name, tensors in zip(names, (model.state_dict(), moments), strict=True):
        files.write_tensors(folder / name, tensors)


def write_state(folder: Path, state: TrainState, *, n_shards: int = 1) -> None:
    """Write what makes a checkpoint of the shards in a folder: its state, and their hashes."""
    plain = {n: v for n, v in vars(state).items() if n != "tokens_since_fired"}
    plain["position"] = asdict(state.position)
    plain = json.loads(json.dumps(plain | ({"n_shards": n_shards} if n_shards > 1 else {})))
    files.write_json(folder / "state.json", plain | {"sha256": _hashes(folder, plain)})


def remove_old(output: Path) -> None:
    """Delete all but the last `N_KEPT` checkpoints."""
    for old in checkpoints(output)[:-N_KEPT]:
        files.discard(old)


def _names(index: int, n_shards: int) -> tuple[str, str]:
    """Weights and optimizer of a shard, as the hub names parts of a model."""
    if n_shards == 1:
        return _NAMES
    which = f"-{index + 1:05d}-of-{n_shards:05d}.safetensors"
    return tuple(name.replace(".safetensors", which) for name in _NAMES)  # type: ignore[return-value]


def _hashes(path: Path, plain: Mapping[str, Any]) -> dict[str, str]:
    """Of each file of a checkpoint, and of its state but for these."""
    state = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    n = plain.get("n_shards", 1)
    names = [name for index in range(n) for name in _names(index, n)]
    return {name: files.sha256(path / name) for name in names} | {"state": state}


def remove_checkpoints(output: Path) -> None:
    """Delete the checkpoints of a run that is complete."""
    for old in checkpoints(output):
        files.discard(old)
    with suppress(OSError):  # not there, or somebody keeps something in it
        (output / "checkpoints").rmdir()


def load_last_checkpoint(
    output: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    cfg: CrosscoderTrainingConfig,
    latents: Int[Tensor, " n"] | None = None,
) -> TrainState | None:
    """Weights, optimizer and state of the newest checkpoint that is intact; None without any.

    Args:
        output: folder of the run.
        model: all of the dictionary, or the shard of some latents.
        optimizer: of its parameters.
        cfg: of the whole dictionary.
        latents: those of the model; all by default.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    found = checkpoints(output)
    for path in reversed(found):
        try:
            return load_checkpoint(path, model, optimizer, cfg=cfg, latents=latents)
        except ValueError as error:
            note(f"Warning: {error}", is_warning=True)
    if found:
        raise ValueError(
            f"every checkpoint in {output} is damaged ({', '.join(p.name for p in found)}). Begin "
            "again in another folder."
        )
    return None


def load_checkpoint(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    cfg: CrosscoderTrainingConfig,
    latents: Int[Tensor, " n"] | None = None,
) -> TrainState:
    """Restore weights and optimizer, whatever shards they were written in; returns the state.

    Raises:
        ValueError: it is damaged; model and optimizer are as they were.
    """
    plain = _checked_state(path)
    weights, tensors = _tensors(path, plain.get("n_shards", 1), cfg, latents)
    model.load_state_dict(weights)
    fired = tensors.pop("tokens_since_fired")
    moments: dict[int, dict[str, Tensor]] = {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        own = {k.split("/")[1]: t for k, t in tensors.items() if k.startswith(f"{name}/")}
        # Fused Adam walks through memory: moments need the strides of their parameter, and the
        # encoder's memory is transposed.
        moments[i] = {
            key: torch.empty_like(parameter).copy_(t) if t.shape == parameter.shape else t
            for key, t in own.items()
        }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return TrainState(
        step=plain["step"],
        position=Position(**plain["position"]),
        tokens_since_fired=fired.to(next(model.parameters()).device),
        scales=tuple(plain["scales"]),
        metrics_bytes=plain["metrics_bytes"],
    )


def load_weights(path: Path, model: torch.nn.Module, *, cfg: CrosscoderTrainingConfig) -> None:
    """Weights of a whole dictionary from a checkpoint. Raises ValueError where it is damaged."""
    n_shards = _checked_state(path).get("n_shards", 1)
    model.load_state_dict(_tensors(path, n_shards, cfg, None, which=(0,))[0])


def _tensors(
    path: Path,
    n_shards: int,
    cfg: CrosscoderTrainingConfig,
    latents: Tensor | None,
    *,
    which: Sequence[int] = (0, 1),
) -> list[dict[str, Tensor]]:
    """Weights and optimizer, or one of them, of some latents."""
    if n_shards == 1 and latents is None:
        return [files.read_tensors(path / _NAMES[i]) for i in which]
    own = torch.arange(cfg.d_sae) if latents is None else latents
    whole: list[dict[str, Tensor]] = [{} for _ in which]
    for index in range(n_shards):
        theirs = latents_of(cfg, index, n_shards)
        for into, i in zip(whole, which, strict=True):
            shard = files.read_tensors(path / _names(index, n_shards)[i])
            add_shard_(into, own, shard, theirs)
    return whole


def _checked_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint whose files have their hashes. Raises ValueError for any other."""
    try:
        plain = files.read_object(path / "state.json")
        recorded = plain.pop("sha256", None)
        if recorded == _hashes(path, plain):
            return plain
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path} is damaged ({error})") from error
    raise ValueError(f"checkpoint {path} is damaged: its files do not have the recorded hashes.")


class TrainingInterruptedError(KeyboardInterrupt):
    """Training was interrupted after it had saved a checkpoint."""


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second Ctrl-C stops at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def interrupt(number: int, frame: Any) -> None:
        del number, frame
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(s, interrupt) for s in signals]
    try:
        yield interrupted
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
