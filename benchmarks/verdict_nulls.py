"""How often the demo's verdict is "found" for latents that were drawn at random.

    python benchmarks/verdict_nulls.py RUN [RUN ...]    # such as runs/embedded/taboo-batchtopk

Each null ranking is ten active latents, drawn without regard to the fine-tune, and goes through the
demo's whole test with each planted behaviour; the ranking by attribution goes through it once. A
pair that does not differ in a behaviour (the base against itself) is refused before any verdict.
"""

import argparse
import random
from dataclasses import asdict
from pathlib import Path

from tl_crosscoder import files
from tl_crosscoder.analysis.latents import MIN_ACTIVE_TOKENS
from tl_crosscoder.demo import N_LATENTS, verdicts_of
from tl_crosscoder.run.attribution import ranking_of
from tl_crosscoder.run.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs on embedded organisms")
    parser.add_argument("--n", type=int, default=20, help="null rankings a run")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/verdict_nulls.json")
    )
    arguments = parser.parse_args()
    rows = []
    for path in arguments.runs:
        run = Run(path=path)
        n_active = run.measurement().latents.n_active
        active = (n_active >= MIN_ACTIVE_TOKENS).nonzero().squeeze(-1).tolist()
        drawn = [random.Random(seed).sample(active, N_LATENTS) for seed in range(arguments.n)]
        own = ranking_of(run, n=N_LATENTS, order="attribution").latents
        for latents in [own, *drawn]:
            kind = "attribution" if latents is own else "random"
            for verdict in verdicts_of(run, latents):
                found = {**asdict(verdict), "is_found": verdict.is_found}
                rows.append({"run": path.name, "ranking": kind, **found})
        for kind in ("attribution", "random"):
            each = [r["is_found"] for r in rows if (r["run"], r["ranking"]) == (path.name, kind)]
            print(f"{path.name:<24} {kind:<12} found {sum(each)} of {len(each)}", flush=True)
        files.write_json(arguments.output, rows)


if __name__ == "__main__":
    main()
