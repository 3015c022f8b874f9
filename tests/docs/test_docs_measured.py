"""The numbers on the page of measurements are those of the result files, to the digits printed."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
VARIANTS = {
    "l1 (at L0 24)": "l1-twice-l0",
    "delta, weight 1": "delta-weight-1",
    "structured, one k": "structured-competing",
}


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text(encoding="utf-8"))


def table(heading: str) -> list[list[str]]:
    """Cells of the rows of the first table whose head begins so."""
    rows = PAGE.partition(f"| {heading}")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("*") for cell in row.strip("|").split("|")] for row in rows]


def short(value: float) -> str:
    """`.83`, `-.05`."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.2f}").replace("-.00", ".00")


def test_presets():
    found = {(r["variant"], r["organism"]): r for r in results("presets_on_organisms")["rows"]}
    rows = table("preset")
    assert len(rows) == 14
    for name, fve, of_difference, by_delta, exclusive, words in rows:
        each = [found[VARIANTS.get(name, name), o] for o in ("taboo", "false-fact")]
        if name != "diff-sae":
            sites = [map(short, r["reconstruction"]["fve"].values()) for r in each]
            assert fve == " / ".join(", ".join(pair) for pair in sites), name
            counts = [str(r["latents_per_class"]["finetuned-only"]) for r in each]
            assert exclusive == " / ".join(counts), name
        assert of_difference == " / ".join(short(r["difference_fve"]) for r in each), name
        if by_delta != "-":
            parts = [short(r["difference_fve_by_part"]["delta"]) for r in each]
            assert by_delta == " / ".join(parts), name
        shares = [r["recovery"] for r in each]
        assert words == " / ".join(
            f"{r['share_in_context']:.0%} ({r['random_share_in_context']:.0%})" for r in shares
        ), name


def test_causal_tests():
    """Of a random share one number stands where the seeds agree."""
    runs = [r for r in results("causal_tests")["rows"] if r["preset"] == "batchtopk"]
    organism, n_rows = "", 0
    for name, latents, *cells in table("| latents"):
        organism = name.partition(" ")[0] or organism
        n = latents.split()[1] if latents.startswith("first") else latents.split()[0]
        key = f"top {n} by {'score' if latents.startswith('first') else 'R'}"
        for test, share, random in (("necessity", *cells[:2]), ("insert", *cells[2:])):
            own = [
                t
                for run in runs
                if run["organism"] == organism
                for t in run["causal"]
                if (t["test"], t["latents"]) == (test, key)
            ]
            assert share == ", ".join(short(t["share"]) for t in own), (organism, key, test)
            chance = [short(t["random_mean"]) for t in own]
            expected = chance[:1] if len({*chance}) == 1 else chance
            assert random == ", ".join(expected), (organism, key, test)
        n_rows += 1
    assert n_rows == 10


def test_kl_recovery():
    rows = [r for r in results("causal_tests")["rows"] if r["preset"] == "batchtopk"]

    def said(organism: str, variant: str) -> str:
        first, second, third = (
            f"{100 * p['recovery']:.0f}"
            for r in rows
            if r["organism"] == organism
            for p in r["patching"]
            if (p["variant"], p["tokens"]) == (variant, "response")
        )
        return f"{first}, {second} and {third} %"

    page = " ".join(PAGE.split())
    for organism, variant in (
        ("taboo", "top 30 by score"),
        ("taboo", "top 30 by R"),
        ("taboo", "all latents"),
        ("false-fact", "top 30 by score"),
        ("false-fact", "top 30 by R"),
    ):
        assert said(organism, variant) in page, (organism, variant)


def test_demo():
    rows = table("organism | seed")
    runs = results("demo_recovery")["runs"]
    assert len(rows) == len(runs) == 6
    for row, run in zip(rows, runs, strict=True):
        r, found = run["reconstruction"], run["recovery"]
        words = found["in_context"].values()
        assert row == [
            run["organism"],
            str(run["seed"]),
            f"{run['seconds']:.0f}",
            *(f"{v:.3f}" for v in (*r["fve"].values(), r["difference_fve"])),
            f"{r['l0']:.1f}",
            f"{r['dead_share']:.1%}",
            f"{max(run['top_relative_norms']):.2f}",
            f"{sum(n > 0 for n in words)} of {len(words)}",
            f"{found['share_in_context']:.0%} ({found['random_share_in_context']:.0%})",
            f"{found['share_at_token']:.0%} ({found['random_share_at_token']:.0%})",
            f"{found['p_value']:.2f}",
        ]


def test_training_step():
    names = {
        "the encoder product alone": "encoder product",
        "ours, BatchTopK": "ours, batchtopk",
        "ours, where bfloat16 is not fast": "ours, batchtopk, no bf16",
        "ours, dense twin": "ours, batchtopk, dense",
        "sparsify 1.3.3, TopK": "sparsify, topk",
        "SAELens 6.54, BatchTopK": "SAELens, batchtopk",
    }
    rows = table("| ms at 4,096")
    assert len(rows) == len(names)
    for name, *cells in rows:
        for own, shape in zip(
            (cells[:4], cells[4:]), results("training_step")["results"], strict=True
        ):
            (step,) = (r for r in shape["rows"] if r["row"] == names[name])
            assert own[0] == f"{step['median_ms']:,.0f}", name
            assert own[1] == f"{step['of_encoder_product']:.2f}", name
            for said, times in zip(
                own[2].split(", "), step["times_faster_than"].values(), strict=True
            ):
                assert abs(float(said) - times) <= 0.051, (name, said, times)
            if own[3] != "-":
                m = shape["memory"][names[name]]
                numbers = [float(n) for n in re.findall(r"[\d.]+", own[3])]
                for said, share in zip(
                    numbers, (m["default_of_budget"], m["mapped_of_budget"]), strict=True
                ):
                    assert abs(said - share) <= 0.0051, (name, said, share)


def test_exports():
    """Sizes to the digit, times as the range of the medians."""
    found = results("exports")["rows"]
    section = PAGE.partition("## Report and exports")[2]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    rows = {row[0]: row for row in cells}
    for kind, label in (
        ("ours", "ours (`Crosscoder.load`)"),
        ("concat", "`concat`"),
        ("transcoder", "`transcoder`"),
        ("site", "`site`"),
    ):
        own = [r for r in found if r["kind"] == kind]
        assert len(own) == 4
        times = [f"{each:.1f}" for each in sorted(r["ms"] for r in own)]
        _, size, shown, loses = rows[label]
        assert abs(float(size) - own[0]["n_bytes"] / 1e6) < 0.01, kind
        assert shown == f"{times[0]}-{times[-1]}", kind
        for r in own if kind == "site" else []:
            assert f"{r['fvu']:.3f} ({r['fvu_of_crosscoder']:.3f})".replace("0.", ".") in loses
            assert short(r["jaccard"]) in loses


def test_the_report():
    found = results("report_size")
    text = PAGE.partition("## Report and exports")[2].partition("\n\nThe four")[0]
    milliseconds = [found["milliseconds"][n] for n in ("first paint", "page ready")]
    assert f"is {found['bytes']['file'] / 1e6:.1f} MB" in text
    assert all(f"after {int(ms + 0.5)}" in " ".join(text.split()) for ms in milliseconds)
