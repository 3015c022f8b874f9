"""The verb `benchmark`: every method on every organism, and tables of what came out.

No torch is imported before it runs.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from tl_crosscoder.config.benchmark import BenchmarkConfig


@dataclass(frozen=True, kw_only=True)
class BenchmarkRun:
    """Run the cells of the grid that are not there yet; it can be stopped and run again."""

    grid: Annotated[BenchmarkConfig, tyro.conf.OmitArgPrefixes]
    workers: int = 1
    """Processes that share the organisms out; `torchrun` starts as many on several machines."""

    def __call__(self) -> None:
        """Run and print the tables."""
        from tl_crosscoder.benchmark.grid import run_benchmark
        from tl_crosscoder.mesh import n_processes, ran_by_workers

        if not ran_by_workers(self.workers):
            run_benchmark(self.grid)
        if n_processes() == 1:
            BenchmarkTable(output=self.grid.output)()


@dataclass(frozen=True, kw_only=True)
class BenchmarkTable:
    """Print the tables of the results."""

    output: str = "benchmark"
    """Folder of the results."""

    def __call__(self) -> None:
        """Print."""
        from tl_crosscoder.benchmark.tables import benchmark_sections
        from tl_crosscoder.results.render import as_text

        print(as_text(benchmark_sections(self.output)))


@dataclass(frozen=True, kw_only=True)
class BenchmarkFigures:
    """Draw the results, as HTML files beside them."""

    output: str = "benchmark"
    """Folder of the results."""

    def __call__(self) -> None:
        """Draw and print where."""
        from tl_crosscoder import files
        from tl_crosscoder.report.figures import save_figure
        from tl_crosscoder.report.figures.benchmark import method_bars, mitigation_curves

        folder = files.user_path(self.output)
        for name, draw in (("methods", method_bars), ("curves", mitigation_curves)):
            path = folder / f"{name}.html"
            print(save_figure(draw(folder), path, shares_script=True))


@dataclass(frozen=True, kw_only=True)
class BenchmarkMethods:
    """Name the methods that are compared."""

    def __call__(self) -> None:
        """Print."""
        from tl_crosscoder.benchmark.methods import DICTIONARIES, DIRECTIONS, TEXTS

        for name, method in DICTIONARIES.items():
            options = ", ".join(f"{k} {v}" for k, v in method.preset.items() if k != "name")
            text = ", trained on neutral text" if method.text == "neutral" else ""
            print(f"{name:<24}{method.preset['name']}{f' ({options})' if options else ''}{text}")
        for name in DIRECTIONS:
            print(f"{name:<24}directions, without a dictionary")
        for name in TEXTS:
            print(f"{name:<24}tokens or texts, which cannot be ablated")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Compare methods on the organisms: run the grid, print tables, draw figures."""

    action: (
        Annotated[BenchmarkRun, tyro.conf.subcommand("run")]
        | Annotated[BenchmarkTable, tyro.conf.subcommand("table")]
        | Annotated[BenchmarkFigures, tyro.conf.subcommand("figures")]
        | Annotated[BenchmarkMethods, tyro.conf.subcommand("methods")]
    )

    def __call__(self) -> None:
        """Do what was chosen."""
        self.action()
