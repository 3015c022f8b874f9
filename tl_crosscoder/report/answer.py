"""The answer: what changed, in a few lines, before any number of the dictionary.

Contract: read from a run's folder; the changes, how much there is to find, and the noise floor,
first of all where the answer does not clear it. Nothing is measured here. Limit: of a run in which
nothing has been looked for there is none.
"""

from dataclasses import dataclass
from pathlib import Path

from tl_crosscoder.files import CHANGES_NAME, FLOOR_NAME, WATERFALL_NAME
from tl_crosscoder.interventions.changes_result import Change, Changes
from tl_crosscoder.interventions.waterfall import Waterfall
from tl_crosscoder.results.render import Section, as_text
from tl_crosscoder.run.floor import Floor

TITLE = "What changed"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What changed, and what is said around it; nothing where it has not been looked for."""

    before: tuple[str, ...]
    changes: tuple[Change, ...]
    after: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path) -> "Answer":
        """The answer of a run's folder; a file that cannot be read is a sentence in it."""
        before, changes, after = list[str](), (), list[str]()
        try:
            if (folder / WATERFALL_NAME).is_file():
                after.append(Waterfall.load(folder / WATERFALL_NAME).line())
            if (folder / CHANGES_NAME).is_file():
                found = Changes.load(folder / CHANGES_NAME)
                changes = found.found
                if changes:
                    after = [*after, *found.remarks()]
                else:  # that there is nothing is said first
                    before = found.remarks()
            if (folder / FLOOR_NAME).is_file():
                floor = Floor.load(folder / FLOOR_NAME)
                before = [*filter(None, [floor.warning()]), *before]
                after = [*after, *floor.lines()]
        except ValueError as error:
            after = [*after, f"{error} Look again with `tl-crosscoder changes`."]
        return cls(before=tuple(before), changes=changes, after=tuple(after))

    @property
    def lines(self) -> list[str]:
        """All of it as lines."""
        own = (line for change in self.changes for line in change.lines())
        return [*self.before, *own, *self.after]


def answer_sections(folder: Path) -> list[Section]:
    """The answer as the first section of a run; none where it has not been looked for."""
    lines = Answer.load(folder).lines
    return [Section(title=TITLE, notes=lines)] if lines else []


def with_answer(folder: Path, rest: str) -> str:
    """The answer for a terminal above what else is shown of a run."""
    answer = as_text(answer_sections(folder))
    return f"{answer}\n\n{rest}" if answer else rest
