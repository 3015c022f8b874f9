"""The tables of measured, organisms, benchmark, scale and dictionaries in docs/, from results.

    python docs/measured_tables.py

rewrites what stands between `<!-- table: NAME -->` and `<!-- end -->` on the pages, from
benchmarks/results and the cards of the embedded models, so no number of a table is typed by hand.
The site writes them again when it is built.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PRESETS = {
    "batchtopk": ("batchtopk",), "topk": ("topk",), "l1": ("l1-twice-l0",),
    "jumprelu": ("jumprelu",), "matryoshka": ("matryoshka",), "dual-k": ("dual-k",),
    "delta": ("delta", "delta-weight-1", "delta-competing"), "dsf": ("dsf",), "dfc": ("dfc",),
    "diff-sae": ("diff-sae",), "structured": ("structured", "structured-competing"),
}  # fmt: skip
"""Variants of presets that were measured, by the page of docs/dictionaries that they are on."""
PAGES = tuple(
    ROOT / "docs" / f"{name}.md"
    for name in (
        *("measured", "organisms", "benchmark", "scale"),
        *(f"dictionaries/{name}" for name in PRESETS),
    )
)
ORGANISMS = ("taboo", "false-fact")
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def results(name: str) -> Any:
    """Content of a result file of the benchmarks."""
    return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text(encoding="utf-8"))


def short(value: float) -> str:
    """Two decimals without the leading zero.

    >>> short(0.834), short(-0.05), short(-0.001), short(1.0)
    ('.83', '-.05', '.00', '1.00')
    """
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.2f}").replace("-.00", ".00")


def slashed(values: Iterable[str]) -> str:
    """One cell of the values of several organisms."""
    return " / ".join(values)


def per_cent(values: Iterable[float | None]) -> str:
    """Values of several seeds in one cell, without the sign."""
    return ", ".join("-" if value is None else f"{100 * value:.0f}" for value in values)


def presets(page: str | None = None) -> list[Sequence[str]]:
    """Presets at one L0, taboo / false-fact in each cell; all, or on a page beside BatchTopK."""
    names = [name for own in PRESETS.values() for name in own]
    if page is not None:
        names = [*dict.fromkeys(("batchtopk", *PRESETS[page]))]
    found = {(r["variant"], r["organism"]): r for r in results("presets_on_organisms")["rows"]}
    rows: list[Sequence[str]] = [
        ("preset", "FVE base, fine-tuned", "FVE of the difference", "by delta latents alone",
         "finetuned-only latents", "planted words in the top ten (random)")
    ]  # fmt: skip
    for name in names:
        each = [found[name, organism] for organism in ORGANISMS]
        is_one_site = name == "diff-sae"
        parts = [r["difference_fve_by_part"] for r in each]
        rows.append(
            (
                name,
                "-"
                if is_one_site
                else slashed(
                    ", ".join(map(short, r["reconstruction"]["fve"].values())) for r in each
                ),
                slashed(short(r["difference_fve"]) for r in each),
                slashed(short(part["delta"]) for part in parts)
                if all(part and "delta" in part for part in parts)
                else "-",
                "-"
                if is_one_site
                else slashed(str(r["latents_per_class"]["finetuned-only"]) for r in each),
                slashed(
                    f"{r['share_in_context']:.0%} ({r['random_share_in_context']:.0%})"
                    for r in (r["recovery"] for r in each)
                ),
            )
        )
    return rows


def _batchtopk(organism: str) -> list[dict[str, Any]]:
    """Causal results of the BatchTopK dictionaries, one for each seed."""
    rows = results("causal_tests")["rows"]
    return [r for r in rows if (r["organism"], r["preset"]) == (organism, "batchtopk")]


def causal() -> list[Sequence[str]]:
    """Shares of the change of a behaviour, a number for each seed."""
    selections = {
        "first 3": "top 3 by score", "first 10": "top 10 by score", "first 30": "top 30 by score",
        "3 of largest R": "top 3 by R", "30 of largest R": "top 30 by R",
    }  # fmt: skip
    rows: list[Sequence[str]] = [
        ("", "latents", "ablated in the fine-tuned model: necessity", "random directions",
         "inserted into the base: sufficiency", "random directions")
    ]  # fmt: skip
    for organism in ORGANISMS:
        runs = _batchtopk(organism)
        behaviour = runs[0]["behaviour"]
        change = f"{organism} ({short(behaviour['base'])} to {short(behaviour['finetuned'])})"
        for label, key in selections.items():
            cells = []
            for test in ("necessity", "insert"):
                trials = [
                    trial
                    for run in runs
                    for trial in run["causal"]
                    if (trial["test"], trial["latents"]) == (test, key)
                ]
                for field in ("share", "random_mean"):
                    cells.append(", ".join(short(trial[field]) for trial in trials))
            rows.append((change, label, *cells))
            change = ""
    return rows


def patching() -> list[Sequence[str]]:
    """KL recovery in percent on the assistant's tokens, a number for each seed."""
    variants = (
        "all latents", "top 3 by score", "top 10 by score", "top 30 by score", "top 30 by R",
    )  # fmt: skip
    labels = ("all latents", "first 3", "first 10", "first 30", "30 of largest R")
    rows: list[Sequence[str]] = [("latents", *ORGANISMS)]
    for label, variant in zip(labels, variants, strict=True):
        cells = [
            ", ".join(
                f"{100 * p['recovery']:.0f}"
                for run in _batchtopk(organism)
                for p in run["patching"]
                if (p["variant"], p["tokens"]) == (variant, "response")
            )
            for organism in ORGANISMS
        ]
        rows.append((label, *cells))
    return rows


def demo() -> list[Sequence[str]]:
    """What `tl-crosscoder demo` finds, a row for each organism and seed."""
    rows: list[Sequence[str]] = [
        ("organism", "seed", "seconds", "FVE base", "fine-tuned", "difference", "L0", "dead",
         "largest R", "behaviours found", "% of each undone", "words found",
         "contexts with one (random)")
    ]  # fmt: skip
    for run in results("demo_recovery")["runs"]:
        r, found = run["reconstruction"], run["recovery"]
        words = found["in_context"].values()
        verdicts = found["behaviours"]
        rows.append(
            (
                run["organism"],
                str(run["seed"]),
                f"{run['seconds']:.0f}",
                *(f"{v:.3f}" for v in (*r["fve"].values(), r["difference_fve"])),
                f"{r['l0']:.1f}",
                f"{r['dead_share']:.1%}",
                f"{max(run['top_relative_norms']):.2f}",
                f"{sum(not v['reason'] for v in verdicts)} of {len(verdicts)}",
                per_cent(v["share"] for v in verdicts),
                f"{sum(n > 0 for n in words)} of {len(words)}",
                f"{found['share_in_context']:.0%} ({found['random_share_in_context']:.0%})",
            )
        )
    return rows


def verdict_nulls() -> list[Sequence[str]]:
    """How often the demo's verdict is "found" for dictionaries of null pairs."""
    rows: list[Sequence[str]] = [
        ("dictionaries of null pairs, tested on", "null pairs", "behaviours that differ at all",
         "found but for the size of the change", "found, of all behaviours", "runs with one found",
         "runs with a change")
    ]  # fmt: skip
    tested = {"null": "the null pair itself", "real": "the organism's pair, never seen"}
    names = {"all": "all", "self": "fine-tuned on its own samples", "neutral": "on neutral text"}
    for entry in results("verdict_nulls")["rates"]:
        found = [
            f"{r['n_found']} of {r['n']}: {r['rate']:.1%} [{r['low']:.1%}, {r['high']:.1%}]"
            for r in (entry["verdicts"], entry["runs"], entry.get("changed"))
            if r
        ]
        found += [""] * (3 - len(found))
        differ = f"{entry['n_tested']} of {entry['verdicts']['n']}"
        small = str(entry["n_hardly"])
        rows.append((tested[entry["on"]], names[entry["pair"]], differ, small, *found))
    return rows


def analysis() -> list[Sequence[str]]:
    """Tokens a second of each analysis, and its cost in times that of encoding."""
    found = results("analysis_speed")["rows"]
    rows: list[Sequence[str]] = [
        ("", *(f"2 x {r['d_model']} -> {r['d_sae']:,}, L0 {r['l0']:.0f}" for r in found))
    ]
    for name in found[0]["tokens_per_second"]:
        rows.append(
            (
                name,
                *(f"{r['tokens_per_second'][name]:,} ({r['of_encode'][name]:,.1f})" for r in found),
            )
        )
    return rows


def embedded_speed() -> list[Sequence[str]]:
    """Tokens a second on the embedded pair beside the bare forward passes."""
    found = results("analysis_speed")["embedded"]["tokens_per_second"]
    return [("", "tokens a second"), *((name, f"{speed:,}") for name, speed in found.items())]


def attribution() -> list[Sequence[str]]:
    """What attribution of all latents takes, beside the passes that it cannot do without."""
    rows: list[Sequence[str]] = [
        ("steps", "passes alone, s", "attribution, s", "times as long",
         "without the layers below the hook", "µs a token")
    ]  # fmt: skip
    for row in results("attribution_speed")["rows"]:
        seconds = (f"{row[name]:.2f}" for name in ("passes_alone_s", "attribution_s"))
        times = (f"{row[name]:.2f}" for name in ("ratio", "ratio_without_layers_below"))
        rows.append((str(row["n_steps"]), *seconds, *times, f"{row['us_per_token']:.0f}"))
    return rows


def harvest() -> list[Sequence[str]]:
    """Tokens a second through both models, and of the bare forward passes."""
    found = results("data_path")["harvest"]
    ways = list(found[0]["tokens_per_s"])
    rows: list[Sequence[str]] = [("pair", *ways)]
    for r in found:
        cells = (f"{r['tokens_per_s'][way]:,.0f} ({r['of_bare'][way]:.2f})" for way in ways)
        rows.append((r["pair"], *cells))
    return rows


def reading() -> list[Sequence[str]]:
    """Pairs of activations a second that a cache gives."""
    rows: list[Sequence[str]] = [
        ("stored as", "bytes a token", "rounding error: base, difference", "4,096 random pairs",
         "loader, batches of 4,096", "the same files, a row at a time")
    ]  # fmt: skip
    for r in results("data_path")["reading"]:
        error = r["storage_error"]
        speeds = (r[f"{way}_per_s"] for way in ("random_pairs", "loader", "one_row_at_a_time"))
        rows.append(
            (
                r["store"],
                f"{r['bytes_per_token']:,.0f}",
                f"{error['base']:.1e}, {error['difference']:.1e}",
                *(f"{speed:,.0f}" for speed in speeds),
            )
        )
    return rows


def step() -> list[Sequence[str]]:
    """Time and memory of one training step, ours and the peers'."""
    labels = {
        "encoder product": "the encoder product alone",
        "ours, batchtopk": "**ours, BatchTopK**",
        "ours, batchtopk, no bf16": "ours, where bfloat16 is not fast",
        "ours, batchtopk, dense": "ours, dense reference",
        "sparsify, topk": "sparsify {eai-sparsify}, TopK",
        "SAELens, batchtopk": "SAELens {sae-lens}, BatchTopK",
    }
    found = results("training_step")
    shapes = found["results"]
    heads = [
        (f"ms at {s['shape']['d_sae']:,}", "of the encoder product",
         "faster than SAELens, sparsify", "peak memory of budget")
        for s in shapes
    ]  # fmt: skip
    rows: list[Sequence[str]] = [("", *(head for group in heads for head in group))]
    for name, label in labels.items():
        cells = []
        for shape in shapes:
            (r,) = (row for row in shape["rows"] if row["row"] == name)
            memory = shape["memory"].get(name)
            cells += [
                f"{r['median_ms']:,.0f}",
                f"{r['of_encoder_product']:.2f}",
                ", ".join(f"{times:.1f}" for times in r["times_faster_than"].values()),
                f"{memory['default_of_budget']:.2f} ({memory['mapped_of_budget']:.2f})"
                if memory
                else "-",
            ]
        rows.append((label.format_map(found["versions"]), *cells))
    return rows


def report() -> list[Sequence[str]]:
    """Size of reports and how fast a browser shows them, a column a run."""
    found = results("report_size")["rows"]
    rows: list[Sequence[str]] = [
        ("", *(f"{r['n_latents']:,} latents, {r['base']}" for r in found)),
        ("made in", *(f"{r['seconds_to_make']:.0f} s" for r in found)),
    ]
    for name in found[0]["bytes"]:
        rows.append((name, *(f"{r['bytes'][name] / 1e6:.1f} MB" for r in found)))
    for name in found[0]["milliseconds"]:
        rows.append((name, *(f"{r['milliseconds'][name]:,.0f} ms" for r in found)))
    return rows


def causal_speed() -> list[Sequence[str]]:
    """Seconds of the causal commands with their defaults."""
    found = results("causal_speed")["seconds"]
    return [("command", "seconds"), *((f"`{name}`", f"{s:.0f}") for name, s in found.items())]


def install() -> list[Sequence[str]]:
    """What each dependency alone brings."""
    found = results("install_size")
    rows: list[Sequence[str]] = [("dependency", "packages that it alone brings", "MB")]
    rows += [
        (f"`{r['name']}`", str(r["n_packages"]), f"{r['bytes'] / 1e6:,.0f}")
        for r in found["rows"]
        if r["bytes"] > 1e6
    ]
    n, size = found["n_packages_without_torch"], found["bytes_without_torch"]
    hosts = str(found["n_packages_of_hosts"])
    return [
        *rows,
        ("TransformerLens and SAELens, with what they need", hosts, ""),
        ("all without `torch`", str(n), f"{size / 1e6:,.0f}"),
    ]


def exports() -> list[Sequence[str]]:
    """Exports of the embedded dictionaries as another library loads them."""
    found = results("exports")["rows"]
    rows: list[Sequence[str]] = [
        ("", "MB", "ms to load", "unexplained variance (of the crosscoder)",
         "Jaccard index of the active latents")
    ]  # fmt: skip
    for kind in ("ours", "concat", "transcoder", "site"):
        own = [r for r in found if r["kind"] == kind]
        times = sorted(r["ms"] for r in own)
        is_lossy = kind == "site"
        rows.append(
            (
                kind,
                f"{own[0]['n_bytes'] / 1e6:.2f}",
                f"{times[0]:.1f}-{times[-1]:.1f}",
                ", ".join(f"{r['fvu']:.3f} ({r['fvu_of_crosscoder']:.3f})" for r in own)
                if is_lossy
                else "the same",
                ", ".join(short(r["jaccard"]) for r in own) if is_lossy else "1",
            )
        )
    return rows


def start() -> list[Sequence[str]]:
    """How fast dictionaries learn from each start, with and without AuxK."""
    rows: list[Sequence[str]] = [
        ("pair", "start", "AuxK", "FVE after 50, 100, 200 steps", "tokens to FVE .8", "FVE",
         "of the difference", "dead at the end (most)")
    ]  # fmt: skip
    for r in results("learning_start")["rows"]:
        early = (r[f"fve_at_{step}"] for step in (50, 100, 200))
        needed = r["tokens_to_80"]
        rows.append(
            (
                r["pair"],
                r["start"],
                "yes" if r["auxk_weight"] else "no",
                ", ".join("-" if value is None else short(value) for value in early),
                "-" if needed is None else f"{needed:,}",
                f"{r['fve']:.3f}",
                f"{r['difference_fve']:.3f}",
                f"{r['dead_share']:.1%} ({r['most_dead']:.1%})",
            )
        )
    return rows


def answer_rows(preset_is: Callable[[str], bool]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Cells of the whole answer by pair and preset, a seed each."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results("answer")["rows"]:
        if preset_is(row["preset"]):
            found.setdefault((row["pair"], row["preset"]), []).append(row)
    return found


def answer() -> list[Sequence[str]]:
    """What changed, on pairs whose answer is known."""
    rows: list[Sequence[str]] = [
        ("pair", "preset", "KL, nats a token", "% of it that passes the hook",
         "% of that: all latents", "the first 3", "the first 10", "changes", "doubted groups",
         "planted behaviours found", "changes of null pairs: own samples, base twice",
         "largest latent: pair, nulls")
    ]  # fmt: skip
    for (pair, preset), cells in answer_rows(lambda name: "hooks" not in name).items():
        falls = [cell["waterfall"] for cell in cells]
        n_changes = [sum(not c["doubt"] for c in cell["changes"]) for cell in cells]
        n_doubted = [sum(bool(c["doubt"]) for c in cell["changes"]) for cell in cells]
        tested = [cell["behaviours"] for cell in cells]
        floors = [cell["floor"] for cell in cells if "floor" in cell]
        rows.append((
            pair,
            preset,
            short(falls[0]["the whole change"]["kl"]),
            per_cent(fall["passes this hook"]["of_all"] for fall in falls),
            *(per_cent(fall[part]["of_reachable"] for fall in falls)
              for part in ("all latents", "the first 3", "the first 10")),
            ", ".join(map(str, n_changes)),
            ", ".join(map(str, n_doubted)),
            ", ".join(f"{sum(b['is_found'] for b in each)} of {len(each)}" if each else "-"
                      for each in tested),
            "; ".join(", ".join(str(r["n_changes"]) for r in floor[1:]) for floor in floors) or "-",
            "; ".join(", ".join(f"{r['largest_latent']:.1g}" for r in floor) for floor in floors)
            or "-",
        ))  # fmt: skip
    return rows


def answer_behaviours() -> list[Sequence[str]]:
    """What one change's latents do to each planted behaviour."""
    rows: list[Sequence[str]] = [
        ("pair", "preset", "behaviour", "base → fine-tuned", "% that passes the hook",
         "% of that undone: 3 latents of one change", "all its latents", "change",
         "verdict: % undone [interval]", "controls")
    ]  # fmt: skip
    for (pair, preset), cells in answer_rows(lambda name: "hooks" not in name).items():
        for i, first in enumerate(cells[0]["behaviours"]):
            each = [cell["behaviours"][i] for cell in cells]
            best = [
                max(b["first_of_reachable"], key=b["first_of_reachable"].get, default=None)
                for b in each
            ]
            known = [b for b in each if b["share"] is not None]
            rows.append((
                pair,
                preset,
                first["behaviour"],
                f"{first['base'] or 0:.0%} → {first['finetuned'] or 0:.0%}",
                per_cent(b["ceiling"] for b in each),
                per_cent(b["first_of_reachable"][at] if at else None
                         for b, at in zip(each, best, strict=True)),
                per_cent(max(b["of_reachable"].values(), default=None) for b in each),
                ", ".join(at.removeprefix("change ") if at else "-" for at in best),
                "; ".join(f"{100 * b['share']:.0f} [{100 * b['share_low']:.0f}, "
                          f"{100 * b['share_high']:.0f}]{'' if b['is_found'] else ' not found'}"
                          for b in known),
                per_cent(b["control_high"] for b in known),
            ))  # fmt: skip
    return rows


_METHODS = {
    "pca": "components of the difference",
    "pca-neutral": "the same, on neutral text",
    "weights": "singular vectors of the weights' difference",
}


def answer_curves() -> list[Sequence[str]]:
    """Necessity by number of latents or directions, as shares of what passes the hook.

    Methods without a dictionary are the same beside every preset, and stand there once.
    """
    sizes, seen = (1, 3, 10, 30), set[tuple[str, str, str]]()
    rows: list[Sequence[str]] = [
        ("pair", "effect", "first of", "preset", *map(str, sizes), "cost of 10, nats a token")
    ]
    for (pair, preset), cells in answer_rows(lambda name: "hooks" not in name).items():
        kept = [[r for r in cell["curves"] if r["test"] == "necessity"] for cell in cells]
        keys = dict.fromkeys((r["effect"], r["of"]) for own in kept for r in own)
        for effect, of in keys:
            is_method = of in _METHODS
            if of == "all latents" or (is_method and (pair, effect, of) in seen):
                continue
            seen.add((pair, effect, of))
            at = {
                n: [r for own in kept for r in own if (r["effect"], r["of"], r["n"]) ==
                    (effect, of, n)] for n in sizes
            }  # fmt: skip
            costs = [f"{r['cost']:.4f}" for r in at[10]]
            shares = (per_cent(r["of_reachable"] for r in at[n]) or "-" for n in sizes)
            made_by = (_METHODS[of], "-") if is_method else (f"latents by {of}", preset)
            rows.append((pair, effect, *made_by, *shares, ", ".join(costs) or "-"))
    return rows


def answer_hooks() -> list[Sequence[str]]:
    """Ablation at the higher of two hooks, and at both."""
    rows: list[Sequence[str]] = [
        ("pair", "effect", "latents", "% undone at the higher hook", "at both",
         "controls at both", "% that passes the higher hook", "cost, nats a token: higher, both")
    ]  # fmt: skip
    for (pair, _), (cell,) in answer_rows(lambda name: "hooks" in name).items():
        both = {(r["effect"], r["of"].removesuffix(", 2 hooks")): r for r in cell["hooks"]
                if r["of"].endswith(", 2 hooks")}  # fmt: skip
        for one in cell["hooks"]:
            other = both.get((one["effect"], one["of"]))
            if other is None:
                continue
            cells = [
                f"{100 * r['share']:.0f} [{100 * r['low']:.0f}, {100 * r['high']:.0f}]"
                for r in (one, other)
            ]
            rows.append((
                pair, one["effect"], one["of"], *cells, per_cent([other["control"]]),
                per_cent([one["ceiling"]]), f"{one['cost']:.4f}, {other['cost']:.4f}",
            ))  # fmt: skip
    return rows


def organisms() -> list[Sequence[str]]:
    """What the embedded organisms do, from their cards; the variants are `variants`."""
    return _organisms("organism")


def variants() -> list[Sequence[str]]:
    """The nulls, and the other ways to make taboo."""
    return [*_organisms("null"), *_organisms("variant")[1:]]


def real() -> list[Sequence[str]]:
    """Organisms and null on SmolLM2-135M."""
    return _organisms("real")


def _organisms(kind: str) -> list[Sequence[str]]:
    from tl_crosscoder.organisms.suite import load_suite

    rows: list[Sequence[str]] = [
        ("organism", "base", "behaviour", "base → fine-tuned", "true answers to other facts",
         "cross-entropy of other text", "greedy as base")
    ]  # fmt: skip
    for name, entry in load_suite().items():
        if kind != ("real" if entry.is_real else entry.kind):
            continue
        card = (entry.folder / "README.md").read_text(encoding="utf-8")
        found = {m: (a, b) for m, a, b in re.findall(r"^\| (.+) \| ([\d.]+) \| ([\d.]+) \|$", card,
                                                     re.MULTILINE)}  # fmt: skip
        rest = [
            " → ".join(found[measure])
            for measure in ("other facts: P(true answer)", "other text: cross-entropy (nats)")
        ]
        rest.append(found["other text: greedy as base"][1])
        for i, path in enumerate(entry.planted_questions):
            behaviour = path.stem.replace("-", " ")
            own = (name, entry.base.name) if i == 0 else ("", "")
            change = " → ".join(found[f"P({behaviour})"])
            rows.append((*own, behaviour, change, *(rest if i == 0 else [""] * 3)))
    return rows


def _benchmark(make: str, folder: str = "benchmark") -> list[Sequence[str]]:
    from tl_crosscoder.benchmark import tables
    from tl_crosscoder.results.render import row_texts

    rows, cells, settings = tables.read_results(ROOT / "benchmarks/results" / folder)
    sections = {
        "methods": lambda: tables.method_section(rows, settings),
        "costs": lambda: tables.cost_section(rows),
        "organisms": lambda: tables.organism_section(rows, settings),
        "comparison": lambda: tables.comparison_section(rows, settings),
        "dictionaries": lambda: tables.dictionary_section(cells),
        "words": lambda: tables.word_section(cells),
    }
    texts = row_texts(sections[make]().columns)
    return [[label for label, _ in texts[0]], *([text for _, text in row] for row in texts)]


def scale() -> list[Sequence[str]]:
    """A real pair's dictionaries by their latents, then by tokens."""
    rows: list[Sequence[str]] = [
        ("latents", "tokens", "step", "tokens/s", "memory in training", "measured in", "report in",
         "report")
    ]  # fmt: skip
    for r in results("scale")["rows"]:
        rows.append(
            (
                f"{r['d_sae']:,}",
                f"{r['n_tokens']:,}",
                f"{r['step_ms']:,.0f} ms",
                f"{r['tokens_s']:,.0f}",
                f"{r['train_mb'] / 1e3:.1f} GB",
                f"{r['measure_s']:.0f} s",
                f"{r['report_s']:.0f} s",
                f"{r['report_mb']:.1f} MB",
            )
        )
    return rows


def parallel() -> list[Sequence[str]]:
    """One dictionary by several processes."""
    rows: list[Sequence[str]] = [
        ("processes (tokens x latents)", "threads of each", "step", "CPU of all",
         "weights, gradients and moments", "largest difference")
    ]  # fmt: skip
    for r in results("parallel")["rows"]:
        n_data, n_latents = r["mesh"]
        rows.append((
            f"{n_data * n_latents} ({n_data} x {n_latents})", str(r["n_threads"]),
            f"{r['step_ms']:,.0f} ms", f"{r['cpu_ms']:,.0f} ms", f"{r['held_mb']:,.0f} MB",
            f"{r['difference']:.0e}" if r["difference"] else "-",
        ))  # fmt: skip
    return rows


TABLES: dict[str, Callable[[], list[Sequence[str]]]] = {
    "presets": presets, "causal": causal, "patching": patching, "demo": demo,
    "verdict-nulls": verdict_nulls, "answer": answer, "answer-behaviours": answer_behaviours,
    "answer-curves": answer_curves, "answer-hooks": answer_hooks,
    "attribution": attribution, "analysis": analysis, "embedded-speed": embedded_speed,
    "harvest": harvest,
    "reading": reading, "step": step, "report": report, "exports": exports,
    "causal-speed": causal_speed, "install": install, "start": start,
    "organisms": organisms, "organisms-real": real, "variants": variants,
    "parallel": parallel, "scale": scale,
    **{f"preset-{name}": partial(presets, name) for name in PRESETS},
    **{f"benchmark-{name}": partial(_benchmark, name)
       for name in ("methods", "costs", "organisms", "comparison", "dictionaries", "words")},
    **{f"real-{name}": partial(_benchmark, name, "benchmark_smollm2")
       for name in ("methods", "dictionaries")},
}  # fmt: skip


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def filled(page: str) -> str:
    """The page with every marked table written anew.

    Raises:
        KeyError: if the page marks a table that nobody makes.
    """
    return _TABLE.sub(lambda found: f"{found[1]}{markdown(TABLES[found[2]]())}\n{found[3]}", page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
