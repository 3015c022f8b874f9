"""`runner_cfg.json`: how a dictionary was made, and whether a folder may be written to.

The record is written before anything else and compared on resume, so that a run never continues
with other models, text or settings. Limit: models are identified by name and revision.
"""

import hashlib
import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tl_crosscoder import files
from tl_crosscoder.activation_source import ActivationSource
from tl_crosscoder.activations.text import TokenizedText
from tl_crosscoder.crosscoder.config import CrosscoderTrainingConfig
from tl_crosscoder.crosscoder.crosscoder import CFG_NAME, WEIGHTS_NAME
from tl_crosscoder.train.config import TrainConfig

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
        "training": asdict(config),
        **{n: dictionary[n] for n in ("sparsity", "parts", "delta_loss", "matryoshka", "auxk")},
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
    return json.loads(path.read_text(encoding="utf-8"))


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
