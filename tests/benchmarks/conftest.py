"""The scripts of `benchmarks/`, run in the process of the tests, which has imported torch."""

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., None]]:
    """`run("SCRIPT.py", ...)`: what `python benchmarks/SCRIPT.py --quick ...` does."""
    n_threads = torch.get_num_threads()

    def run(script: str, *flags: object) -> None:
        path = str(BENCHMARKS / script)
        patch.setattr(sys, "argv", [path, "--quick", *map(str, flags)])
        runpy.run_path(path, run_name="__main__")

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.syspath_prepend(BENCHMARKS)
        yield run
    torch.set_num_threads(n_threads)
