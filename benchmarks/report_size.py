"""How large a report is, and how long a browser takes to open it.

    python benchmarks/report_size.py tl_crosscoder/taboo-batchtopk RUN-ON-A-REAL-PAIR

Makes the report of each run, then opens the file in headless Chromium: bytes by part, seconds to
make it, and medians over several openings of the navigation's times (milliseconds since it began),
of opening a latent and of searching for a word. A run that keeps no text has no samples. Needs
selenium, chromium and chromedriver. Limit: a warm disk cache.
"""

import argparse
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

from tl_crosscoder import files
from tl_crosscoder.report.html import ReportSettings, report
from tl_crosscoder.run.attribution import ranking_at_hand
from tl_crosscoder.run.run import Run

N_OPENINGS = 7
PARTS = {
    "latents, samples, texts": r'id="data">(.*?)</script>',
    "figures": r'id="figure-data">(.*?)</script>',
    "plotly": r'id="plotly">(.*?)</script>',
    "circuitsvis": r'atob\("(.*?)"\)',
}
TIMES = """
const [navigation] = performance.getEntriesByType("navigation");
const [paint] = performance.getEntriesByName("first-contentful-paint");
const started = performance.now();
document.querySelector("#table tbody a").click();
return new Promise((resolve) => requestAnimationFrame(() => setTimeout(() => resolve({
  "first paint": paint.startTime, "page ready": Number(document.documentElement.dataset.ready),
  "loaded": navigation.loadEventEnd, "a latent opened in": performance.now() - started,
}))));
"""
SEARCH = """
const started = performance.now(), search = document.getElementById("search");
search.value = "the";
search.dispatchEvent(new Event("input", { bubbles: true }));
return new Promise((resolve) => requestAnimationFrame(() => setTimeout(() =>
  resolve({ "a word searched in": performance.now() - started }))));
"""


def sizes(page: Path) -> dict[str, int]:
    """Bytes of the file and of its parts."""
    text = page.read_text(encoding="utf-8")
    found = {"file": page.stat().st_size}
    for name, pattern in PARTS.items():
        match = re.search(pattern, text, flags=re.DOTALL)
        found[name] = len(match.group(1).encode()) if match else 0
    return found


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; selenium would fetch a driver where none is named."""
    from selenium import webdriver

    binary, path = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or path is None:
        raise SystemExit("chromium or chromedriver is not on the path: install both.")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,900",
                 "--disable-background-networking", "--no-first-run"):  # fmt: skip
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=path)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


def wait_until_ready(driver: Any) -> None:
    """Raises TimeoutError where the page's script has not ended after a minute."""
    for _ in range(600):
        if driver.execute_script("return 'ready' in document.documentElement.dataset"):
            return
        time.sleep(0.1)
    raise TimeoutError("the page is not ready after a minute.")


def opening_times(page: Path) -> dict[str, float]:
    """Medians in milliseconds."""
    found: dict[str, list[float]] = {}
    with chromium() as driver:
        for _ in range(N_OPENINGS):
            driver.get("about:blank")
            driver.get(page.absolute().as_uri())
            wait_until_ready(driver)
            times = driver.execute_script(TIMES) | driver.execute_script(SEARCH)
            for name, value in times.items():
                found.setdefault(name, []).append(value)
    return {name: median(values) for name, values in found.items()}


def measured(folder: Path, *, n_latents: int) -> dict[str, Any]:
    """Make the report of a run, and open it."""
    run = Run(path=folder)
    _ = run.models
    with tempfile.TemporaryDirectory() as place:
        started = time.perf_counter()
        settings = ReportSettings(n_latents=n_latents)
        if not (run.path / files.HELD_OUT_NAME).is_file():  # made from a cache
            settings = replace(settings, samples=None)
        page = report(run, settings=settings, output=Path(place) / "report.html")
        seconds = time.perf_counter() - started
        return {
            "run": folder.name, "base": run.models.sites[0].model_name.rpartition("/")[2],
            "n_latents": min(n_latents, len(ranking_at_hand(run, n=None).rows)),
            "seconds_to_make": seconds, "bytes": sizes(page), "milliseconds": opening_times(page),
        }  # fmt: skip


def main() -> None:
    """Print the table, and keep it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--names", nargs="+", help="names of their base models, in this order")
    parser.add_argument("--n-latents", type=int, default=ReportSettings().n_latents)
    parser.add_argument("--output", type=Path, help="JSON file of the same numbers")
    args = parser.parse_args()
    rows = []
    for folder, base in zip_longest(args.runs, args.names or ()):
        if folder is None:
            parser.error("there are more names than runs.")
        rows.append(row := measured(folder, n_latents=args.n_latents))
        row["base"] = base or row["base"]
        made = f"made in {row['seconds_to_make']:.0f} s (models loaded)"
        print(f"{row['n_latents']:,} latents of {row['run']} on {row['base']}, {made}", flush=True)
        for name, value in row["bytes"].items():
            print(f"  {name:<24} {value / 1e6:7.2f} MB")
        for name, value in row["milliseconds"].items():
            print(f"  {name:<24} {value:7.0f} ms")
    if args.output:
        files.write_json(args.output, {"rows": rows})


if __name__ == "__main__":
    main()
