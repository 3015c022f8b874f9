"""The step, data and analysis benchmarks of two checkouts, in turn, and how their times compare.

    python benchmarks/compare_checkouts.py ../before --rounds 2

A round of the step and of the analyses runs the whole benchmark in the other checkout and then in
this one, and the best of each is compared. A machine drifts more from run to run than the two
differ, and the data path is closer than that: there a process of each checkout stays, and every row
is timed in one and then in the other; medians of `--turns`, of the ratio too. The last column is
above 1 where this checkout is faster. Limit: only rows that both checkouts measure.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
BENCHMARKS = {
    "training_step": ["--d-sae", "4096", "--no-memory", "--skip", "SAELens", "sparsify"],
    "analysis_speed": ["--quick"],
}
DATA = ("embedded, bridge", "512 wide, bridge", "512 wide, HookedTransformer", "reading")
WORKER = """
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, "benchmarks")
import data_path as d

size, what = d.Size(n_contexts=32, n_reads=10), sys.argv[1]
with tempfile.TemporaryDirectory() as name:
    folder, rows = Path(name), {}
    if what == "reading":
        pair = d.bridge_pair(folder, 256)
        text = d.text_of(pair, 4 * size.n_contexts)
        parts = text[16:], text[:16]
        d.torch.set_num_threads(1)
        for store in d.STORES:
            cache = d.write_cache(pair, *parts, folder / store, store=store, show_progress=False)
            rows[f"{store}: random rows"] = lambda cache=cache: d.random_reads(cache, size)
            rows[f"{store}: loader"] = lambda cache=cache: d.cached_loader(cache, size, prefetch=0)
    else:
        made = {
            "embedded, bridge": d.embedded_pair,
            "512 wide, bridge": lambda: d.bridge_pair(folder, 512),
            "512 wide, HookedTransformer": lambda: d.hooked_pair(512),
        }
        pair = made[what]()
        text = d.text_of(pair, 4 * size.n_contexts if "embedded" in what else size.n_contexts)

        def speed(way):
            started = time.perf_counter()
            return way(pair, text) / (time.perf_counter() - started)

        rows = {name: lambda way=way: speed(way) for name, way in d.HARVESTS.items()}
    print(*rows, sep="|", flush=True)
    for line in sys.stdin:
        print(rows[line.strip()](), flush=True)
"""
"""Stays with what it has made, and times the row that it is told, in tokens or rows a second."""


def rows_of(found: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Each row of the step as steps a second."""
    for row in found["results"][0]["rows"]:
        yield row["row"], 1000 / row["median_ms"]


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root), "TQDM_DISABLE": "1"}


def measured(root: Path, name: str, output: Path) -> dict[str, float]:
    """One run of a benchmark with a checkout's own package.

    Raises:
        RuntimeError: it failed.
    """
    # The small size of the analyses keeps no file, so its rows are read as they are printed.
    is_printed = name == "analysis_speed"
    flags = BENCHMARKS[name] if is_printed else [*BENCHMARKS[name], "--output", str(output)]
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / f"{name}.py"), *flags],
        env=environment(root),
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} of {root} failed:\n{done.stderr[-2000:]}")
    if is_printed:
        rows = re.findall(r"^  (.+?) +([\d,]+) tokens/s", done.stdout, re.MULTILINE)
        return {row: float(speed.replace(",", "")) for row, speed in rows}
    return dict(rows_of(json.loads(output.read_text(encoding="utf-8"))))


def in_rounds(name: str, roots: list[Path], n: int) -> Iterator[tuple[str, float, float, float]]:
    """Rows of whole runs: both speeds, and their ratio."""
    best: list[dict[str, float]] = [{} for _ in roots]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(n):
            for root, speeds in zip(roots, best, strict=True):
                for row, speed in measured(root, name, Path(folder) / "result.json").items():
                    speeds[row] = max(speed, speeds.get(row, 0.0))
    before, after = best
    for row in [row for row in before if row in after]:
        yield row, before[row], after[row], after[row] / before[row]


def in_turns(name: str, roots: list[Path], n: int) -> Iterator[tuple[str, float, float, float]]:
    """Rows of the data path: both speeds, and their ratio."""
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", WORKER, name],
                    env=environment(root),
                    cwd=root,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for root in roots
        ]

        def timed(worker: subprocess.Popen[str], row: str) -> float:
            assert worker.stdin is not None
            assert worker.stdout is not None
            print(row, file=worker.stdin, flush=True)
            return float(worker.stdout.readline())

        rows = [w.stdout.readline().strip().split("|") for w in workers if w.stdout is not None]
        # The first turn warms up; the two take turns at being first.
        orders = [workers if turn % 2 else workers[::-1] for turn in range(n + 1)]
        for row in [row for row in rows[0] if row in rows[1]]:
            turns = [{w.pid: timed(w, row) for w in order} for order in orders][1:]
            before, after = ([turn[w.pid] for turn in turns] for w in workers)
            ratios = [a / b for a, b in zip(after, before, strict=True)]
            yield row, median(before), median(after), median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = (*BENCHMARKS, *DATA)
    parser.add_argument("other", type=Path, help="root of the other checkout")
    parser.add_argument("--rounds", type=int, default=2, help="whole runs of a benchmark")
    parser.add_argument("--turns", type=int, default=9, help="of each row of the data path")
    parser.add_argument("--only", nargs="+", choices=names, default=list(names))
    arguments = parser.parse_args()
    roots = [arguments.other.resolve(), ROOT]
    for name in arguments.only:
        print(f"\n{name:<46}{'before':>14}{'after':>14}{'times':>7}", flush=True)
        n = arguments.turns if name in DATA else arguments.rounds
        for row, *numbers in (in_turns if name in DATA else in_rounds)(name, roots, n):
            before, after, times = numbers
            print(f"  {row:<44}{before:>14,.5g}{after:>14,.5g}{times:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
