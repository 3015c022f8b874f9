"""Pages of the documentation as tests read them: code, commands, links and headings."""

import re
import shlex
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in [*DOCS.rglob("*.md"), ROOT / "README.md"])
sys.path.append(str(DOCS))  # generate and measured_tables


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Blocks of code in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """Arguments of every `tl-crosscoder` line; a backslash goes on to the next line."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    each = [shlex.split(line, comments=True) for line in lines]
    return [arguments[1:] for arguments in each if arguments[:1] == ["tl-crosscoder"]]


def anchors(page: str) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


def run_python(page: str, in_place: Mapping[str, str]) -> dict:
    """Names that a page's Python leaves, run as one piece with smaller sizes in place.

    Raises:
        AssertionError: if something that should be replaced is not on the page.
    """
    code = "\n".join(blocks(page, "python"))
    for there, here in in_place.items():
        assert there in code, f"{page} no longer holds {there}"
        code = code.replace(there, here)
    names: dict = {}
    exec(compile(code, page, "exec"), names)
    return names
