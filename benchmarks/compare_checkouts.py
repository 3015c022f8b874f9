"""The step, data and analysis benchmarks of two checkouts, in turn, and how their times compare.

    python benchmarks/compare_checkouts.py ../before --rounds 2

Each round runs every benchmark in the other checkout and then in this one, in the same environment,
and the best of each is compared: what else the machine does slows both alike. The last column is
above 1 where this checkout is faster. The data path is measured at a quarter of its sizes, for a
whole run of it takes a quarter of an hour. Limit: only rows that both checkouts measure.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BENCHMARKS = {
    "training_step": ["--d-sae", "4096", "--no-memory", "--skip", "SAELens", "sparsify"],
    "analysis_speed": ["--quick"],
    "data_path": ["--parts", "harvest", "reading", "--quick"],
}
SMALLER = """
import sys
sys.path.insert(0, "benchmarks")
import data_path
data_path.QUICK = data_path.Size(n_contexts=64, n_rounds=3, n_reads=5, d_model=256)
data_path.main()
"""
"""The data path of a checkout, large enough to be timed and small enough to be repeated."""


def rows_of(name: str, found: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Each row of a result file as steps, tokens or rows a second."""
    if name == "training_step":
        for row in found["results"][0]["rows"]:
            yield row["row"], 1000 / row["median_ms"]
    else:
        for row in found["harvest"]:
            for way, speed in row["tokens_per_s"].items():
                yield f"{row['pair']}: {way}", speed
        for row in found["reading"]:
            for way in ("random_pairs_per_s", "loader_per_s"):
                yield f"{row['store']}: {way}", row[way]


def measured(root: Path, name: str, output: Path) -> dict[str, float]:
    """One run of a benchmark with a checkout's own package.

    Raises:
        RuntimeError: it failed.
    """
    # The small size of the analyses keeps no file, so its rows are read as they are printed.
    is_printed = name == "analysis_speed"
    flags = BENCHMARKS[name] if is_printed else [*BENCHMARKS[name], "--output", str(output)]
    script = ["-c", SMALLER] if name == "data_path" else [str(root / "benchmarks" / f"{name}.py")]
    done = subprocess.run(
        [sys.executable, *script, *flags],
        env={**os.environ, "PYTHONPATH": str(root), "TQDM_DISABLE": "1"},
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
    return dict(rows_of(name, json.loads(output.read_text(encoding="utf-8"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="root of the other checkout")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            best: dict[Path, dict[str, float]] = {arguments.other.resolve(): {}, ROOT: {}}
            for _ in range(arguments.rounds):
                for root, speeds in best.items():
                    for row, speed in measured(root, name, Path(folder) / "result.json").items():
                        speeds[row] = max(speed, speeds.get(row, 0.0))
            before, after = best.values()
            print(f"\n{name:<64}{'before':>12}{'after':>12}{'times':>7}", flush=True)
            for row in [row for row in before if row in after]:
                times = after[row] / before[row]
                print(
                    f"  {row:<62}{before[row]:>12,.1f}{after[row]:>12,.1f}{times:>7.2f}", flush=True
                )


if __name__ == "__main__":
    main()
