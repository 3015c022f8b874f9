"""The pages on dictionaries: every preset and option is there, and what they show can be run."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import tl_crosscoder
from tl_crosscoder.cli.main import Train, parse
from tl_crosscoder.config.presets import PRESETS, preset_name
from tl_crosscoder.models.site import sites_of
from tl_crosscoder.train.presets import recipe_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "dictionaries"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.md"))}
every_page = pytest.mark.parametrize("page", PAGES)
every_preset = pytest.mark.parametrize("name", PRESETS)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The arguments of every `tl-crosscoder` line; a backslash goes on to the next line."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("tl-crosscoder ")]


def trained(arguments: list[str]) -> Train:
    verb = parse(arguments)
    assert isinstance(verb, Train)
    return verb


def page_of(name: str) -> str:
    """The page that the row of a preset in the index links to."""
    (page,) = re.findall(rf"^\| \[`{re.escape(name)}`\]\((.*?)\)", PAGES["index.md"], re.MULTILINE)
    return page


def names_flag(text: str, option: str) -> bool:
    """`--k` is not named by `--k-initial`."""
    flag = option.replace("_", "-")
    return re.search(rf"--(no-)?{flag}(?![\w-])", text) is not None


@every_preset
def test_every_preset_has_a_page_with_a_line_for_it(name):
    page = page_of(name)
    runs = [trained(arguments).run for arguments in commands(page)]
    assert name in [
        preset_name(run.preset) for run in runs if run.base == "tl_crosscoder/world-base"
    ]


@every_preset
def test_the_page_of_a_preset_names_its_flags(name):
    options = [f.name for f in fields(PRESETS[name])]
    assert [o for o in options if not names_flag(PAGES[page_of(name)], o)] == []


@every_page
def test_commands_name_a_recipe_and_sites_that_go_together(page):
    for arguments in commands(page):
        run = trained(arguments).run
        recipe_of(run.preset, n_steps=1000)
        assert sites_of(run)


@every_page
def test_flags_in_the_text_are_flags_of_the_command_line(page, capsys):
    for verb in (*(["train", name] for name in PRESETS), ["analyze"], ["publish"]):
        with pytest.raises(SystemExit):
            parse([*verb, "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGES[page])) <= known


@every_page
def test_python_compiles_and_what_it_asserts_is_so(page):
    for code in blocks(page, "python"):
        compiled = compile(code, page, "exec")
        assert set(re.findall(r"\btlc\.(\w+)", code)) <= set(tl_crosscoder.__all__)
        if "assert " in code:
            exec(compiled, {})


@every_page
def test_relative_links_lead_to_pages(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", PAGES[page])
    assert [link for link in links if not (FOLDER / link).is_file()] == []


def test_every_page_is_linked_from_the_index():
    assert set(PAGES) - set(re.findall(r"\(([\w-]+\.md)\)", PAGES["index.md"])) == {"index.md"}


def test_tests_that_are_named_exist():
    named = set(re.findall(r"`(test_\w+)`", "".join(PAGES.values())))
    written = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
    assert named
    assert named <= set(re.findall(r"^def (test_\w+)", written, re.MULTILINE))
