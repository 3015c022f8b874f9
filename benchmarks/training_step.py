"""One training step of ours beside public trainers, in one run: CPU time and peak memory.

    python benchmarks/training_step.py               # both sizes
    python benchmarks/training_step.py --density     # L1 and JumpReLU by share of active latents
    python benchmarks/training_step.py --skip sparsify SAELens --d-sae 4096 --output step.json

What a step does is said in `trainers.py`. Rows are interleaved (A B C A B C ...), so that a drift
of the machine meets all alike; times are `time.process_time` on one thread, the median and the
minimum of the timed steps. Memory: `memory_growth`. Limit: Linux.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from trainers import (
    ENCODER,
    PEERS,
    PRODUCTS,
    SHAPES,
    TINY,
    TRAINERS,
    Shape,
    Step,
    activations,
    our_crosscoder,
    our_step,
)

from tl_crosscoder import files
from tl_crosscoder.crosscoder import sparsity as sparsities
from tl_crosscoder.crosscoder.sparse.selection import fast_bfloat16
from tl_crosscoder.crosscoder.training import CrosscoderTraining

RESULTS = Path(__file__).parent / "results"
SIZES = [s.d_sae for s in SHAPES]
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
N_WARM_UP = 2
"""Steps that are not timed: the first makes Adam's moments."""
N_MEMORY_STEPS = 3
ALLOCATORS = {"default": {}, "mapped": {"MALLOC_MMAP_THRESHOLD_": "65536"}}
"""Environments of the processes that measure memory."""
NO_SPARSIFY = (
    "The row of sparsify needs a package that is not installed. Install it with "
    "`pip install -c constraints.txt -e '.[dev,bench]'`, or leave the row out: --skip sparsify"
)


def interleaved(
    steps: Mapping[str, Step], batches: list[Tensor], *, n_rounds: int
) -> dict[str, list[float]]:
    """CPU milliseconds of every timed step; each round runs every row once, on one batch."""
    milliseconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(-N_WARM_UP, n_rounds):
        for name, step in steps.items():
            started = time.process_time()
            step(batches[round_ % len(batches)])
            if round_ >= 0:
                milliseconds[name].append(round(1000 * (time.process_time() - started), 3))
    return milliseconds


def resident(field: str) -> int:
    """Bytes in a field of /proc/self/status: VmRSS is now, VmHWM the peak since its reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(n.split()[1]) for n in lines if n.startswith(field + ":"))


def memory_growth(name: str, shape: Shape) -> int:
    """Bytes by which the peak of a few steps lies above the process before the model was made.

    Call in a fresh process. A tiny model has run before, so that libraries are loaded; the batches
    are there already, and what the allocator had kept is given back: the growth hides no reuse.
    """
    torch.set_num_threads(1)
    TRAINERS[name](TINY)(activations(TINY)[0])
    batches = activations(shape)[:N_MEMORY_STEPS]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step = TRAINERS[name](shape)
    for batch in batches:
        step(batch)
    return resident("VmHWM") - before


def memory_of(name: str, shape: Shape) -> dict[str, float]:
    """`memory_growth` against the budget, twice, each time in a process of its own.

    First as users run it. Then with a mapping for each large buffer: glibc keeps what was freed
    below 32 MB, so that the first figure holds fragments too, and the second what was in use.
    """
    budget = shape.memory_budget
    measured: dict[str, float] = {"budget_bytes": budget}
    for allocator, environment in ALLOCATORS.items():
        os.environ.update(environment)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            growth = process.submit(memory_growth, name, shape).result()
        for key in environment:
            del os.environ[key]
        measured |= {
            f"{allocator}_bytes": growth,
            f"{allocator}_of_budget": round(growth / budget, 3),
        }
    return measured


def measure_rows(shape: Shape, names: Iterable[str], *, n_rounds: int) -> list[dict]:
    """Every row at one shape: times and their ratios."""
    builds = PRODUCTS | {n: TRAINERS[n] for n in names}
    steps = {name: build(shape) for name, build in builds.items()}
    times = interleaved(steps, activations(shape), n_rounds=n_rounds)
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    return [
        {
            "row": name,
            "median_ms": median,
            "min_ms": min(times[name]),
            "steps_ms": times[name],
            "of_encoder_product": round(median / medians[ENCODER], 2),
            "times_faster_than": {p: round(medians[p] / median, 2) for p in PEERS if p in medians},
        }
        for name, median in medians.items()
    ]


def print_rows(shape: Shape, rows: list[dict]) -> None:
    peers = list(rows[0]["times_faster_than"])
    print(f"\n{shape}, float32, one thread")
    heads = "".join(f"{'x ' + p.split(',')[0]:>12}" for p in peers)
    print(f"{'':<26}{'CPU ms':>10}{'min':>10}{'x encoder':>12}{heads}")
    for row in rows:
        faster = "".join(f"{row['times_faster_than'][p]:>12.2f}" for p in peers)
        print(
            f"{row['row']:<26}{row['median_ms']:>10,.1f}{row['min_ms']:>10,.1f}"
            f"{row['of_encoder_product']:>12.2f}{faster}",
            flush=True,
        )


def measure_memory(shape: Shape, names: Iterable[str]) -> dict[str, dict]:
    """Peak memory of each trainer, printed as it is measured."""
    print(f"\npeak memory in MB, by allocator; budget {shape.memory_budget / 1e6:,.0f}")
    print(f"{'':<26}{'default':>10}{'of budget':>12}{'mapped':>10}{'of budget':>12}")
    found = {}
    for name in names:
        m = found[name] = memory_of(name, shape)
        print(
            f"{name:<26}{m['default_bytes'] / 1e6:>10,.0f}{m['default_of_budget']:>12.2f}"
            f"{m['mapped_bytes'] / 1e6:>10,.0f}{m['mapped_of_budget']:>12.2f}",
            flush=True,
        )
    return found


@torch.no_grad()
def set_density_(crosscoder: CrosscoderTraining, x: Tensor, density: float) -> float:
    """Shift the encoder's bias for this share of codes to be active; the share reached."""
    pre = crosscoder.encode_with_hidden_pre(x)[1].flatten()
    rank = max(1, round((1 - density) * len(pre)))
    crosscoder.b_enc.sub_(pre.kthvalue(rank).values)
    return (crosscoder.encode_with_hidden_pre(x)[0] > 0).float().mean().item()


def measure_density(shape: Shape, kind: str, density: float, *, n_rounds: int) -> dict:
    """Our step and its dense twin with this share of latents active.

    The learning rate is 0: it would move the density, and costs the same.
    """
    batches = activations(shape)
    pair = {
        kernels: our_crosscoder(shape, getattr(sparsities, kind)(), kernels=kernels)
        for kernels in ("auto", "dense")
    }
    active = [set_density_(c, batches[0][:256], density) for c in pair.values()]
    steps = {kernels: our_step(c, lr=0.0) for kernels, c in pair.items()}
    medians = {
        kernels: statistics.median(ms)
        for kernels, ms in interleaved(steps, batches, n_rounds=n_rounds).items()
    }
    print(
        f"{kind:<10}{density:>9.0%}{active[0]:>9.1%}{medians['auto']:>11,.1f}"
        f"{medians['dense']:>11,.1f}{medians['dense'] / medians['auto']:>9.2f}",
        flush=True,
    )
    return {"sparsity": kind, "density": density, "active": active[0], "median_ms": medians}


def density_result(shape: Shape, *, n_rounds: int) -> dict:
    print(f"\n{shape}, float32, one thread")
    print(f"{'':<10}{'density':>9}{'active':>9}{'CPU ms':>11}{'dense ms':>11}{'times':>9}")
    kinds = [k for k in ("L1", "JumpReLU") if hasattr(sparsities, k)]
    rows = [measure_density(shape, k, d, n_rounds=n_rounds) for k in kinds for d in DENSITIES]
    return {"shape": asdict(shape), "densities": rows}


def step_result(shape: Shape, names: list[str], *, n_rounds: int, has_memory: bool) -> dict:
    rows = measure_rows(shape, names, n_rounds=n_rounds)
    print_rows(shape, rows)
    memory = measure_memory(shape, names) if has_memory else {}
    return {"shape": asdict(shape), "rows": rows, "memory": memory}


def machine() -> dict[str, object]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":")[1].strip() for line in info if line.startswith("model name"))
    return {
        "cpu": next(names, platform.machine()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "has_fast_bfloat16": fast_bfloat16(torch.device("cpu")),
        "n_threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def versions() -> dict[str, str]:
    peers = {"sae_lens": "sae-lens", "sparsify": "eai-sparsify"}
    found = (name for module, name in peers.items() if importlib.util.find_spec(module))
    return {name: importlib.metadata.version(name) for name in found}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON; by default a whole run is kept")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each row")
    parser.add_argument("--d-sae", type=int, nargs="+", choices=SIZES, help="only these sizes")
    parser.add_argument("--skip", nargs="+", default=[], help="leave out rows that begin so")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--density", action="store_true", help="L1 and JumpReLU by density")
    parser.add_argument("--quick", action="store_true", help="one tiny size, to see that it runs")
    arguments = parser.parse_args()
    arguments.names = [n for n in TRAINERS if not n.startswith(tuple(arguments.skip))]
    needs_sparsify = "sparsify, topk" in arguments.names and not arguments.density
    if needs_sparsify and importlib.util.find_spec("sparsify") is None:
        parser.exit(2, NO_SPARSIFY + "\n")
    is_part = arguments.quick or arguments.skip or arguments.d_sae or arguments.no_memory
    if not arguments.output and not is_part:
        name = "training_step_density.json" if arguments.density else "training_step.json"
        arguments.output = RESULTS / name
    return arguments


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    chosen = [s for s in SHAPES if s.d_sae in (arguments.d_sae or SIZES)]
    shapes, n_rounds = [TINY] if arguments.quick else chosen, arguments.rounds
    results = [
        density_result(s, n_rounds=n_rounds)
        if arguments.density
        else step_result(s, arguments.names, n_rounds=n_rounds, has_memory=not arguments.no_memory)
        for s in shapes
    ]
    if arguments.output:
        files.write_json(
            arguments.output,
            {
                "machine": machine(),
                "versions": versions(),
                "n_rounds": n_rounds,
                "results": results,
            },
        )


if __name__ == "__main__":
    main()
