"""The answer: what changed, in a few lines, before any number of the dictionary.

Contract: read from a run's folder; how much there is to find, the changes, and the noise floor,
first of all where the answer does not clear it. Nothing is measured here. Limit: of a run in which
nothing has been looked for there is none.
"""

from pathlib import Path

from tl_crosscoder.files import CHANGES_NAME, FLOOR_NAME, WATERFALL_NAME
from tl_crosscoder.interventions.changes_result import Changes
from tl_crosscoder.interventions.waterfall import Waterfall
from tl_crosscoder.results.render import Section, as_text
from tl_crosscoder.run.floor import Floor

TITLE = "What changed"


def answer_sections(folder: Path) -> list[Section]:
    """The answer as the first section of a run; none where it has not been looked for."""
    lines, problems = [], []
    try:
        if (folder / WATERFALL_NAME).is_file():
            lines.append(Waterfall.load(folder / WATERFALL_NAME).line())
        if (folder / CHANGES_NAME).is_file():
            changes = Changes.load(folder / CHANGES_NAME)
            own = changes.lines()
            # Where there is nothing, that is said first.
            lines = [*lines, *own] if changes.found else [*own, *lines]
        if (folder / FLOOR_NAME).is_file():
            floor = Floor.load(folder / FLOOR_NAME)
            lines = [*filter(None, [floor.warning()]), *lines, *floor.lines()]
    except ValueError as error:
        problems.append(f"{error} Look again with `tl-crosscoder changes`.")
    return [Section(title=TITLE, notes=[*lines, *problems])] if lines or problems else []


def with_answer(folder: Path, rest: str) -> str:
    """The answer for a terminal above what else is shown of a run."""
    answer = as_text(answer_sections(folder))
    return f"{answer}\n\n{rest}" if answer else rest
