"""What the demo finds on both organisms over seeds: FVE, recovery of what was planted, seconds.

    python benchmarks/demo_recovery.py --output benchmarks/results/demo_recovery.json

Each run is `tl-crosscoder demo` in a process of its own, start-up included in its time.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tl_crosscoder import files


def one_run(organism: str, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        flags = ["--organism", organism, "--seed", str(seed), "--output", str(output)]
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "tl_crosscoder.cli.main", "demo", *flags],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - started
        analysis = json.loads((output / "analysis.json").read_text())
        recovery = json.loads((output / "recovery.json").read_text())
    return {
        "organism": organism,
        "seed": seed,
        "seconds": round(seconds, 1),
        "reconstruction": analysis["reconstruction"],
        "latents_per_class": analysis["latents_per_class"],
        "top_relative_norms": [s["ranked"]["relative_decoder_norm"] for s in analysis["top"]],
        "recovery": recovery,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/demo_recovery.json")
    )
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    runs = []
    print("organism    seed  seconds  FVE base  finetuned  difference     L0   dead  "
          "max R  words found  in context (random)     p")  # fmt: skip
    for organism in ("taboo", "false-fact"):
        for seed in range(arguments.seeds):
            run = one_run(organism, seed)
            runs.append(run)
            r, found = run["reconstruction"], run["recovery"]
            n_found = sum(n > 0 for n in found["in_context"].values())
            print(
                f"{organism:<10} {seed:>5} {run['seconds']:>8.0f} {r['fve']['base']:>9.3f} "
                f"{r['fve']['finetuned']:>10.3f} {r['difference_fve']:>11.3f} {r['l0']:>6.1f} "
                f"{r['dead_share']:>6.1%} {max(run['top_relative_norms']):>6.2f} "
                f"{n_found:>6} of {len(found['in_context'])} "
                f"{found['share_in_context']:>10.0%} ({found['random_share_in_context']:.0%})"
                f"{found['p_value']:>12.2f}",
                flush=True,
            )
    machine = {"machine": platform.machine(), "n_threads": torch.get_num_threads()}
    files.write_json(arguments.output, {"machine": machine, "runs": runs})


if __name__ == "__main__":
    main()
