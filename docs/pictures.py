"""Take the pictures of README and site: a figure and the report of an embedded dictionary.

    python docs/pictures.py        # needs Chromium and its driver; about a minute

Writes `docs/images/figure.png` and `docs/images/report.png`. Everything on them is what the package
makes of `tl_crosscoder/taboo-delta`, whose results travel with it.
"""

import tempfile
import time
from pathlib import Path

from selenium.webdriver import Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from tl_crosscoder import load_diff
from tl_crosscoder.visualize.figures import save_figure

IMAGES = Path(__file__).parent / "images"
DICTIONARY = "tl_crosscoder/taboo-delta"
FIGURE = "ablation_behaviour_necessity"
SIZES = {"figure": (820, 660), "report": (1400, 1000)}
"""Of the window, in pixels."""


def picture(page: Path, name: str, *, anchor: str = "") -> None:
    """A screenshot of what a page shows at first."""
    options = Options()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    width, height = SIZES[name]
    with Chrome(options=options, service=Service("/usr/bin/chromedriver")) as browser:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(page.resolve().as_uri() + anchor)
        time.sleep(3)  # fonts, and what is unpacked after the page is there
        browser.save_screenshot(str(IMAGES / f"{name}.png"))


def main() -> None:
    """Take both."""
    IMAGES.mkdir(exist_ok=True)
    diff = load_diff(DICTIONARY)
    with tempfile.TemporaryDirectory() as folder:
        figure = save_figure(diff.figures[FIGURE], Path(folder) / "figure.html")
        picture(figure, "figure")
        report = diff.report(Path(folder) / "report.html")
        picture(report, "report", anchor=f"#latent-{diff.top(1).latents[0]}")


if __name__ == "__main__":
    main()
