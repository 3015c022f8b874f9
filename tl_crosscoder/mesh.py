"""A mesh of processes, data x latents: who holds which tokens and which latents.

Process r of a mesh of D x L holds the tokens of r // L and the latents of r % L. Processes with the
same latents (`mesh.data`) add up gradients; those with the same tokens (`mesh.latents`) add up what
their latents decode to. `torchrun` starts them; collectives are torch's, gloo on CPUs and NCCL on
GPUs. Limit: orders of values are those of float32.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""Longest wait for a process that hangs; one that ends is noticed at once."""
DIGITS = (20, 11), (10, 10), (0, 10)
"""Lowest bit and width of each digit of a positive float32, the highest digit first."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Axis:
    """Processes that exchange something, and which of them this is."""

    index: int = 0
    size: int = 1
    group: Any = None

    def reduced(
        self, values: Shaped[Tensor, "*shape"], how: Literal["sum", "max", "min"] = "sum"
    ) -> Shaped[Tensor, "*shape"]:
        """Sum, largest or smallest over the processes, in a new tensor."""
        if self.size == 1:
            return values
        out = values.detach().clone(memory_format=torch.contiguous_format)
        sent = _sendable(out)
        dist.all_reduce(sent, getattr(dist.ReduceOp, how.upper()), group=self.group)
        return sent.to(values.device)

    def sum_(self, values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Put the sum over the processes into a tensor, which is contiguous."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def mean(self, values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Mean over the processes."""
        return values if self.size == 1 else self.reduced(values) / self.size

    def gathered(self, values: Shaped[Tensor, "n *rest"]) -> Shaped[Tensor, "m *rest"]:
        """The rows of all processes, one after the other; they may be of different numbers."""
        if self.size == 1:
            return values
        counts = self._each(torch.tensor([len(values)], device=communicating_device()))
        longest = int(counts.max())
        padded = values.new_zeros(longest, *values.shape[1:])
        padded[: len(values)] = values
        each = self._each(_sendable(padded)).view(self.size, longest, *values.shape[1:])
        rows = [own[:n] for own, n in zip(each, counts.tolist(), strict=True)]
        return torch.cat(rows).to(values.device)

    def own(self, each: Sequence[T]) -> Sequence[T]:
        """Every n-th of a sequence of which each of the n processes takes others."""
        return each[self.index :: self.size]

    def _each(self, values: Tensor) -> Tensor:
        every = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(every, values.contiguous(), group=self.group)
        return torch.cat(every)

    def nth_largest(self, values: Float[Tensor, " m"], n: int) -> tuple[float, int, int]:
        """The n-th largest of the positive values of all processes, exactly.

        Digit by digit of its bits, the highest first: the values with the digits that are known are
        counted by their next one, and the counts, 2,048 at most, are added up.

        Returns:
            The value; how many of those equal to it are among the n largest; how many there are.
            Zeros where fewer than n values are positive.
        """
        bits, known, left, count = values[values > 0].view(torch.int32).long(), 0, n, 0
        for low, width in DIGITS:
            own = bits[(bits >> (low + width)) == known]
            counts = torch.bincount((own >> low) & (2**width - 1), minlength=2**width)
            counts = self.reduced(counts)
            reached = counts.flip(0).cumsum(0).flip(0)  # values with this digit or a higher one
            if n < 1 or int(reached[0]) < left:
                return 0.0, 0, 0
            digit = int((reached >= left).nonzero()[-1])
            count = int(counts[digit])
            left -= int(reached[digit]) - count
            known = (known << width) | digit
        value = torch.tensor(known, dtype=torch.int32).view(torch.float32).item()
        return value, left, count

    def largest(
        self, values: Float[Tensor, " m"], places: Int[Tensor, " m"], n: int
    ) -> Bool[Tensor, " m"]:
        """Which of the values here are among the n largest positive ones of all processes.

        Of equal ones those at the lowest places, of which no two are the same.
        """
        value, n_ties, count = self.nth_largest(values, n)
        tied = values == value
        kept = (values > value) | tied
        if n_ties < count:
            last = self.gathered(places[tied]).sort().values[n_ties - 1]
            kept &= ~tied | (places <= last)
        return kept & (values > 0)


ALONE = Axis()
"""One process that does all."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Mesh:
    """Where a process stands among all."""

    data: Axis = field(default_factory=Axis)
    """Those that hold the same latents."""
    latents: Axis = field(default_factory=Axis)
    """Those that hold the same tokens."""
    world: Axis = field(default_factory=Axis)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints, and writes what is written once."""
        return self.world.index == 0

    def gathered_values(self, value: T) -> list[T]:
        """A plain value of every process."""
        if self.world.size == 1:
            return [value]
        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.world.reduced(torch.zeros(1, device=communicating_device()))

    def from_first(self, value: T) -> T:
        """A plain value of the first process."""
        if self.world.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, device=communicating_device())
        return holder[0]

    def by_first(self, do: Callable[[], T]) -> T:
        """What the first process finds; bad input that it meets is raised by all."""
        found, error = None, None
        if self.is_first:
            try:
                found = do()
            except (ValueError, OSError) as raised:
                error = raised
        found, error = self.from_first((found, error))
        if error is not None:
            raise error
        return found  # type: ignore[return-value]


def communicating_device() -> torch.device:
    """Where small tensors are exchanged."""
    is_nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def _sendable(values: Tensor) -> Tensor:
    """The same values on a device from which they can be sent."""
    return values if values.device.type == "cuda" else values.to(communicating_device())


def n_processes() -> int:
    """How many `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """Which of them this is."""
    return int(os.environ.get("RANK", "0"))


def ran_by_workers(n: int) -> bool:
    """Run this command line in n processes on this machine and wait, unless this is one of them.

    Returns:
        Whether they did the work, and nothing is left to do.

    Raises:
        ValueError: fewer than one.
        SystemExit: one failed, with its code.
    """
    if n < 1:
        raise ValueError(f"workers is {n}; it must be 1 or more.")
    if n == 1 or n_processes() > 1:
        return False
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(n), "-m", "tl_crosscoder", *sys.argv[1:]]
    threads = str(max(1, (os.cpu_count() or 1) // n))
    code = subprocess.run(command, env={"OMP_NUM_THREADS": threads} | os.environ, check=False)
    if code.returncode:
        raise SystemExit(code.returncode)
    return True


@contextmanager
def mesh_of(n_data: int | None, n_latents: int, *, device: str) -> Iterator[Mesh | None]:
    """The mesh of the processes that `torchrun` started; None where one process does all.

    Args:
        n_data: parts of the tokens; None is as many as there are processes for.
        n_latents: parts of the latents.
        device: `cpu`, or `cuda`, of which each process takes the GPU of its rank.

    Raises:
        ValueError: a mesh of another number of processes than were started.
    """
    world = n_processes()
    n_data = n_data or max(1, world // n_latents)
    if n_data * n_latents != world:
        n = n_data * n_latents
        raise ValueError(
            f"data_parallel {n_data} x latent_parallel {n_latents} are {n} processes, but {world} "
            f"were started: torchrun --nproc-per-node {n} -m tl_crosscoder ..."
        )
    if world == 1:
        yield None
        return
    is_own = not dist.is_initialized()
    if is_own:
        on_gpu = device.startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield new_mesh(n_data, n_latents)
    finally:
        if is_own:
            dist.destroy_process_group()


def new_mesh(n_data: int, n_latents: int) -> Mesh:
    """A mesh over the processes of torch's default group, which every one of them has to make."""
    kind = communicating_device().type
    mesh = dist.init_device_mesh(kind, (n_data, n_latents), mesh_dim_names=("data", "latents"))
    axes = {
        name: Axis(index=mesh.get_local_rank(name), size=n, group=mesh.get_group(name))
        for name, n in (("data", n_data), ("latents", n_latents))
    }
    world = Axis(index=dist.get_rank(), size=dist.get_world_size(), group=dist.group.WORLD)
    return Mesh(**axes, world=world)
