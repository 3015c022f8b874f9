"""How large a report is, and how long a browser takes to open it.

    python benchmarks/report_size.py demo-output/taboo

Makes the report of a run, then opens the file in headless Chromium: bytes by part, seconds to make
it, and medians over several openings of the navigation's times (milliseconds since it began) and of
opening a latent. Needs selenium, chromium and chromedriver. Limit: a warm disk cache.
"""

import argparse
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from tl_crosscoder import files
from tl_crosscoder.report.html import ReportSettings, report
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
  "first paint": paint.startTime, "page ready": navigation.domContentLoadedEventEnd,
  "loaded": navigation.loadEventEnd, "a latent opened in": performance.now() - started,
}))));
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


def opening_times(page: Path) -> dict[str, float]:
    """Medians in milliseconds."""
    found: dict[str, list[float]] = {}
    with chromium() as driver:
        for _ in range(N_OPENINGS):
            driver.get("about:blank")
            driver.get(page.absolute().as_uri())
            time.sleep(0.5)
            for name, value in driver.execute_script(TIMES).items():
                found.setdefault(name, []).append(value)
    return {name: median(values) for name, values in found.items()}


def main() -> None:
    """Print the table, and keep it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--n-latents", type=int, default=200)
    parser.add_argument("--output", type=Path, help="JSON file of the same numbers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(path=args.run)
        _ = run.models
        started = time.perf_counter()
        settings = ReportSettings(n_latents=args.n_latents)
        page = report(run, settings=settings, output=Path(folder) / "report.html")
        seconds = time.perf_counter() - started
        row = {
            "run": args.run.name, "n_latents": args.n_latents, "seconds_to_make": seconds,
            "bytes": sizes(page), "milliseconds": opening_times(page),
        }  # fmt: skip
    print(f"{args.n_latents} latents of {args.run.name}, made in {seconds:.0f} s (models loaded)")
    for name, value in row["bytes"].items():
        print(f"  {name:<24} {value / 1e6:7.2f} MB")
    for name, value in row["milliseconds"].items():
        print(f"  {name:<24} {value:7.0f} ms")
    if args.output:
        files.write_json(args.output, row)


if __name__ == "__main__":
    main()
