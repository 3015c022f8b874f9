"""The built site: no warning, nothing loaded from a network, every name and verb documented."""

import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pages import ROOT

import tl_crosscoder
from tl_crosscoder.cli.main import parse

pytestmark = pytest.mark.slow
pytest.importorskip("mkdocs", reason="the site is built with the docs' packages, of [dev]")


class Page(HTMLParser):
    """Ids, and what a browser would fetch to show the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: Counter[str] = Counter()
        self.fetched: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.update([i for i in [given.get("id")] if i])
        is_loaded = tag != "link" or given.get("rel") in ("stylesheet", "icon", "preload")
        if tag in ("script", "img", "link", "iframe", "source") and is_loaded:
            self.fetched += [v for name in ("src", "href") if (v := given.get(name))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert built.stderr == ""
    return folder


def test_no_page_loads_anything_from_a_network(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for path in pages:
        fetched = Page(path).fetched
        assert [link for link in fetched if re.match(r"(https?:)?//", link)] == [], path
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text(encoding="utf-8")


def test_every_public_name_is_documented_once(site):
    ids = sum((Page(path).ids for path in (site / "api").glob("*.html")), Counter())
    for name, module in tl_crosscoder._LAZY.items():
        found = ids[f"tl_crosscoder.{name}"] + ids[f"{module}.{name}"]
        assert found == 1, f"{name} is documented {found} times: see docs/api"
    index = (site / "api" / "index.html").read_text(encoding="utf-8")
    assert [n for n in tl_crosscoder.__all__ if f"<code>{n}</code>" not in index] == []


def test_every_verb_has_its_help(site, capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    usage = capsys.readouterr().out.partition("\n\n")[0]
    (verbs,) = re.findall(r"\{(.*?)\}", re.sub(r"\s", "", usage))
    page = Page(site / "cli.html")
    assert {"demo", "train", "organisms-measure"} <= set(page.ids)
    assert [verb for verb in verbs.split(",") if page.ids[verb] != 1] == []
    text = (site / "cli.html").read_text(encoding="utf-8")
    assert "--weight-seed" in text
    assert "\x1b" not in text
