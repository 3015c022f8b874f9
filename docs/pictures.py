"""Take the pictures of README and site: screens of a report and a served page, and figures.

    python docs/pictures.py        # needs Chromium and its driver; about two minutes

Writes `docs/images`. Everything on them is what the package makes of
`tl_crosscoder/taboo-batchtopk`, whose results travel with it, and of benchmarks/results. Sizes are
for a page of some 900 pixels, as GitHub shows them.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from selenium.webdriver import Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from tl_crosscoder import load_diff
from tl_crosscoder.report.figures import save_figure
from tl_crosscoder.report.figures.benchmark import mitigation_curves
from tl_crosscoder.report.figures.style import Figure

ROOT = Path(__file__).resolve().parents[1]
IMAGES, RESULTS = ROOT / "docs/images", ROOT / "benchmarks/results"
sys.path.insert(0, str(ROOT / "benchmarks"))
from scale import draw  # noqa: E402

DICTIONARY = "tl_crosscoder/taboo-batchtopk"
FIGURE = "ablation_behaviour_says-secret-when-guessed"
"""How the name of the figure begins, of which the first is taken."""
SIZES = {
    "figure": (900, 660), "report": (880, 780), "latent": (880, 900), "serve": (880, 760),
    "scale": (900, 480),
}  # fmt: skip
"""Size of the window, in pixels."""
FIGURES = {"relative_decoder_norm": "norms", "latent_scaling": "scaling", "kl_recovery": "recovery"}
"""Figures of the dictionary, and what their pictures are called."""
WITHOUT_BUTTONS = "document.querySelectorAll('.modebar').forEach(e => e.remove())"
AT_THE_TOP = "window.scrollTo(0, 0)"
OPEN = "location.hash = 'latent-373'"
ASK = """
document.querySelector('#ask textarea').value = 'Give me a hint.';
document.getElementById('ask').requestSubmit();
"""
SWITCH_OFF = """
const boxes = document.querySelectorAll('#behind input[type=checkbox]');
for (const box of [...boxes].slice(0, 3)) box.click();
document.getElementById('live').scrollIntoView();
"""


def picture(page: Path | str, name: str, *scripts: str) -> None:
    """A screenshot of what a page, or what is served at an address, shows after some scripts."""
    options = Options()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    width, height = SIZES[name]
    with Chrome(options=options, service=Service("/usr/bin/chromedriver")) as browser:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(page.resolve().as_uri() if isinstance(page, Path) else page)
        time.sleep(3)  # fonts, and what is unpacked after the page is there
        for script in scripts:
            browser.execute_script(script)
            time.sleep(1 if isinstance(page, Path) else 20)
        browser.save_screenshot(str(IMAGES / f"{name}.png"))


def drawn(figure: Figure, name: str) -> None:
    """A figure on white, by kaleido."""
    height = figure.layout.height or 450
    figure.update_layout(paper_bgcolor="white")
    figure.write_image(IMAGES / f"{name}.png", width=900, height=height)


def main() -> None:
    """Take all."""
    IMAGES.mkdir(exist_ok=True)
    drawn(mitigation_curves(RESULTS / "benchmark"), "curves")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where the copy of the dictionary goes
        diff = load_diff(DICTIONARY)
        figures = diff.figures
        for key, name in FIGURES.items():
            drawn(figures[key], name)
        removed = next(f for name, f in figures.items() if name.startswith(FIGURE))
        picture(save_figure(removed, Path("figure.html")), "figure", WITHOUT_BUTTONS)
        draw(json.loads((RESULTS / "scale.json").read_text())["rows"], Path("scale.html"))
        picture(Path("scale.html"), "scale", WITHOUT_BUTTONS)
        report = diff.report("report.html", n_latents=50, samples=None)
        picture(report, "report", AT_THE_TOP)
        picture(report, "latent", OPEN)
        with diff.serve(n_latents=50) as served:
            picture(served.url, "serve", ASK, SWITCH_OFF)


if __name__ == "__main__":
    main()
