"""The Triton kernels: right in the interpreter, taken by the compiler, absent with grace."""

import os
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest
import torch

from tl_crosscoder.crosscoder.sparse import triton as kernels_triton
from tl_crosscoder.crosscoder.sparse.triton import compact, sampled_dots, weighted_bag

PARITY = Path(__file__).with_name("triton_parity.py")
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from tl_crosscoder.crosscoder.sparse.triton import compact
try:
    compact(torch.zeros(1, 1), torch.tensor(0.0), 1)
except ImportError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def triton():
    return pytest.importorskip("triton", reason="triton is not installed; it is made for Linux")


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def test_they_agree_with_float64_references(triton, device):
    """In a new process: triton settles at its first import whether kernels are interpreted."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", PARITY],
        env=os.environ | {"TRITON_INTERPRET": str(int(device == "cpu"))},
        cwd=PARITY.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class CompiledForHopper:
    """Stands for the module of the programs: each launch is compiled for an H100; none runs."""

    def __init__(self, programs):
        self.programs, self.compiled = programs, []

    def __getattr__(self, name):
        launch = partial(self.compile, getattr(self.programs, name))
        return defaultdict(lambda: launch)  # Indexed by the grid.

    def compile(self, program, *args, **meta):
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.runtime.jit import mangle_type

        options = {name: meta.pop(name) for name in kernels_triton.OPTIONS}
        given = dict(zip(program.arg_names, args, strict=False)) | meta
        assert set(given) == set(program.arg_names)
        # As at a launch, an integer that is 1 becomes a constant.
        constants = {k: v for k, v in given.items() if k in meta or (type(v) is int and v == 1)}
        types = {k: "constexpr" if k in constants else mangle_type(v) for k, v in given.items()}
        source = ASTSource(program, types, constants)
        assert compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
        self.compiled.append(program.__name__)


@pytest.mark.parametrize(
    ("dtype", "m", "d"),
    [
        (torch.bfloat16, 3, 5000),
        (torch.float64, 3, 300),
        *(
            pytest.param(*launch, marks=pytest.mark.slow)
            for launch in (
                (torch.float16, 100, 300),
                (torch.float32, 3, 300),
                (torch.bfloat16, 1, 1),
            )
        ),
    ],
    ids=str,
)
def test_the_compiler_takes_every_launch_for_hopper(triton, dtype, m, d, monkeypatch, tmp_path):
    """The interpreter runs what the compiler may refuse. This needs no GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    from tl_crosscoder.crosscoder.sparse import triton_device as kernels_triton_device

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    programs = CompiledForHopper(kernels_triton_device)
    monkeypatch.setattr(kernels_triton, "_programs", lambda *_: programs)
    table, a = torch.zeros(9, d, dtype=dtype), torch.zeros(m, d, dtype=dtype)
    index, weights = torch.zeros(400, dtype=torch.int32), torch.zeros(400)
    offsets = torch.full((m + 1,), 400, dtype=torch.int32)
    weighted_bag(table, index, offsets, weights, out_dtype=torch.float32)
    sampled_dots(a, table, offsets, index)
    compact(a, torch.tensor(0.0), 7)
    assert programs.compiled == ["bag_pieces", "bag_rows", "dots", "mark", "write_columns"]


def test_without_cuda_nor_interpreter_a_call_says_where_to_turn(triton):
    with pytest.raises(
        ValueError, match=r"on cpu; triton kernels need CUDA.*crosscoder.sparse.codes"
    ):
        compact(torch.zeros(1, 1), torch.tensor(0.0), 1)


def test_without_triton_the_module_imports_and_a_call_says_what_to_install():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False
    )
    assert "pip install triton" in done.stdout, done.stderr
