"""The site builds without a warning and loads nothing; what its own pages show runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

import tl_crosscoder
from tl_crosscoder.cli.main import main, parse
from tl_crosscoder.config.presets import preset
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.run.training import train

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ("index", "quickstart", "seeing", "sharing", "traps", "extending", "measured")
SMALL = {
    "200_000": "6_000",
    "max_documents=2_000": "max_documents=200",
    "d_sae=1024": "d_sae=64",
    "context_size=1024": "context_size=64",
}
pytest.importorskip("mkdocs", reason="the site is built with the docs' packages, of [dev]")


def text_of(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The arguments of every `tl-crosscoder` line; a backslash goes on to the next line."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    each = [shlex.split(line, comments=True) for line in lines]
    return [arguments[1:] for arguments in each if arguments[:1] == ["tl-crosscoder"]]


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pages run: with the run that the demo would leave, of fewer tokens and latents."""
    path = tmp_path_factory.mktemp("pages")
    train(
        RunConfig(
            base="tl_crosscoder/world-base",
            adapter="tl_crosscoder/taboo",
            hook_name="blocks.2.hook_resid_post",
            text="tl_crosscoder/taboo",
            output=str(path / "demo-output/taboo"),
            d_sae=64,
            preset=preset("batchtopk", k=12),
            n_tokens=6_000,
            max_documents=300,
        )
    )
    return path


def run_page(page: str) -> dict:
    """All its Python, as one piece with fewer tokens: what it has named in the end."""
    names: dict = {}
    for i, code in enumerate(blocks(page, "python"), 1):
        for many, few in SMALL.items():
            code = code.replace(many, few)
        exec(compile(code, f"{page}.md, block {i}", "exec"), names)
    return names


def test_no_page_loads_anything_from_a_network(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for path in pages:
        fetched = Page(path).fetched
        assert [link for link in fetched if re.match(r"(https?:)?//", link)] == [], path
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} <= named


def test_every_public_name_is_documented_once(site):
    ids = sum((Page(path).ids for path in (site / "api").glob("*.html")), Counter())
    for name, module in tl_crosscoder._LAZY.items():
        found = ids[f"tl_crosscoder.{name}"] + ids[f"tl_crosscoder.{module}.{name}"]
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


@pytest.mark.parametrize("page", PAGES)
def test_what_pages_show_is_there(page):
    """Commands are understood, Python compiles, and the tests that guard traps exist."""
    for arguments in commands(page):
        parse(arguments)
    for code in blocks(page, "python"):
        compile(code, page, "exec")
        assert set(re.findall(r"\btlc\.(\w+)", code)) <= set(tl_crosscoder.__all__)
    written = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
    tests = set(re.findall(r"^def (test_\w+)", written, re.MULTILINE))
    assert set(re.findall(r"`(test_\w+)`", text_of(page))) <= tests


def test_every_trap_is_kept_or_says_what_to_do():
    traps = re.split(r"^### ", text_of("traps"), flags=re.MULTILINE)[1:]
    assert len(traps) > 30
    assert sum("Kept by `test_" in trap for trap in traps) > 25


def test_the_page_on_extending_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run_page("extending")
    found, codes = names["found"], names["crosscoder"]
    # By a loop over the rows of one context: the entries that continue one at the row before.
    (part,) = names["harvest"](names["pair"], names["held_out"][:1])
    active = codes.encode(part.rows) > 0
    one = names["runs"](names["pair"], codes, names["held_out"][:1])
    assert one.n_active.tolist() == active.sum(dim=0).tolist()
    assert one.n_continued.tolist() == (active[1:] & active[:-1]).sum(dim=0).tolist()
    assert found.n_active.sum() > one.n_active.sum()
    assert "loss/log_sum" in (tmp_path / "out/log-sum/metrics.jsonl").read_text()
    assert "Reconstruction(" in capsys.readouterr().out


def test_the_pages_on_seeing_and_sharing_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = run_page("seeing")
    assert {"training", "relative_decoder_norm"} <= set(names["figures"])
    assert len(names["codes"].panels) == len(names["compared"].panels) == 1
    for arguments in commands("sharing"):
        if arguments[0] == "export":
            assert main(arguments) == 0
    # In place of what `import` would fetch.
    tl_crosscoder.Crosscoder.load("demo-output/taboo").save("imported/kissane")
    shutil.copy("demo-output/taboo/held_out.jsonl", "text.jsonl")
    run_page("sharing")
    assert Path("imported/kissane/analysis.safetensors").is_file()
    out = capsys.readouterr().out
    assert "JumpReLUSAE 192" in out
    assert "Give me a hint." in out
