"""The parts of the site that follow from the code and from the rest of the repository.

A hook of mkdocs (`hooks:` in mkdocs.yml): what it fills in is never kept, so it cannot be out of
date. It gives the changelog, the papers' set-ups, results and notebooks their place in the site,
turns links to them accordingly, and writes the command line's help, the glossary of measures and
the index of public names. Formulas (blocks of `math`, in LaTeX) become MathML, which browsers
draw by themselves.
Limits: links are found by their Markdown form `](target)`, in code blocks too; of notebooks the
text and the code are shown, and not what came out.
"""

import contextlib
import io
import logging
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import griffe
import jupytext
import latex2mathml.converter
import measured_tables
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import tl_crosscoder
from tl_crosscoder.cli.main import parse
from tl_crosscoder.config.presets import PRESETS
from tl_crosscoder.results.measures import MEASURES

# It warns of kernels that it does not find on some processors; nothing here is in 4 bits.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ("CHANGELOG.md", "configs/*", "benchmarks/results/*.json", "notebooks/*.ipynb")
"""Files outside docs/ that the site holds too, under the same path."""
COLUMNS = "80"
"""Width of the help: what fits beside the table of contents."""
_FORMULA = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?![a-z]+:|#|/)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside docs/."""
    for pattern in CARRIED:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in notebooks():
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=as_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill the marks in, and let links lead to where files are in the site."""
    source = page.file.src_uri
    if "<!-- help -->" in markdown:
        markdown = markdown.replace("<!-- help -->", command_line())
    if "<!-- names -->" in markdown:
        markdown = markdown.replace("<!-- names -->", index_of_names())
    if "<!-- measures -->" in markdown:
        markdown = markdown.replace("<!-- measures -->", table_of_measures())
    if "<!-- notebooks -->" in markdown:
        markdown = markdown.replace("<!-- notebooks -->", index_of_notebooks())
    markdown = _FORMULA.sub(lambda found: as_mathml(found[1]), measured_tables.filled(markdown))
    return _LINK.sub(lambda found: f"]({in_site(found[1], source)}", markdown)


def as_mathml(formula: str) -> str:
    """A formula as a block of HTML.

    >>> as_mathml("a = b")[-59:]
    '<mi>a</mi><mo>&#x0003D;</mo><mi>b</mi></mrow></math></div>'
    """
    found = latex2mathml.converter.convert(formula.strip(), display="block")
    if "\\" in found:
        raise ValueError(f"a command that latex2mathml does not know is in the formula {formula}")
    return f'<div class="formula">{found}</div>'


def in_site(target: str, source: str) -> str:
    """A link of a file of the repository, relative to its page in the site.

    >>> in_site("../../configs/README.md", "dictionaries/delta.md")
    '../configs/README.md'
    >>> in_site("docs/data.md", "CHANGELOG.md")
    'data.md'
    """
    is_own = (ROOT / "docs" / source).is_file()
    folder = posixpath.dirname(f"docs/{source}" if is_own else source)
    path = posixpath.normpath(posixpath.join(folder, target)).removeprefix("docs/")
    return posixpath.relpath(path, posixpath.dirname(source) or ".")


def notebooks() -> list[Path]:
    """One file of each, in order: its source in jupytext's percent format, or else itself."""
    both = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("notebooks/*.py")]
    return [path for _, path in sorted({path.stem: path for path in both}.items())]


def as_page(notebook: Path) -> str:
    """Its text and its code; the notebook itself is linked where there is one."""
    parts = [
        # Links between notebooks lead to their pages.
        re.sub(r"\]\(([\w-]+)\.ipynb\)", r"](\1.md)", cell.source)
        if cell.cell_type == "markdown"
        else f"```python\n{cell.source}\n```"
        for cell in jupytext.read(notebook).cells
    ]
    made = notebook.with_suffix(".ipynb")
    if made.is_file():
        parts.insert(1, f"To run it: [{made.name}]({made.name}).")
    return "\n\n".join(parts) + "\n"


def index_of_notebooks() -> str:
    """A line for each: its title, and the first paragraph."""
    lines = []
    for path in notebooks():
        title, about = jupytext.read(path).cells[0].source.split("\n\n")[:2]
        title = title.removeprefix("# ").partition(". ")[2] or title.removeprefix("# ")
        about = about.replace("\n", " ")
        lines.append(f"1. **[{title}](../notebooks/{path.stem}.md)**: {about}")
    return "\n".join(lines)


def table_of_measures() -> str:
    """A row for each measure that has a meaning."""
    lines = ["| name | field | unit | meaning | source |", "|---|---|---|---|---|"]
    for field, measure in MEASURES.items():
        if field and measure.meaning:
            name = f"{measure.name} ({measure.symbol})" if measure.symbol else measure.name
            cells = name, f"`{field}`", measure.unit, measure.meaning, measure.source
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def command_line() -> str:
    """Every verb with its help, as the program prints it; of each preset its own options."""
    own = _help([])
    verbs = _choices(own)
    parts = [f"```output\n{own}```\n"]
    for verb in verbs:
        text = _help([verb])
        parts.append(f"## {verb}\n\n```output\n{text}```\n")
        for below in _choices(text):
            text = _help([verb, below])
            if below in PRESETS:
                text = _entries(text, [field.name for field in fields(PRESETS[below])])
            parts.append(f"### {verb} {below}\n\n```output\n{text}```\n")
    return "\n".join(parts)


def _entries(help_text: str, options: Sequence[str]) -> str:
    """The entries of these options in a verb's help."""
    flags = {f"--{option.replace('_', '-')}" for option in options}
    kept, is_own = [], False
    for line in help_text.splitlines():
        words = line.split()
        if not words:  # the end of a group
            is_own = False
        elif words[0].startswith("--") and words[0].strip("-"):
            is_own = words[0].rstrip(",") in flags
        if is_own:
            kept.append(line)
    return "\n".join(kept) + "\n"


def _help(verb: list[str]) -> str:
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": COLUMNS, "NO_COLOR": "1"}),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        parse([*verb, "--help"])
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines()) + "\n"


def _choices(help_text: str) -> list[str]:
    """The verbs below: the choice that ends the line of usage."""
    usage = help_text.partition("\n\n")[0]
    found = re.search(r"\{([^{}]*)\}\]?\s*$", usage)
    return re.sub(r"\s", "", found[1]).split(",") if found else []


def index_of_names() -> str:
    """For each page of the reference a table of the names on it."""
    package = griffe.load("tl_crosscoder", search_paths=[ROOT])
    parts = []
    for page in _reference_pages():
        text = page.read_text(encoding="utf-8")
        title = text.partition("\n")[0].removeprefix("# ")
        parts += [f"\n## [{title}]({page.name})\n", "| name | what |", "|---|---|"]
        for path in documented(text):
            name = path.rpartition(".")[2]
            parts.append(f"| [`{name}`][{path}] | {_first_line(path, package)} |")
    return "\n".join(parts)


def documented(page: str) -> list[str]:
    """The paths that a page of the reference documents."""
    return re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)


def _reference_pages() -> list[Path]:
    """In the order of the navigation, which is that of the configuration file."""
    names = re.findall(r"api/(\w+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return [ROOT / "docs" / "api" / name for name in names if name != "index.md"]


def _first_line(path: str, package: griffe.Object | griffe.Alias) -> str:
    name = path.removeprefix("tl_crosscoder.")
    where = f"{tl_crosscoder._LAZY[name]}.{name}" if name in tl_crosscoder._LAZY else path
    docstring = package[where.removeprefix("tl_crosscoder.")].docstring
    return docstring.value.partition("\n")[0].replace("|", "\\|") if docstring else ""
