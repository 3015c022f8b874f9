"""What one GPU does: a training step beside its floor, harvest beside bare passes, the measures.

    python benchmarks/gpu.py                          # 2 x 2,304 -> 73,728, k 100, batch 4,096
    python benchmarks/gpu.py --quick --device cpu     # the same at a small size

The floor of a step is the encoder's product at the rate at which this device multiplies matrices of
that shape, and the optimizer's bytes (it reads weights, gradients and two moments, and writes three
of them) at the rate at which it copies; both are measured first. A share of 100 % would be a step
that does nothing else. Medians after a warm-up; results are a JSON file that is replaced part by
part, so that a run that is cut short keeps what it has. Limit: one device.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from analysis_speed import random_dictionary
from data_path import bare, bridge_pair, harvested, text_of
from trainers import Shape, activations, our_crosscoder, our_step

from tl_crosscoder import files
from tl_crosscoder.analysis.latent_scaling import ScalingSums
from tl_crosscoder.crosscoder.crosscoder import sparse_codes
from tl_crosscoder.crosscoder.topk import BatchTopK
from tl_crosscoder.models.site import site_parts

SHAPE = Shape(d_sae=73_728, d_model=2_304, k=100, batch=4_096)
QUICK = Shape(d_sae=512, d_model=32, k=8, batch=256)
ADAM_TENSORS = 7
"""Tensors as large as the weights that an Adam step reads or writes."""


def seconds(device: str, run: Callable[[], Any], *, n: int) -> float:
    """Median of n, after two to warm up."""

    def once() -> float:
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    once(), once()
    return median(once() for _ in range(n))


def rates(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of the encoder's product, and bytes/s of a copy."""
    x = torch.randn(shape.batch, shape.d_in, device=device, dtype=dtype)
    W = torch.randn(shape.d_in, shape.d_sae, device=device, dtype=dtype)
    product = seconds(device, lambda: x @ W, n=10)
    source = torch.empty(shape.d_in * shape.d_sae // 2, device=device)
    into = torch.empty_like(source)
    copy = seconds(device, lambda: into.copy_(source), n=10)
    return {
        "product_flop_s": 2 * shape.batch * shape.d_in * shape.d_sae / product,
        "copy_bytes_s": 2 * source.numel() * source.itemsize / copy,
    }


def step(shape: Shape, device: str, dtype: torch.dtype, found: dict[str, float]) -> dict[str, Any]:
    """A training step beside its floor."""
    crosscoder = our_crosscoder(
        shape,
        BatchTopK(k=shape.k),
        device=device,
        compute_dtype="bfloat16" if dtype == torch.bfloat16 else None,
    )
    batches = [batch.to(device) for batch in activations(replace(shape, d_sae=4 * shape.d_model))]
    crosscoder.initialize_from_(batches[0])
    train, turn = our_step(crosscoder, device=device), iter(range(10**9))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = seconds(device, lambda: train(batches[next(turn) % len(batches)]), n=15)
    n_weights = sum(p.numel() for p in crosscoder.parameters())
    product = 2 * shape.batch * shape.d_in * shape.d_sae / found["product_flop_s"]
    optimizer = ADAM_TENSORS * 4 * n_weights / found["copy_bytes_s"]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "step_ms": 1e3 * taken,
        "product_ms": 1e3 * product,
        "optimizer_ms": 1e3 * optimizer,
        "share_of_floor": (product + optimizer) / taken,
        "tokens_s": shape.batch / taken,
        "peak_gb": None if peak is None else peak / 1e9,
        "held_gb": 16 * n_weights / 1e9,
    }


def harvest(d_model: int, n_contexts: int, device: str) -> dict[str, Any]:
    """Tokens a second through two random models, and what bare passes of them do."""
    with tempfile.TemporaryDirectory() as folder:
        pair = bridge_pair(Path(folder), d_model, device=device)
        text = text_of(pair, n_contexts)
        with torch.no_grad():
            own, theirs = (
                text.tokens.numel() / seconds(device, lambda run=run: run(pair, text), n=3)
                for run in (harvested, bare)
            )
    return {"tokens_s": own, "bare_tokens_s": theirs, "of_bare": own / theirs}


def scaling(shape: Shape, device: str) -> dict[str, Any]:
    """Tokens a second of encoding, and of Latent Scaling with it."""
    torch.manual_seed(0)
    rows = torch.randn(shape.batch, 2, shape.d_model)
    crosscoder = random_dictionary(shape.d_model, shape.d_sae, shape.k, rows).to(device)
    x = rows.to(device)
    sums = ScalingSums(crosscoder, pair=(0, 1), controls=())

    def add() -> None:
        sums.add(site_parts(x, crosscoder.sites), sparse_codes(crosscoder, x))

    with torch.no_grad():
        encode = seconds(device, lambda: sparse_codes(crosscoder, x), n=5)
        both = seconds(device, add, n=5)
    return {"encode_tokens_s": shape.batch / encode, "tokens_s": shape.batch / both}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="at a small size")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    arguments = parser.parse_args()
    device, shape = arguments.device, QUICK if arguments.quick else SHAPE
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device. `--quick --device cpu` runs on the CPU.")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    found: dict[str, Any] = {"device": name, "shape": str(shape), "torch": torch.__version__}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "rates": lambda: rates(shape, device, dtype),
        "step": lambda: step(shape, device, dtype, found["rates"]),
        "harvest": lambda: harvest(*((64, 8) if arguments.quick else (2048, 64)), device),
        "scaling": lambda: scaling(shape, device),
    }
    for part, run in parts.items():
        found[part] = run()
        files.write_json(arguments.output, found)
        print(
            f"{part}: " + ", ".join(f"{k} {v:.4g}" for k, v in found[part].items() if v is not None)
        )


if __name__ == "__main__":
    main()
