"""The report in headless Chromium: click, filter, search, keys; nothing leaves the page."""

from dataclasses import replace
from pathlib import Path

import pytest
from report.report_runs import HOSTILE, PAIR, small_run

from tl_crosscoder.report.figures import run_figures
from tl_crosscoder.report.html import ReportSettings, SampleSettings
from tl_crosscoder.report.html.data import ReportData, collect
from tl_crosscoder.report.html.latents import Record
from tl_crosscoder.report.html.page import page
from tl_crosscoder.run.run import Run

pytestmark = pytest.mark.slow
TOKENS = [HOSTILE, "<b>bold</b>", "&amp;", "‮rtl", "'\"`", "zebra\u2028", "🙂"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ReportData:
    """The first latent's example is hostile, and the second's has a word that no other has."""
    run = Run(path=small_run(tmp_path_factory.getbasetemp(), *PAIR))
    samples = SampleSettings(prompts=(HOSTILE,), strengths=(1.0,), max_new_tokens=4)
    found = collect(run, ReportSettings(n_latents=6, samples=samples))

    def example(tokens: list[str]) -> Record:
        codes = [0.5] * len(tokens)
        how = {"quantile": None, "value": 0.5, "at": 1, "role": "user", "source": HOSTILE}
        shifts = [None, *[-0.5] * (len(tokens) - 1)]
        return {"tokens": tokens, "codes": codes, "shifts": shifts, **how}

    first, second, *rest = found.latents
    return replace(
        found,
        latents=[
            first | {"examples": [example(TOKENS)]},
            second | {"examples": [*second["examples"], example(["a ", "quagga", "!"])]},
            *rest,
        ],
    )


@pytest.fixture(scope="module")
def file(data, tmp_path_factory) -> Path:
    run = small_run(tmp_path_factory.getbasetemp(), *PAIR)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(data, run_figures(run)), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser, file):
    """The page, fresh; whatever a test did, nothing failed and nothing left the page."""
    browser.driver.get("about:blank")
    resize(browser.driver, 1400)
    browser.open(file)
    browser.wait_for("'ready' in document.documentElement.dataset")
    yield browser.driver
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert browser.errors() == []
    assert browser.left_the_page() == []


def resize(driver, width: int) -> None:
    sizes = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)


def press(driver, keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(keys).perform()


def latents(driver) -> list[int]:
    script = "return [...document.querySelectorAll('#table tbody a')].map((a) => +a.textContent)"
    return driver.execute_script(script)


def clear(driver) -> None:
    driver.find_element("css selector", "#filters [type=reset]").click()
    driver.execute_async_script("setTimeout(arguments[0], 20)")


def heading(driver) -> str | None:
    """Heading of the open latent."""
    return driver.execute_script(
        "return document.querySelector('#pane:not([hidden]) h2')?.textContent"
    )


def test_a_click_opens_a_latent_and_its_address_opens_it_again(opened, browser, data):
    one, other = (record["latent"] for record in data.latents[1:3])
    opened.find_elements("css selector", "#table tbody tr")[1].find_element(
        "css selector", "td.num"
    ).click()
    browser.wait_for("location.hash")
    assert opened.current_url.endswith(f"#latent-{one}")
    assert heading(opened) == f"Latent {one}"
    opened.find_element("link text", str(other)).click()
    assert heading(opened) == f"Latent {other}"
    opened.back()
    browser.wait_for(f"location.hash === '#latent-{one}'")
    assert heading(opened) == f"Latent {one}"
    opened.refresh()
    assert heading(opened) == f"Latent {one}"
    opened.execute_script("location.hash = 'latent-999999'")
    browser.wait_for("document.querySelector('#pane h2').textContent === 'Latent 999999'")
    assert "not among them" in opened.find_element("id", "pane").text


def test_hostile_text_is_text(opened, browser, data):
    browser.wait_for("document.querySelector('#table tbody tr')")
    opened.execute_script(f"location.hash = 'latent-{data.latents[0]['latent']}'")
    browser.wait_for("document.querySelector('#pane .tokens')")
    script = "return [...document.querySelectorAll('#pane .tokens span')].map((t) => t.textContent)"
    assert opened.execute_script(script) == TOKENS
    hint = "return document.querySelectorAll('#pane .tokens span')[1].dataset.tip"
    said = "activation 0.5; log-probability, fine-tuned minus base: -0.50 nats"
    assert opened.execute_script(hint) == said
    assert opened.execute_script("return document.images.length") == 0
    assert opened.execute_script("return document.querySelectorAll('#pane b').length") == 0
    for part in ("pane", "writing"):
        text = opened.execute_script(f"return document.getElementById('{part}').textContent")
        assert HOSTILE in text


def test_filters_search_and_sorting(opened, data):
    every = [record["latent"] for record in data.latents]
    assert latents(opened) == every
    search = opened.find_element("id", "search")
    search.send_keys("QUAGGA")
    assert latents(opened) == [every[1]]
    assert opened.find_element("id", "count").text == "1 of 6 latents"
    assert "quagga" in opened.find_element("css selector", "td.context").text
    token = data.latents[3]["logits"][0]["promoted"][0][0].strip().lower()
    search.clear()
    search.send_keys(token)
    assert every[3] in latents(opened)
    clear(opened)
    assert latents(opened) == every
    role = data.latents[0]["main_role"]
    opened.find_element(
        "css selector", f"#role option:nth-child(n+2)[value='{role}'], #role"
    ).send_keys(role)
    assert latents(opened) == [r["latent"] for r in data.latents if r["main_role"] == role]
    clear(opened)
    shares = sorted(record["ranked"]["active_share"] for record in data.latents)
    opened.find_element("id", "least").send_keys(str(100 * (shares[2] + shares[3]) / 2))
    assert len(latents(opened)) == sum(s >= (shares[2] + shares[3]) / 2 for s in shares)
    clear(opened)
    opened.find_element("xpath", "//th/button[text()='active']").click()
    by_rate = sorted(data.latents, key=lambda r: -r["ranked"]["active_share"])
    assert latents(opened) == [record["latent"] for record in by_rate]


def test_keys_walk_open_close_and_search(opened, browser, data):
    from selenium.webdriver.common.keys import Keys

    every = [record["latent"] for record in data.latents]
    press(opened, "jjk")
    assert opened.execute_script("return document.activeElement.textContent") == str(every[0])
    press(opened, Keys.ENTER)
    browser.wait_for("location.hash")
    assert heading(opened) == f"Latent {every[0]}"
    press(opened, "j" + Keys.ARROW_RIGHT)
    assert heading(opened) == f"Latent {every[2]}"
    assert opened.current_url.endswith(f"#latent-{every[2]}")
    press(opened, Keys.ARROW_LEFT)
    assert heading(opened) == f"Latent {every[1]}"
    press(opened, Keys.ESCAPE)
    assert heading(opened) is None
    press(opened, "/quagga")
    assert latents(opened) == [every[1]]
    press(opened, Keys.ENTER)
    assert opened.execute_script("return document.activeElement.textContent") == str(every[1])
    press(opened, "?")
    assert opened.execute_script("return document.getElementById('help').open")
    press(opened, Keys.ESCAPE)
    assert not opened.execute_script("return document.getElementById('help').open")


def test_figures_and_texts_are_drawn_when_they_come_near(opened, browser):
    assert opened.execute_script("return typeof Plotly") == "undefined"
    for part in ("figure", "text"):
        first = f"document.querySelector('[data-{part}]')"
        opened.execute_script(f"{first}.scrollIntoView()")
        browser.wait_for(f"{first}.dataset.done")
    assert opened.execute_script("return document.querySelectorAll('figure .main-svg').length") > 0
    assert opened.execute_script("return document.querySelectorAll('.failed').length") == 0


def test_what_is_open_is_printed_and_no_controls_are(opened, browser, data):
    shown = "return [...document.querySelectorAll('h1, nav, #filters, #pane')]" + (
        ".filter((n) => n.getClientRects().length).map((n) => n.id || n.localName)"
    )
    try:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        assert opened.execute_script(shown) == ["h1"]
        opened.execute_script(f"location.hash = 'latent-{data.latents[1]['latent']}'")
        browser.wait_for("!document.getElementById('pane').hidden")
        assert opened.execute_script(shown) == ["pane"]
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_a_phone_does_not_scroll_sideways(opened, browser, data):
    resize(opened, 390)
    opened.refresh()
    left = "document.querySelector('td.context').getBoundingClientRect().left"
    assert opened.execute_script(f"return {left}") < 300
    for hash in ("", *(f"latent-{record['latent']}" for record in data.latents[:2])):
        opened.execute_script(f"location.hash = '{hash}'")
        browser.wait_for(f"document.getElementById('pane').hidden === {str(not hash).lower()}")
        for node in ("document.documentElement", "document.getElementById('pane')"):
            assert opened.execute_script(f"return {node}.scrollWidth") <= 390
