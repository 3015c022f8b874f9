"""Every invariant of docs/spec.md is cited by a test, and no test cites one that is not there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_invariant_is_cited_and_no_other():
    page = (ROOT / "docs/spec.md").read_text(encoding="utf-8")
    stated = re.findall(r"^- \*\*([A-Z]\d+) ", page, re.M)
    assert len(set(stated)) == len(stated)
    cited: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for line in re.findall(r"# spec: ([A-Z\d ]+)$", path.read_text(encoding="utf-8"), re.M):
            cited |= {*line.split()}
    assert cited == {*stated}
