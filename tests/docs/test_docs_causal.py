"""The pages on measures and interventions run as they stand, in one folder, with fewer tokens."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import tl_crosscoder
from tl_crosscoder.analysis.latents import Order
from tl_crosscoder.cli.main import main, parse
from tl_crosscoder.interventions.latent_edits import Mode
from tl_crosscoder.interventions.trials import CausalRow

FOLDER = Path(__file__).parents[2] / "docs"
PAGES = {name: (FOLDER / name).read_text("utf-8") for name in ("measures.md", "interventions.md")}
FEWER = {"500000": "6000", "n_random=100": "n_random=3", "n_matched=10": "n_matched=2"}
_CONTROLS = ["--n-prompts", "6", "--n-random", "2", "--n-matched", "1"]
SMALL = {
    "train": ["--d-sae", "64", "--max-documents", "200"],
    "analyze": [],
    "patch": ["--n-prompts", "6"],
    "ablate": _CONTROLS,
    "steer": _CONTROLS,
    "baselines": ["--n-prompts", "6", "--n-random", "3", "--strengths", "1"],
}
every_page = pytest.mark.parametrize("page", PAGES)


def blocks(page: str, language: str) -> list[str]:
    """Blocks of code, with fewer tokens and controls."""
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)
    for many, few in FEWER.items():
        found = [code.replace(many, few) for code in found]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pages run, one after the other; the file of questions is in it."""
    path = tmp_path_factory.mktemp("docs")
    (questions,) = blocks("interventions.md", "jsonl")
    (path / "hints.jsonl").write_text(questions, encoding="utf-8")
    return path


def run_page(page: str) -> dict:
    """Commands, then Python: what it has named in the end. No run is made twice."""
    for line in "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        program, verb, *arguments = shlex.split(line)
        assert program == "tl-crosscoder"
        if verb != "train" or not Path(arguments[-1]).exists():
            assert main([verb, *arguments, *SMALL[verb]]) == 0, line
    names: dict = {}
    for i, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{page}, block {i}", "exec"), names)
    return names


def test_the_page_on_measures_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = run_page("measures.md")
    out = capsys.readouterr().out
    assert "Latent Scaling" in out
    assert "among their examples" in out
    assert (folder / "latents.parquet").is_file()
    listed = re.findall(r"^\| `([\w.]+\.\w+)` \|", PAGES["measures.md"], re.MULTILINE)
    assert len(listed) == 4
    assert [name for name in listed if not (folder / "runs/taboo" / name).is_file()] == []
    assert names["ranking"].latents == [row.latent for row in names["ranking"].rows]


def test_the_page_on_interventions_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    names = run_page("interventions.md")
    assert "Necessity" in capsys.readouterr().out
    page = re.sub(r"^```.*?^```", "", PAGES["interventions.md"], flags=re.DOTALL | re.MULTILINE)
    variants = {row.variant.rstrip("0123456789 ") for row in names["result"].rows}
    said = {f"fine-tuned stream {m}" for m in re.findall(r"`… (at [^`\n]+)`", page)}
    said |= {m.rstrip("0123456789 ") for m in re.findall(r"`([^`\n]+)`", page)}
    assert variants - {"top"} <= said  # `top 10` is the page's own set
    results = set(re.findall(r"`(\w+)\.json`", page))
    assert len(results) == 5
    assert [n for n in results if not (folder / f"runs/taboo/{n}.json").is_file()] == []


def test_every_column_mode_and_order_is_explained():
    page = PAGES["interventions.md"]
    columns = [f.name for f in fields(CausalRow)]
    columns = columns[columns.index("share") :]
    assert [c for c in columns if f"`{c}`" not in page] == []
    assert [m for m in Mode.__args__ if f"| `{m}`" not in page] == []
    assert [o for o in Order.__args__ if f"| `{o}`" not in PAGES["measures.md"]] == []


@every_page
def test_what_it_names_is_there(page, capsys):
    flags = set()
    for verb in ("train", "analyze", "patch", "ablate", "steer", "baselines"):
        with pytest.raises(SystemExit):
            parse([verb, "--help"])
        flags |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    text = PAGES[page]
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= flags
    assert set(re.findall(r"\btlc\.(\w+)", text)) <= set(tl_crosscoder.__all__)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in _headings(text)}
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([\w-]*)\)", text):
        target = FOLDER / link if link else FOLDER / page
        assert target.is_file(), link
        if anchor:
            own = _headings(target.read_text("utf-8")) if link else None
            known = anchors if own is None else {h.lower().replace(" ", "-") for h in own}
            assert anchor in known, anchor


def _headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)
