"""Every page of the documentation: what it names, links to and shows is there."""

import re
from dataclasses import fields

import pytest
import yaml
from pages import DOCS, PAGES, ROOT, anchors, blocks, commands, text_of

import tl_crosscoder
from tl_crosscoder import RunConfig, TextSource
from tl_crosscoder.analysis.latents import Order
from tl_crosscoder.cli.main import parse
from tl_crosscoder.config.presets import PRESETS, preset_name
from tl_crosscoder.config.sweep import sweep
from tl_crosscoder.interventions.latent_edits import Mode
from tl_crosscoder.interventions.trials import CausalRow
from tl_crosscoder.models.site import sites_of
from tl_crosscoder.train.presets import recipe_of

DICTIONARIES = [page for page in PAGES if page.startswith("docs/dictionaries/")]
every_page = pytest.mark.parametrize("page", PAGES)
every_preset = pytest.mark.parametrize("name", PRESETS)


@pytest.fixture(scope="module")
def help_text() -> str:
    """What every verb prints for `--help`."""
    from generate import command_line

    return command_line()


@every_page
def test_commands_are_understood(page):
    for arguments in commands(page):
        assert callable(parse(arguments)), arguments


@every_page
def test_python_compiles_and_names_what_is_public(page):
    for code in blocks(page, "python"):
        compile(code, page, "exec")
        assert set(re.findall(r"\btlc\.(\w+)", code)) <= set(tl_crosscoder.__all__)


def test_what_pages_on_dictionaries_assert_is_so():
    asserting = [(p, c) for p in DICTIONARIES for c in blocks(p, "python") if "assert " in c]
    assert len(asserting) > 10
    for page, code in asserting:
        exec(compile(code, page, "exec"), {})


@every_page
def test_flags_are_flags_of_the_command_line(page, help_text):
    text = re.sub(r"^.*(?:pip |python|benchmarks/).*$", "", text_of(page), flags=re.MULTILINE)
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - {"--nproc-per-node"}  # torchrun's
    assert flags <= set(re.findall(r"--[\w-]+", help_text))


@every_page
def test_links_lead_to_files_and_headings(page):
    for link, anchor in re.findall(r"\]\((?!https?:|<)([^)#]*)#?([\w-]*)\)", text_of(page)):
        target = (ROOT / page).parent / link if link else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), anchor


def test_tests_that_pages_name_exist():
    written = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
    tests = set(re.findall(r"^def (test_\w+)", written, re.MULTILINE))
    named = {page: set(re.findall(r"`(test_\w+)`", text_of(page))) - tests for page in PAGES}
    assert {page: names for page, names in named.items() if names} == {}


def test_every_trap_has_a_test_or_says_what_to_do():
    traps = re.split(r"^### ", text_of("docs/traps.md"), flags=re.MULTILINE)[1:]
    assert len(traps) > 30
    assert sum("Kept by `test_" in trap for trap in traps) > 25


# Pages on dictionaries: one for each preset.


@every_preset
def test_every_preset_has_a_page_with_a_command_and_its_flags(name):
    row = rf"^\| \[`{re.escape(name)}`\]\((.*?)\)"
    (link,) = re.findall(row, text_of("docs/dictionaries/index.md"), re.MULTILINE)
    page = f"docs/dictionaries/{link}"
    runs = [parse(arguments).run for arguments in commands(page)]
    embedded = [run for run in runs if run.base == "tl_crosscoder/world-base"]
    assert name in [preset_name(run.preset) for run in embedded]
    for option in fields(PRESETS[name]):
        # `--k` is not named by `--k-initial`.
        flag = option.name.replace("_", "-")
        assert re.search(rf"--(no-)?{flag}(?![\w-])", text_of(page)), flag


@pytest.mark.parametrize("page", DICTIONARIES)
def test_commands_name_a_recipe_and_sites_that_go_together(page):
    for arguments in commands(page):
        run = parse(arguments).run
        recipe_of(run.preset, n_steps=1000)
        assert sites_of(run)


# Pages that list what the code declares.


def test_every_column_mode_and_order_is_explained():
    page = text_of("docs/interventions.md")
    columns = [f.name for f in fields(CausalRow)]
    columns = columns[columns.index("share") :]
    assert [c for c in columns if f"`{c}`" not in page] == []
    assert [m for m in Mode.__args__ if f"| `{m}`" not in page] == []
    orders = text_of("docs/measures.md")
    assert [o for o in Order.__args__ if f"| `{o}`" not in orders] == []


def test_yaml_on_the_page_of_data_is_a_mixture_and_a_sweep():
    mixture, changes = (yaml.safe_load(block) for block in blocks("docs/data.md", "yaml"))
    sources = [TextSource.from_mapping(m, name="data.md") for m in mixture["mixture"]]
    assert sum(s.weight for s in sources) == pytest.approx(1)
    run = RunConfig(base="b", finetuned="f", hook_name="h", text="t", output="o")
    assert len(sweep(run, changes)) == 3


def test_tables_of_measurements_are_those_of_the_results():
    from measured_tables import PAGES, TABLES, filled

    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    for page in pages:
        assert filled(page) == page, "run `python docs/measured_tables.py`"
    assert {*re.findall(r"<!-- table: ([\w-]+) -->", "".join(pages))} == {*TABLES}


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} <= named


def test_every_invariant_is_cited_and_no_other():
    stated = re.findall(r"^- \*\*([A-Z]\d+) ", text_of("docs/spec.md"), re.MULTILINE)
    assert len(set(stated)) == len(stated)
    cited: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for line in re.findall(r"# spec: ([A-Z\d ]+)$", path.read_text(encoding="utf-8"), re.M):
            cited |= {*line.split()}
    assert cited == {*stated}


def test_the_readme_has_no_placeholders():
    assert not re.findall(r"^[A-Z_]{6,}$", text_of("README.md"), re.MULTILINE)


def test_messages_on_the_page_of_errors_are_those_of_the_package():
    """Strings of the source, put together where they are written in parts."""
    source = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tl_crosscoder").rglob("*.py"))
    source = re.sub(r'["\']\s*\n\s*f?["\']', "", source)
    rows = [line for line in text_of("docs/errors.md").splitlines() if line.startswith("| `")]
    said = [message for row in rows for message in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(said) > 15
    assert [message for message in said if message not in source] == []
