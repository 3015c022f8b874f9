"""A browser without a window, for pages that have to work in one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_CHROMIUM, _DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")


class Browser:
    """Headless Chromium; `open` begins a page with empty logs."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path) -> None:
        for name in ("browser", "performance"):
            self.driver.get_log(name)
        self.driver.get(page.as_uri())

    def wait_for(self, script: str, *, seconds: float = 20) -> Any:
        """What a JavaScript expression gives, once it is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.driver, seconds, poll_frequency=0.05)
        return wait.until(lambda driver: driver.execute_script(f"return {script}"))

    def errors(self) -> list[str]:
        """Errors in the console since the page was opened, or since this was asked."""
        return [e["message"] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]

    def requests(self) -> list[str]:
        """Addresses asked for since the page was opened, the page's own included."""
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        return [
            m["params"]["request"]["url"]
            for m in messages
            if m["method"] == "Network.requestWillBeSent"
        ]

    def left_the_page(self) -> list[str]:
        """Requests to anything but files, data and blobs."""
        inside = ("file:", "data:", "blob:", "about:")
        return [url for url in self.requests() if not url.startswith(inside)]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if not (_CHROMIUM.exists() and _DRIVER.exists()):
        pytest.skip(f"no {_CHROMIUM} and {_DRIVER}: install chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(_CHROMIUM)
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--no-first-run", "--window-size=1000,800",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=str(_DRIVER))
    driver = webdriver.Chrome(options=options, service=service)
    yield Browser(driver)
    driver.quit()
