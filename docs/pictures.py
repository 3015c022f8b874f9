"""Take the pictures of README and site: the first screen of a report, and a figure.

    python docs/pictures.py        # needs Chromium and its driver; about a minute

Writes `docs/images/figure.png` and `docs/images/report.png`. Everything on them is what the package
makes of `tl_crosscoder/taboo-batchtopk`, whose results travel with it. Sizes are for a page of some
900 pixels, as GitHub shows them.
"""

import os
import tempfile
import time
from pathlib import Path

from selenium.webdriver import Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from tl_crosscoder import load_diff
from tl_crosscoder.report.figures import save_figure

IMAGES = Path(__file__).resolve().parent / "images"
DICTIONARY = "tl_crosscoder/taboo-batchtopk"
FIGURE = "ablation_behaviour_says-secret-when-guessed"
"""How the name of the figure begins, of which the first is taken."""
SIZES = {"figure": (900, 660), "report": (880, 780)}
"""Size of the window, in pixels."""
WITHOUT_BUTTONS = "document.querySelectorAll('.modebar').forEach(e => e.remove())"
AT_THE_TOP = "window.scrollTo(0, 0)"


def picture(page: Path, name: str, *, script: str) -> None:
    """A screenshot of what a page shows after a script."""
    options = Options()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    width, height = SIZES[name]
    with Chrome(options=options, service=Service("/usr/bin/chromedriver")) as browser:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(page.resolve().as_uri())
        time.sleep(3)  # fonts, and what is unpacked after the page is there
        browser.execute_script(script)
        time.sleep(1)
        browser.save_screenshot(str(IMAGES / f"{name}.png"))


def main() -> None:
    """Take both."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where the copy of the dictionary goes
        diff = load_diff(DICTIONARY)
        drawn = next(f for name, f in diff.figures.items() if name.startswith(FIGURE))
        figure = save_figure(drawn, Path("figure.html"))
        picture(figure, "figure", script=WITHOUT_BUTTONS)
        report = diff.report("report.html", n_latents=50, models=False)
        picture(report, "report", script=AT_THE_TOP)


if __name__ == "__main__":
    main()
