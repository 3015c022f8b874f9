r"""How time and memory grow with the latents and the tokens of a dictionary, on a real pair.

    python benchmarks/scale.py --base SMOLLM2-135M --adapter LORA --text leaf_guessing_game.jsonl \
        --hook-name blocks.20.hook_resid_post --output benchmarks/results/scale.json

Activations are harvested once, with their own row. Every other row is a process of its own that
trains on the cache, measures the held-out part of it, and writes the report; its memory is the
largest resident set so far after each of these. Tokens a second are those of the last step's row of
the metrics: from the first step on, checkpoints left out. No latent counts as dead in so short a
run, so that AuxK, whose cost is that of the dead latents, has no part in it. Slopes of logarithms
are printed: 1 is as much growth as of what is varied; `--figure` draws them. Limit: one machine;
rows of the cache come from its page cache.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from result_file import ResultFile

from tl_crosscoder import files
from tl_crosscoder.config.inputs import CONTEXT_SIZE
from tl_crosscoder.config.presets import preset
from tl_crosscoder.config.training import HarvestConfig, RunConfig
from tl_crosscoder.data.cache import ActivationCache
from tl_crosscoder.data.cache_writer import run_harvest
from tl_crosscoder.report.figures import save_figure
from tl_crosscoder.report.html import ReportSettings, report
from tl_crosscoder.run.run import Run
from tl_crosscoder.run.training import train

D_SAES = (4_096, 8_192, 16_384, 32_768, 65_536)
N_TOKENS, N_MEASURED = 40_960, 16_384
MORE_TOKENS = (20_480, 81_920)
"""Beside `N_TOKENS`, at `D_SAES[2]` latents."""
VARIED = {"d_sae": "latents", "n_tokens": "tokens"}
FIGURES = ("step_ms", "train_mb", "measure_s", "report_s")
OPTIONS = ("base", "adapter", "hook_name", "text")


def resident_mb() -> float:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def harvested(a: argparse.Namespace) -> dict[str, Any]:
    """Both models over the text, once."""
    started = time.perf_counter()
    config = HarvestConfig(
        **{name: getattr(a, name) for name in OPTIONS},
        output=str(a.work / "cache"),
        n_tokens=a.n_cached,
        store="bfloat16",
        context_size=min(CONTEXT_SIZE, a.context_size),
        held_out=a.held_out,
    )
    cache = run_harvest(config, resume=(a.work / "cache").exists())
    return {
        "harvest_s": time.perf_counter() - started,
        "n_rows": cache.n_rows,
        "n_bytes": cache.n_bytes,
        "resident_mb": resident_mb(),
    }


def trained(a: argparse.Namespace) -> dict[str, Any]:
    """One dictionary: trained, measured, shown."""
    folder = a.work / f"{a.d_sae}-{a.n_tokens}"
    cache = ActivationCache(a.work / "cache", verify=False)
    before = resident_mb()
    config = RunConfig(
        cache=str(cache.folder),
        output=str(folder),
        d_sae=a.d_sae,
        preset=preset("batchtopk", k=a.k),
        n_tokens=a.n_tokens,
        batch_size=a.batch_size,
        n_measured_tokens=a.n_measured,
        n_calibration_tokens=a.batch_size,
        dead_after_tokens=10**7,
        checkpoint_every=10**6,
        log_every=1,
    )
    run = train(config)
    rows = [json.loads(line) for line in (folder / files.METRICS_NAME).read_text().splitlines()]
    found: dict[str, Any] = {
        "step_ms": 1e3 * a.batch_size / rows[-1]["tokens_per_s"],
        "tokens_s": rows[-1]["tokens_per_s"],
        "before_mb": before,
        "train_mb": resident_mb(),
    }
    started = time.perf_counter()
    measured = run.measure()
    found |= {
        "measure_s": time.perf_counter() - started,
        "measured_tokens": measured.reconstruction.n_tokens,
        "measure_mb": resident_mb(),
        "fve": measured.reconstruction.fve,
        "dead": measured.reconstruction.dead_share,
    }
    started = time.perf_counter()
    page = report(Run(path=run.path), settings=ReportSettings(n_latents=200, samples=None))
    found |= {
        "report_s": time.perf_counter() - started,
        "report_mb": page.stat().st_size / 1e6,
        "resident_mb": resident_mb(),
    }
    return found


def as_process(a: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any]:
    """A row, by a process of its own."""
    own = [part for name, value in key.items() for part in (f"--{name.replace('_', '-')}", value)]
    command = [sys.executable, __file__, *sys.argv[1:], "--row", a.work / "row.json", *own]
    command += ["--work", a.work]
    subprocess.run([str(part) for part in command], check=True)
    return json.loads((a.work / "row.json").read_text())


def slope(rows: list[dict[str, Any]], x: str, y: str) -> float:
    """Growth of y over that of x between the smallest and the largest row, by logarithms."""
    first, last = (extreme(rows, key=lambda r: r[x]) for extreme in (min, max))
    return math.log(last[y] / first[y]) / math.log(last[x] / first[x])


def series(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by what is varied in them."""
    every = [r for r in rows if "d_sae" in r]
    n_tokens = Counter(r["n_tokens"] for r in every).most_common(1)[0][0]
    middle = {r["d_sae"] for r in every if r["n_tokens"] != n_tokens}
    found = {"d_sae": [r for r in every if r["n_tokens"] == n_tokens]}
    found["n_tokens"] = [r for r in every if r["d_sae"] in middle]
    return {name: sorted(own, key=lambda r: r[name]) for name, own in found.items() if len(own) > 1}


def with_train_s(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the seconds of the whole training."""
    return row | {"train_s": row["n_tokens"] / row["tokens_s"]}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The log-log figure."""
    import plotly.graph_objects as go

    names = {
        "step_ms": "a training step, ms", "train_mb": "memory in training, MB",
        "measure_s": "measuring, s", "report_s": "the report, s",
    }  # fmt: skip
    figure = go.Figure()
    own = series(rows)["d_sae"]
    for name, title in names.items():
        title = f"{title} (slope {slope(own, 'd_sae', name):.2f})"
        how = {"mode": "lines+markers", "name": title}
        figure.add_scatter(x=[r["d_sae"] for r in own], y=[r[name] for r in own], **how)
    sizes = [r["d_sae"] for r in own]
    ticks = {"tickvals": sizes, "ticktext": [f"{n:,}" for n in sizes]}
    figure.update_xaxes(type="log", title="latents", **ticks)
    figure.update_yaxes(type="log", dtick=1)
    legend = {"x": 1, "xanchor": "right", "y": 0.5}
    figure.update_layout(template="simple_white", legend=legend, margin={"t": 20})
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="tl_crosscoder/world-base")
    parser.add_argument("--adapter", default="tl_crosscoder/taboo")
    parser.add_argument("--text", default="tl_crosscoder/taboo")
    parser.add_argument("--hook-name", default="blocks.2.hook_resid_post")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--context-size", type=int, default=128)
    parser.add_argument("--held-out", type=float, default=0.2)
    parser.add_argument("--work", type=Path, help="folder of the cache and of the runs; kept")
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    parser.add_argument("--figure", type=Path, help="HTML file of the figure")
    parser.add_argument("--quick", action="store_true", help="tiny")
    parser.add_argument("--row", type=Path, help="of this process: rows set it")
    parser.add_argument("--d-sae", type=int)
    parser.add_argument("--n-tokens", type=int)
    a = parser.parse_args()
    d_saes, n_tokens, more = D_SAES, N_TOKENS, MORE_TOKENS
    a.n_cached, a.n_measured = max(more), N_MEASURED
    if a.quick:
        d_saes, n_tokens, more, a.batch_size, a.k = (128, 256), 1024, (2048,), 128, 4
        a.n_cached, a.n_measured = 4096, 1024
    settings = {n: Path(str(getattr(a, n))).name for n in OPTIONS}
    settings |= {n: getattr(a, n) for n in ("batch_size", "k", "n_cached", "n_measured")}
    settings["n_cores"] = os.cpu_count()
    if a.row:
        files.write_json(a.row, harvested(a) if a.d_sae is None else trained(a))
        return
    with tempfile.TemporaryDirectory() as folder:
        a.work = a.work or Path(folder)
        a.work.mkdir(parents=True, exist_ok=True)
        file = ResultFile(a.output, settings, resume=True)
        if not (a.work / "cache" / "manifest.json").is_file():
            file.content["harvest"] = as_process(a, {})
            file.save()
        at = d_saes[min(2, len(d_saes) - 1)]
        cells = [(d, n_tokens) for d in d_saes] + [(at, n) for n in more]
        for d_sae, n in cells:
            key = {"d_sae": d_sae, "n_tokens": n}
            if file.find(key) is None:
                row = key | as_process(a, key)
                file.add(row)
                print(", ".join(f"{k} {v:.4g}" for k, v in row.items() if not isinstance(v, dict)))
    for varied, own in series(file.rows).items():
        figures = ("train_s", *FIGURES[1:]) if varied == "n_tokens" else FIGURES
        slopes = [f"{f} {slope([*map(with_train_s, own)], varied, f):.2f}" for f in figures]
        print(f"growth with {VARIED[varied]}: {', '.join(slopes)}")
    if a.figure:
        draw(file.rows, a.figure)


if __name__ == "__main__":
    main()
