import json
from pathlib import Path

import pytest
import torch

from tl_crosscoder.report.circuits import TokenPanel, TokensHtml, circuits_script
from tl_crosscoder.report.token_panels import colored_tokens, colored_tokens_multi, token_log_probs

# A space between tokens or in them is a no-break space on the page, and read as a space here.
HOSTILE = [
    ("start", "start"),
    ("</script><script>document.title = 'broken'</script>",) * 2,
    ("<img src=x onerror=alert(1)>", "<img src=x onerror=alert(1)>"),
    ("<b>", "<b>"),
    ("<!--", "<!--"),
    ("&lt;", "&lt;"),
    ("&amp", "&amp"),
    ("'\"`${x}\\n", "'\"`${x}\\n"),
    ("\u202eright to left\u202c", "[U+202E]right to left[U+202C]"),
    ("שלום", "שלום"),
    ("😀", "😀"),
    ("👩\u200d👧", "👩\u200d👧"),
    ("\u200d", "[U+200D]"),
    ("<0xE2>", "<0xE2>"),
    ("", "∅"),
    (" a", " a"),
    ("\n", "↵ "),
    ("\t\r\x00", "␉␍␀"),
    ("\x85\u2028\u00a0", "[U+0085][U+2028][U+00A0]"),
    ("\ud800", "[U+D800]"),
    ("\ufffd", "\ufffd"),
    ("\u0301", "◌\u0301"),
    ("<|end|>", "<|end|>"),
]
TOKENS, SHOWN = (list(each) for each in zip(*HOSTILE, strict=True))
# What is drawn of a panel: the texts of its tokens.
DRAWN = """(() => {
  const panels = [...document.querySelectorAll("[id^=tl-circuits]")];
  const texts = panels.map((p) => [...p.querySelectorAll("span > span")].map((s) => s.textContent));
  return panels.length === N && texts.every((t) => t.length) && JSON.stringify(texts);
})()"""
# No server, no eval, no blob: what notebooks in an editor allow, and less than a page from a file.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
HEAD = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'


def drawn(browser, n_panels: int) -> list[list[str]]:
    found = json.loads(browser.wait_for(DRAWN.replace("N", str(n_panels), 1)))
    return [[t.replace("\u2060", "").replace("\u00a0", " ") for t in each] for each in found]


def write(path: Path, body: str, *, style: str = "") -> Path:
    page = f'<!DOCTYPE html><html><head>{HEAD}</head><body style="{style}">{body}</body></html>'
    path.write_text(page, encoding="utf-8")
    return path


@pytest.mark.slow
def test_every_token_is_text_in_every_component(browser, tmp_path: Path):
    n = len(TOKENS)
    values = torch.linspace(-1, 1, n)
    logits = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    heading = "<i>&lt;</div><script>document.title = 'broken'</script>"
    panels = (
        colored_tokens(TOKENS, values, heading=heading),
        colored_tokens_multi(TOKENS, values[:, None].repeat(1, 2), ["<b>one</b>", "two"]),
        token_log_probs(TOKENS, torch.arange(n), logits, to_string=TOKENS.__getitem__, k=3),
    )
    html = TokensHtml(panels=panels)
    dark = "background:#111;color:#ddd"
    browser.open(write(tmp_path / "hostile.html", html._repr_html_(), style=dark))
    # Nothing predicts the first token.
    assert drawn(browser, 3) == [SHOWN, SHOWN, SHOWN[1:]]
    assert browser.driver.title == ""
    body = browser.driver.execute_script("return document.body.innerText")
    assert heading in body
    assert "<b>one</b>" in body
    colours = "getComputedStyle(document.querySelector('[id^=tl-circuits]').closest('[style]'))"
    found = browser.driver.execute_script(f"const s = {colours}; return [s.background, s.color]")
    assert "rgb(255, 255, 255)" in found[0]
    assert found[1] == "rgb(0, 0, 0)"
    assert browser.errors() == []
    assert browser.left_the_page() == []


@pytest.mark.slow
def test_what_the_pointer_shows_is_the_same_text(browser, tmp_path: Path):
    page = TokensHtml(panels=(colored_tokens(TOKENS, range(len(TOKENS))),)).save(
        tmp_path / "t.html"
    )
    browser.open(page)
    drawn(browser, 1)
    from selenium.webdriver.common.action_chains import ActionChains

    spans = browser.driver.find_elements("css selector", "[id^=tl-circuits] span > span")
    ActionChains(browser.driver).move_to_element(spans[TOKENS.index("&lt;")]).perform()
    shown = browser.wait_for("document.querySelector('[id^=tl-circuits] strong')?.textContent")
    assert shown.replace("\u2060", "") == "&lt;"
    assert browser.errors() == []


NOTEBOOK = """
<script>
// Classic notebooks and plotly bring a module loader, which refuses modules without a name.
window.define = () => { throw new Error("anonymous module"); };
window.define.amd = true;
// As JupyterLab puts an output into the page.
const show = (html) => {
  const output = document.createElement("div");
  output.innerHTML = html;
  document.body.append(output);
  for (const dead of output.querySelectorAll("script")) {
    const script = document.createElement("script");
    script.textContent = dead.textContent;
    dead.replaceWith(script);
  }
  return output;
};
</script>
"""


@pytest.mark.slow
def test_outputs_of_a_notebook_stand_alone_and_together(browser, tmp_path: Path):
    one, other = (
        TokensHtml(panels=(colored_tokens(t, [1.0] * len(t)),)) for t in (["a", "b"], ["c"])
    )
    browser.open(write(tmp_path / "notebook.html", NOTEBOOK))
    show = browser.driver.execute_script
    show("window.first = show(arguments[0])", one._repr_html_())
    assert drawn(browser, 1) == [["a", "b"]]
    show("first.remove(); show(arguments[0]); show(arguments[1]);", *[
        other._repr_html_(), one._repr_html_()
    ])  # fmt: skip
    assert drawn(browser, 2) == [["c"], ["a", "b"]]
    # The same figure twice on a page.
    show("show(arguments[0])", one._repr_html_())
    assert drawn(browser, 3) == [["c"], ["a", "b"], ["a", "b"]]
    assert browser.errors() == []
    assert browser.left_the_page() == []


@pytest.mark.slow
def test_a_page_draws_into_its_own_elements_and_draws_again(browser, tmp_path: Path):
    body = f'<div id="own.id">before</div><script type="module">{circuits_script()}</script>'
    browser.open(write(tmp_path / "report.html", body))
    browser.wait_for("window.tlCircuits && true")
    render = "tlCircuits.render(arguments[0], arguments[1], arguments[2])"
    for tokens in (["a"], ["b", "c"]):
        panel = colored_tokens(tokens, [1.0] * len(tokens))
        browser.driver.execute_script(render, "own.id", panel.component, dict(panel.props))
        assert drawn(browser, 1) == [tokens]
    assert browser.errors() == []
    browser.driver.execute_script(f"{render}.catch(() => {{}})", "own.id", "NoSuch", {})
    text = "document.getElementById('own.id').textContent"
    assert browser.wait_for(f"{text}.includes('cannot be drawn') && {text}") == (
        "This figure cannot be drawn: Error: circuitsvis has no NoSuch"
    )


def test_without_javascript_there_is_the_text():
    html = TokensHtml(panels=(colored_tokens(["<b>", " & so"], [0.0, 1.0]),)).fragment()
    assert "&lt;\u2060b&gt; &amp; so</div>" in html
    assert html.count("<script>") == html.count("</script>") == 1


def test_the_script_is_there_once_and_figures_stay_as_they_are(tmp_path: Path):
    panel = colored_tokens(["a"], [1.0], heading="one")
    one, other = TokensHtml(panels=(panel,)), TokensHtml(panels=(panel, panel))
    both = one + other
    assert both.panels == (panel,) * 3
    assert both._repr_html_().count(circuits_script()) == 1
    assert both._repr_html_() == (one + other)._repr_html_()
    assert both.save(tmp_path / "f.html", "<t>").read_text(encoding="utf-8") == both.page("<t>")
    assert "<title>&lt;t&gt;</title>" in both.page("<t>")
    assert TokenPanel(**json.loads(json.dumps(panel.to_dict()))) == panel


def test_what_is_not_json_is_refused():
    html = TokensHtml(
        panels=(TokenPanel(component="ColoredTokens", props={"values": [float("nan")]}),)
    )
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        html.fragment()
