"""One dictionary by one, two and four processes: is it the same, and what does sharing cost?

    python benchmarks/parallel.py --output benchmarks/results/parallel.json     # five minutes

A row is a mesh, data x latents: milliseconds of a step are the median over the timed steps of the
slowest process; CPU seconds are summed over processes; memory is what the
largest process holds of weights, gradients and moments, and the growth of its resident set; the
difference is the largest between a weight and that of one process. Rows of activations are drawn at
random, as a cache holds them, so that no models run. Limit: on one machine exchanges go through its
memory.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from analysis_speed import CONTEXT, plain_text
from jaxtyping import Float, Int
from result_file import ResultFile
from torch import Tensor
from transformers import AutoTokenizer

from tl_crosscoder import Crosscoder, Site, TokenizedText, TrainConfig, Trainer, files
from tl_crosscoder.config.presets import preset
from tl_crosscoder.mesh import Mesh, mesh_of
from tl_crosscoder.models.pretrained import resolve_model
from tl_crosscoder.models.source import ActivationSource, Contexts
from tl_crosscoder.progress import silenced
from tl_crosscoder.train.parallel.trainer import ParallelTrainer

N_CORES = os.cpu_count() or 1
ALONE = ((1, 1), 1)
"""One process of one thread: threads add numbers in another order, as processes do."""
MESHES = ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4))
N_WARM_UP = 3


class DrawnRows(ActivationSource):
    """Sums of planted directions, as a cache of them would be read."""

    weight_processing = "raw"
    compared = (0, 1)
    cache_id = "drawn"  # type: ignore[assignment]
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("tl_crosscoder/world-base"))
    n_ctx = CONTEXT  # type: ignore[assignment]

    def __init__(self, n_rows: int, d_model: int, *, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(4 * d_model, 2 * d_model, generator=generator)
        codes = torch.rand(n_rows, len(directions), generator=generator)
        codes = codes * (codes > 0.98)
        self._rows = (codes @ directions).view(n_rows, 2, d_model).to(device)
        self.model_sites = tuple(
            Site(name=n, d_model=d_model, hook_name="drawn", model_name="drawn")
            for n in ("base", "finetuned")
        )

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._rows.device

    def places(self, contexts: Contexts) -> Int[Tensor, " tokens"]:
        """One row a token."""
        starts = contexts.context_ids[:, None] * CONTEXT
        return (starts + torch.arange(contexts.tokens.shape[1]))[contexts.mask]

    def read(
        self, index: Int[Tensor, " n"], *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "n *row"]:
        """Rows by number."""
        return self._rows[index.to(self.device)].to(dtype)

    def rows(
        self, contexts: Contexts, *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "tokens *row"]:
        """Rows of contexts."""
        return self.read(self.places(contexts), dtype=dtype)

    def site_rows(
        self, contexts: Contexts, sites: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> list[Float[Tensor, "tokens d_model"]]:
        """Rows of some sites."""
        rows = self.rows(contexts, dtype=dtype)
        return [rows[:, i] for i in sites]


def texts(n_rows: int) -> tuple[TokenizedText, TokenizedText]:
    """Contexts for the rows, an eighth of them held out."""
    text = plain_text(n_rows)
    n = len(text) * 7 // 8
    return text[:n], text[n:]


def measured(arguments: argparse.Namespace, mesh: Mesh | None) -> dict[str, Any]:
    """Train to the end in this process of a mesh, or alone; times of the steps."""
    config = TrainConfig(
        d_sae=arguments.d_sae,
        n_tokens=arguments.batch_size * arguments.n_steps,
        batch_size=arguments.batch_size,
        n_calibration_tokens=4096,
        log_every=10**6,
        checkpoint_every=10**6,
    )
    source = DrawnRows(16 * CONTEXT * 8, arguments.d_model, device=arguments.device)
    how: dict[str, Any] = {"config": config, "recipe": preset(arguments.preset, k=arguments.k)}
    how["output"] = arguments.folder / "run"
    both = texts(len(source._rows))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kind = Trainer if mesh is None else partial(ParallelTrainer, mesh=mesh)
    trainer = kind(source, *both, **how)
    walls, cpus = [], []
    trainer.begin(trainer.first_rows())
    with closing(trainer.loader.batches()) as batches:
        for step in range(trainer.plan.n_steps):
            batch, position = next(batches)
            if batch.is_cuda:
                torch.cuda.synchronize()
            started = time.perf_counter(), time.process_time()
            is_last = step + 1 == trainer.plan.n_steps
            trainer.step(batch)
            if batch.is_cuda:
                torch.cuda.synchronize()
            walls.append(time.perf_counter() - started[0])
            cpus.append(time.process_time() - started[1])
            trainer.begin().position = position
            if is_last:
                trainer.save()
    held = 16 * sum(p.numel() for p in trainer.crosscoder.parameters())
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    trainer.finish(trainer.calibration_rows())
    return {
        "step_ms": 1e3 * median(walls[N_WARM_UP:]),
        "cpu_ms": 1e3 * median(cpus[N_WARM_UP:]),
        "held_mb": held / 1e6,
        "grown_mb": grown / 1e6,
    }


def as_process(arguments: argparse.Namespace) -> None:
    """What this process of a mesh measures, into a file of its own."""
    with silenced(), mesh_of(*arguments.mesh, device=arguments.device) as mesh:
        found = measured(arguments, mesh)
    files.write_json(arguments.folder / f"process-{os.environ.get('RANK', '0')}.json", found)


def launched(
    arguments: argparse.Namespace, mesh: tuple[int, int], n_threads: int, folder: Path
) -> dict[str, Any]:
    """A row: the processes of a mesh, and what they measured."""
    n = mesh[0] * mesh[1]
    own = ["--mesh", *map(str, mesh), "--folder", str(folder)]
    for name in ("d_sae", "d_model", "batch_size", "n_steps", "k", "preset", "device"):
        own += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    command = [sys.executable, *(torchrun if n > 1 else []), __file__, *own]
    threads = {"OMP_NUM_THREADS": str(n_threads)}
    subprocess.run(command, env=os.environ | threads, check=True)
    each = [json.loads((folder / f"process-{rank}.json").read_text()) for rank in range(n)]
    row = {name: max(e[name] for e in each) for name in ("step_ms", "held_mb", "grown_mb")}
    return row | {"cpu_ms": sum(e["cpu_ms"] for e in each)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--d-model", type=int, default=256, help="of each of the two sites")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--n-steps", type=int, default=20)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--preset", default="batchtopk")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mesh", type=int, nargs=2, help="of this process: rows set it")
    parser.add_argument("--folder", type=Path, help="of the run of a mesh")
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    parser.add_argument("--quick", action="store_true", help="two meshes, tiny")
    arguments = parser.parse_args()
    if arguments.quick:
        tiny = {"d_sae": 256, "d_model": 16, "batch_size": 128, "n_steps": 6, "k": 4}
        vars(arguments).update(tiny)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.mesh:
            as_process(arguments)
            return
        names = ("d_sae", "d_model", "batch_size", "n_steps", "k", "preset")
        settings = {name: getattr(arguments, name) for name in names}
        file = ResultFile(arguments.output, settings, resume=True)
        cells = [(mesh, max(1, N_CORES // (mesh[0] * mesh[1]))) for mesh in MESHES]
        cells = [ALONE, cells[2]] if arguments.quick else [ALONE, *cells]
        keys = {cell: {"mesh": list(cell[0]), "n_threads": cell[1]} for cell in cells}
        left = [cell for cell in keys if file.find(keys[cell]) is None]
        # What one process of one thread gives is what the others are compared with.
        for cell in [ALONE] * bool(left) + [cell for cell in left if cell != ALONE]:
            own = Path(folder) / "-".join(map(str, (*cell[0], cell[1])))
            row = launched(arguments, *cell, own)
            one, other = (
                Crosscoder.load(Path(folder) / name / "run").state_dict()
                for name in ("1-1-1", own.name)
            )
            row["difference"] = max((one[n] - other[n]).abs().max().item() for n in one)
            if cell in left:
                file.add(keys[cell] | row)
            print(f"{keys[cell]}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()))


if __name__ == "__main__":
    main()
