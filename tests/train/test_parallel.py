"""Several processes train the dictionary that one would; the checks are in `mesh_worker`."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tl_crosscoder import BatchTopK, Crosscoder, Site
from tl_crosscoder.crosscoder.config import CrosscoderTrainingConfig
from tl_crosscoder.crosscoder.partition import Partition
from tl_crosscoder.mesh import Axis, mesh_of
from tl_crosscoder.train.checkpoint import checkpoints
from tl_crosscoder.train.parallel.shards import latents_of, shard_config

WORKER = Path(__file__).parent / "mesh_worker.py"
SITES = tuple(Site(name=n, d_model=4, hook_name="h", model_name=n) for n in ("base", "finetuned"))


def launched(n: int, *args: str) -> subprocess.Popen:
    """Processes of torchrun, which finds a free port."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(n), *args]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **how)


@pytest.mark.parametrize(
    "meshes",
    [["1x1"], pytest.param(["1x2", "2x1"], marks=pytest.mark.slow), ["2x2"]],
    ids=lambda meshes: " ".join(meshes),
)
def test_a_mesh_trains_the_dictionary_that_one_process_does(meshes, tmp_path):
    n = math.prod(map(int, meshes[0].split("x")))
    with launched(n, str(WORKER), str(tmp_path), *meshes) as processes:
        printed = processes.communicate(timeout=600)[0]
    assert processes.returncode == 0, printed
    assert all((tmp_path / mesh / "done").is_file() for mesh in meshes), printed


def test_the_nth_largest_is_that_of_a_sort():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator).repeat_interleave(3)
    ordered = values[values > 0].sort(descending=True).values
    for n in (1, 2, 3, 4, 700, len(ordered) - 1, len(ordered)):
        value, n_ties, count = Axis().nth_largest(values, n)
        assert value == ordered[n - 1].item()
        assert count == 3
        assert n_ties == 1 + (n - 1) % 3
    assert Axis().nth_largest(values, len(ordered) + 1) == (0.0, 0, 0)
    assert Axis().nth_largest(values, 0) == (0.0, 0, 0)
    tiny = torch.tensor([1e-45, 3e38, 1.0, float(torch.finfo().tiny)])
    assert [Axis().nth_largest(tiny, n)[0] for n in (1, 4)] == [tiny[1].item(), tiny[0].item()]


def dual(d_sae: int, shared: float) -> CrosscoderTrainingConfig:
    partitions = (Partition(name="shared", share=shared), Partition(name="delta", share=1 - shared))
    return CrosscoderTrainingConfig(
        d_in=8, d_sae=d_sae, sites=SITES, sparsity=BatchTopK(k=2), partitions=partitions
    )


def test_shards_have_their_part_of_every_range():
    whole = dual(80, 0.75)
    own = [latents_of(whole, i, 4) for i in range(4)]
    assert torch.cat(own).sort().values.tolist() == list(range(80))
    assert all((latents < 60).sum() == 15 and len(latents) == 20 for latents in own)
    assert [p.stop - p.start for _, p in shard_config(whole, 4).placed_partitions()] == [15, 5]


def test_ranges_that_do_not_divide_are_refused_with_a_size_that_does():
    with pytest.raises(ValueError, match=r"0, 922.*do not divide by 4. Choose d_sae 1,036"):
        shard_config(dual(1024, 0.9), 4)
    assert shard_config(dual(1036, 0.9), 4).d_sae == 259


def test_a_mesh_of_another_size_is_refused():
    expected = "2 x latent_parallel 2 are 4 processes, but 1 were started"
    with pytest.raises(ValueError, match=expected), mesh_of(2, 2, device="cpu"):
        pass


def test_a_process_that_dies_stops_the_others_and_the_run_continues(tmp_path):
    output = tmp_path / "run"
    train = ["-m", "tl_crosscoder", "train", "delta", "--base", "tl_crosscoder/world-base"]
    train += ["--adapter", "tl_crosscoder/taboo", "--text", "tl_crosscoder/taboo"]
    train += ["--hook-name", "blocks.1.hook_resid_post", "--max-documents", "600", "--no-changes"]
    train += ["--n-tokens", "60000", "--batch-size", "100", "--d-sae", "200", "--k", "4"]
    train += ["--checkpoint-every", "20", "--n-measured-tokens", "2000", "--output", str(output)]
    processes = launched(2, *train, "--latent-parallel", "2")
    deadline = time.monotonic() + 240
    while not checkpoints(output):
        assert processes.poll() is None, processes.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process_of_rank(1, processes.pid), signal.SIGKILL)
    printed = processes.communicate(timeout=60)[0]
    assert processes.returncode != 0
    assert "Signal 9" in printed
    with launched(2, *train, "--latent-parallel", "2", "--resume") as processes:
        printed = processes.communicate(timeout=240)[0]
    assert processes.returncode == 0, printed
    assert Crosscoder.load(output).cfg.d_sae == 200
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted({*steps})
    assert steps[-1] == 600
    assert (output / "analysis.json").is_file()


def process_of_rank(rank: int, launcher: int) -> int:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if int(parent) == launcher and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")
