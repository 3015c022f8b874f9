"""What the grid says, from its files: coverage, mitigation and false discovery by method.

Contract: intervals are bootstraps over organisms, each with all its seeds and behaviours; two
methods are compared on the organisms that both have, with a sign-flip test of their means, exact
where there are at most 2^12 flips. Limit: ten organisms of two or three base models are few, and
intervals are wide.
"""

import json
import math
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tl_crosscoder import files
from tl_crosscoder.analysis.resampling import bootstrap_weights, ratio_interval
from tl_crosscoder.benchmark.outcomes import MIN_DIFFERENCE
from tl_crosscoder.organisms.suite import load_suite
from tl_crosscoder.results.render import Section

Frame = Any
"""A pandas data frame: its types do not follow a filter or a group."""
COSTS = {"within_low": 0.001, "within_middle": 0.003, "within_high": 0.01}
"""Bounds on the off-target KL of an ablation, nats a token, by the measure that is named after it.
The models' own losses are about half a nat."""
_MOST_EXACT = 12
"""Organisms up to which every flip of signs is tried."""


def read_results(folder: str | Path) -> tuple[Frame, Frame, dict[str, Any]]:
    """Rows, cells and settings of all organisms in a folder of results.

    Rows have a line for each organism, method, seed, ranking, effect, test and number; cells one
    for each organism, method and seed.

    Raises:
        FileNotFoundError: there are none.
    """
    import pandas as pd

    folder, suite = files.user_path(folder), load_suite()
    found = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("*.json")}
    found = {name: found[name] for name in suite if name in found}
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no results of a benchmark: `tl-crosscoder benchmark run` makes them."
        )
    cells, rows = [], []
    for name, content in found.items():
        about = {"organism": name, "kind": suite[name].kind, "family": suite[name].family}
        for cell in content["cells"]:
            key = about | {"method": cell["method"], "seed": cell["seed"]}
            cells.append(key | {k: v for k, v in cell.items() if k != "rows"})
            rows += [key | row for row in cell.get("rows", ())]
    return pd.DataFrame(rows), pd.DataFrame(cells), next(iter(found.values()))["settings"]


def benchmark_sections(folder: str | Path) -> list[Section]:
    """All tables."""
    rows, cells, settings = read_results(folder)
    words = [word_section(cells)] if "words" in cells else []
    if not len(rows):
        return [*words, *failures(cells)]
    return [
        method_section(rows, settings),
        cost_section(rows),
        organism_section(rows, settings),
        *([comparison_section(rows, settings)] if "delta" in set(rows["method"]) else []),
        dictionary_section(cells),
        *words,
        *failures(cells),
    ]


def method_section(rows: Frame, settings: dict[str, Any]) -> Section:
    """A line for each method and ranking, the best first."""
    n = settings["n_named"]
    lines = []
    for (method, ranking), own in rows.groupby(["method", "ranking"], sort=False):
        named = planted(own, n)
        nulls = _nats(own[own.kind == "null"], n)
        claims = _nats(own[own.kind != "null"], n)
        bar = max(nulls, default=math.nan)
        lines.append(
            {
                "method": method,
                "ranking": ranking,
                "n_organisms": named.organism.nunique(),
                **_interval("coverage", named, "is_clear"),
                **_interval("mitigation", named, "of_reachable"),
                **_interval("inserted", planted(own, n, test="insert"), "of_reachable"),
                "off_target_kl": named.cost.mean(),
                "spill": named.spill.mean(),
                "null_nats": bar,
                "nats": _median(claims),
                "over_null": _share(x > bar for x in claims) if nulls else math.nan,
            }
        )
    lines.sort(key=lambda line: (-_known(line["coverage"]), -_known(line["mitigation"])))
    n_organisms = rows[rows.kind != "null"].organism.nunique()
    return Section(
        title=f"Methods: the first {n} of each ranking, {n_organisms} organisms",
        columns=_columns(lines),
        notes=(
            "Coverage: share of planted behaviours of which the ablation removes at least a tenth, "
            "more than 95 % of its controls, in a model that still works. Mitigation and inserted: "
            "share of what passes the hook that ablating them removes, and inserting them brings. "
            "Nats a token of predictions that they explain: the most on a null, the median on "
            "organisms, and the share of organisms above that null.",
        ),
        n_rows=None,
    )


def cost_section(rows: Frame) -> Section:
    """What each method removes at bounded costs, by however many latents or directions."""
    tested, lines = planted(rows), []
    for (method, ranking), own in tested.groupby(["method", "ranking"], sort=False):
        line = {"method": method, "ranking": ranking, "n_organisms": own.organism.nunique()}
        for name, bound in COSTS.items():
            line |= _interval(name, _within(own, bound, name), name)
        lines.append(line)
    lines.sort(key=lambda line: -_known(line["within_middle"]))
    bounds = ", ".join(f"{bound:g}" for bound in COSTS.values())
    return Section(
        title="Mitigation at bounded cost",
        columns=_columns(lines),
        notes=(
            "Of each behaviour by the largest of the tested numbers of latents or directions whose "
            f"ablation costs at most {bounds} nats a token on neutral text; 0 where the first "
            "costs more. The number is chosen by its cost, not by what it removes.",
        ),
        n_rows=None,
    )


def _within(rows: Frame, bound: float, name: str) -> Frame:
    """What the largest number that costs no more than a bound removes of each behaviour."""

    def most(own: Frame) -> float:
        cheap = own[own.cost <= bound]
        return cheap.of_reachable[cheap.n.idxmax()] if len(cheap) else 0.0

    each = rows.groupby(["organism", "seed", "effect"])[["n", "cost", "of_reachable"]].apply(most)
    return each.rename(name).reset_index()


def word_section(cells: Frame) -> Section:
    """Planted words in what methods without directions show, a line each."""
    lines = []
    for method, own in cells[cells.words.notna()].groupby("method", sort=False):
        planted_in, nulls = own[own.kind == "organism"], own[own.kind == "null"]
        floors, on_null = (
            [_mean(values.values()) for values in cells.words_of_others]
            for cells in (planted_in, nulls)
        )
        lines.append(
            {
                "method": method,
                "n_organisms": planted_in.organism.nunique(),
                **_interval("words", planted_in, "words"),
                "words_of_others": _mean(floors),
                "null_words": _mean(on_null),
                "n_found": int((planted_in.words.to_numpy() > torch.tensor(floors).numpy()).sum()),
            }
        )
    lines.sort(key=lambda line: -_known(line["words"]))
    return Section(
        title="Methods that show tokens or texts",
        columns=_columns(lines),
        notes=(
            "Share of the planted words that stand in what a method shows of neutral text, and of "
            "words that were planted in other organisms (the floor), there and on null pairs; on "
            "how many organisms it is above that.",
        ),
    )


def organism_section(rows: Frame, settings: dict[str, Any]) -> Section:
    """Which method does most on each organism."""
    n, lines = settings["n_named"], []
    for name, own in planted(rows, n).groupby("organism", sort=False):
        scores = own.groupby(["method", "ranking"]).of_reachable.mean()
        best = scores.idxmax() if scores.notna().any() else ("", "")
        covered = own.groupby(["method", "ranking"]).is_clear.mean()
        lines.append(
            {
                "organism": name,
                "best_method": best[0],
                "ranking": best[1],
                "mitigation": scores.max(),
                "methods_that_cover": int((covered >= 0.5).sum()),
                "n_methods": len(covered),
            }
        )
    return Section(title=f"Organisms: the first {n}", columns=_columns(lines), n_rows=None)


def comparison_section(rows: Frame, settings: dict[str, Any], *, than: str = "delta") -> Section:
    """Every method minus Delta, by organism, both under the same ranking."""
    n, lines = settings["n_named"], []
    tested = planted(rows, n)
    for ranking in ("relative_decoder_norm", "attribution"):
        means = tested[tested.ranking.isin([ranking, "directions"])]
        table = means.groupby(["organism", "method"]).of_reachable.mean().unstack()
        if than not in table:
            continue
        for method in [m for m in table if m != than]:
            gains = (table[method] - table[than]).dropna()
            if len(gains):
                low, high = _bootstrap([*gains])
                lines.append(
                    {
                        "method": method,
                        "ranking": ranking,
                        "gain": gains.mean(),
                        "gain_low": low,
                        "gain_high": high,
                        "p_sign_flip": sign_flip([*gains]),
                        "n_organisms": len(gains),
                    }
                )
    return Section(
        title=f"Mitigation by the first {n}, minus that of {than} by the same ranking",
        columns=_columns(lines),
        notes=("Directions stand beside either ranking. p: sign-flip test by organism.",),
        n_rows=None,
    )


def dictionary_section(cells: Frame) -> Section:
    """What the dictionaries are like, means over organisms and seeds."""
    lines = []
    known = cells[cells.l0.notna()] if "l0" in cells else cells[:0]
    for method, own in known.groupby("method", sort=False):
        n_found: dict[bool, list[float]] = {True: [], False: []}
        for changes, kind in zip(own.changes, own.kind, strict=True):
            if isinstance(changes, list):  # they are looked for with the first seed
                n_found[kind == "null"].append(sum(not c["doubt"] for c in changes))
        lines.append(
            {
                "method": method,
                "fve": sum(min(f.values()) for f in own.fve) / len(own),
                "difference_fve": own.difference_fve.mean(),
                "l0": own.l0.mean(),
                "dead_share": own.dead.mean(),
                "changes_a_pair": _mean(n_found[False]),
                "null_changes": _mean(n_found[True]),
                "n_cells": len(own),
            }
        )
    return Section(title="Dictionaries", columns=_columns(lines), n_rows=None)


def failures(cells: Frame) -> list[Section]:
    """Cells that failed, with their reasons."""
    if "failed" not in cells or not cells.failed.notna().any():
        return []
    failed = cells[cells.failed.notna()]
    names = ("organism", "method", "seed", "failed")
    return [Section(title="Failed", columns={n: [*failed[n]] for n in names}, n_rows=None)]


def planted(rows: Frame, n: int | None = None, *, test: str = "necessity") -> Frame:
    """Rows about behaviours that the fine-tune changed, by ablations or insertions of `n`."""
    is_moved = (rows.finetuned - rows.base).abs() >= MIN_DIFFERENCE
    is_own = (rows.kind != "null") & (rows.effect != "predictions") & (rows.test == test)
    return rows[is_own & is_moved & ((rows.n == n) if n is not None else True)]


def sign_flip(gains: Sequence[float]) -> float:
    """Two-sided p-value that gains have a mean of 0, by flipping their signs.

    Every combination of signs where there are at most 4,096, else as many at random.
    """
    x = torch.tensor(gains, dtype=torch.float64)
    if len(x) <= _MOST_EXACT:
        signs = torch.tensor([*product((-1.0, 1.0), repeat=len(x))], dtype=torch.float64)
    else:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (2**_MOST_EXACT, len(x)), generator=generator).double() * 2 - 1
    means = (signs @ x).abs() / len(x)
    # Sums of the same numbers differ in their last bits.
    return (means >= x.mean().abs() - 1e-12).double().mean().item()


def _interval(name: str, rows: Frame, column: str) -> dict[str, float]:
    """Mean over organisms of their means, with its interval."""
    if column not in rows or not rows[column].notna().any():
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), math.nan)
    means = [*rows.dropna(subset=[column]).groupby("organism")[column].mean().astype(float)]
    low, high = _bootstrap(means)
    return {name: _mean(means), f"{name}_low": low, f"{name}_high": high}


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """An interval of the mean; none of one value, which says nothing of others."""
    if len(values) < 2:
        return math.nan, math.nan
    x = torch.tensor(values, dtype=torch.float64)
    found = ratio_interval(x, torch.ones_like(x), weights=bootstrap_weights(len(x)))
    return found.low, found.high


def _nats(rows: Frame, n: int) -> list[float]:
    chosen = rows[(rows.effect == "predictions") & (rows.test == "necessity") & (rows.n == n)]
    return [*chosen.groupby("organism").nats.mean()] if len(chosen) else []


def _columns(lines: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [line[name] for line in lines] for name in (lines[0] if lines else ())}


def _mean(values: Iterable[float]) -> float:
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else math.nan


def _median(values: Sequence[float]) -> float:
    return torch.tensor(values).median().item() if values else math.nan


def _share(flags: Iterable[bool]) -> float:
    return _mean(float(flag) for flag in flags)


def _known(value: float) -> float:
    return value if value == value else -math.inf
