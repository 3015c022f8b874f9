"""Sizes and load times of the embedded dictionaries and of what SAELens loads without this package.

    python benchmarks/exports.py

Exports each of the four in the three forms, then loads every folder in one process in which
`tl_crosscoder` cannot be imported, and our own layout in this one. Milliseconds are medians and
maxima over several loads. Limit: a warm disk cache; importing SAELens, many seconds, is left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from tl_crosscoder import Crosscoder, export_concat, export_site, export_transcoder, files
from tl_crosscoder.hub.registry import entries
from tl_crosscoder.models.pretrained import embedded_run
from tl_crosscoder.run.run import Run

KINDS = ("concat", "transcoder", "site")
N_LOADS = 7
LOAD = """
import json, sys, time
sys.modules["tl_crosscoder"] = None  # as if it were not installed
from sae_lens import SAE

n, *folders = sys.argv[1:]
for folder in folders:
    times = []
    for _ in range(int(n)):
        started = time.perf_counter()
        sae = SAE.load_from_disk(folder)
        times.append(1e3 * (time.perf_counter() - started))
    print(json.dumps([folder, type(sae).__name__, times]))
"""


def export_all(root: Path) -> dict[Path, dict[str, Any]]:
    """What was written, by folder: dictionary, kind, and for `site` its quality."""
    found = {}
    for entry in (e for e in entries() if e.is_embedded):
        name = f"tl_crosscoder/{entry.path}"
        crosscoder = Crosscoder.load(name)
        run = Run(path=Path(name))
        _, text = run.measured()
        half = len(text) // 2
        for kind in KINDS:
            folder, row = root / f"{entry.path}-{kind}", {"dictionary": entry.path, "kind": kind}
            if kind == "concat":
                export_concat(folder, crosscoder)
            elif kind == "transcoder":
                export_transcoder(folder, crosscoder)
            else:
                how = {"fit_on": text[:half], "measure_on": run.some(text[half:], 65_536)}
                quality = export_site(folder, crosscoder, source=run.models, **how)
                row |= {n: round(getattr(quality, n), 4) for n in
                        ("fvu", "fvu_of_crosscoder", "precision", "recall", "jaccard")}  # fmt: skip
            found[folder] = row | {"n_bytes": sum(p.stat().st_size for p in folder.iterdir())}
    return found


def load_times(folders: list[Path]) -> dict[Path, tuple[str, list[float]]]:
    """Class and milliseconds of each load, in a process without this package."""
    command = [sys.executable, "-c", LOAD, str(N_LOADS), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {Path(folder): (cls, times) for folder, cls, times in rows}


def own_load_times(name: str) -> list[float]:
    """Milliseconds of `Crosscoder.load`."""
    times = []
    for _ in range(N_LOADS):
        started = time.perf_counter()
        Crosscoder.load(name)
        times.append(1e3 * (time.perf_counter() - started))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as root:
        rows = export_all(Path(root))
        for folder, (cls, times) in load_times([*rows]).items():
            rows[folder] |= {"class": cls, "ms": median(times), "ms_max": max(times)}
    found = [*rows.values()]
    for name in dict.fromkeys(row["dictionary"] for row in found):
        times, path = own_load_times(f"tl_crosscoder/{name}"), embedded_run(f"tl_crosscoder/{name}")
        assert path is not None
        n_bytes = sum((path / n).stat().st_size for n in ("cfg.json", "sae_weights.safetensors"))
        own = {"dictionary": name, "kind": "ours", "class": "Crosscoder", "n_bytes": n_bytes}
        found.append(own | {"ms": median(times), "ms_max": max(times)})
    for row in sorted(found, key=lambda row: (row["dictionary"], row["kind"])):
        quality = " ".join(f"{n} {row[n]:.3f}" for n in ("fvu", "jaccard") if n in row)
        print(f"{row['dictionary']:<22} {row['kind']:<11} {row['class']:<19} "
              f"{row['n_bytes'] / 1e6:5.2f} MB  {row['ms']:6.1f} ms ({row['ms_max']:.1f})  "
              f"{quality}")  # fmt: skip
    if output is not None:
        files.write_json(output, {"n_loads": N_LOADS, "rows": found})


if __name__ == "__main__":
    main()
