"""Rows of a benchmark: one JSON file that grows row by row, and the same as a table.

A row is nested plain JSON, some of its fields the key that names it. The file is replaced whole at
every row, so that a killed run keeps what was done, and `resume` goes on from there. Limit: a row
that is read back is not checked against the code that would make it now.
"""

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from tl_crosscoder import files


class ResultFile:
    """The rows of one benchmark at one setting.

    Args:
        path: the JSON file; None keeps nothing.
        settings: what all rows share, as JSON.
        resume: go on with the rows that the file already has.

    Raises:
        ValueError: there are rows and `resume` is off, or they were made at other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        machine = {"machine": platform.machine(), "n_threads": torch.get_num_threads()}
        self.content: dict[str, Any] = {"machine": machine, "settings": dict(settings), "rows": []}
        if path is None or not path.is_file():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        if not resume:
            raise ValueError(
                f"{path} already has {len(found['rows'])} rows. Go on with --resume, choose "
                "another --output, or remove it."
            )
        if found["settings"] != json.loads(json.dumps(self.content["settings"])):
            raise ValueError(
                f"{path} has rows made with {found['settings']}, not {dict(settings)}. Choose "
                "another --output."
            )
        self.content = found

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return self.content["rows"]

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row with these fields; None where it is not done."""
        return next((r for r in self.rows if key.items() <= r.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and write the file."""
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Write the file."""
        if self.path is not None:
            files.write_json(self.path, self.content)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A number of each row; a dash where the row has none."""

    heading: str
    path: str
    """Where in the row it is, such as `reconstruction.fve.base`."""
    spec: str = ".3f"
    """Format, such as `.1%`."""
    align: str = ">"

    def cell(self, row: Mapping[str, Any]) -> str:
        """What the table shows, as wide as the column."""
        value: Any = row
        for step in self.path.split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
        text = "-" if value is None else format(value, self.spec)
        return f"{text:{self.align}{self.width}}"

    @property
    def width(self) -> int:
        """Characters: of the heading, or of a name."""
        return 22 if self.align == "<" else max(6, len(self.heading))


def collect(
    results: ResultFile,
    columns: Sequence[Column],
    keys: Iterable[dict[str, Any]],
    run: Callable[..., dict[str, Any]],
) -> None:
    """Run what the file does not have yet, and print a table of all these rows as they come.

    Where there are several seeds, their means follow.
    """
    print(" ".join(f"{c.heading:{c.align}{c.width}}" for c in columns))
    rows = []
    for key in keys:
        if results.find(key) is None:
            results.add(key | run(**key))
        rows.append(results.find(key))
        print(" ".join(c.cell(rows[-1]) for c in columns), flush=True)
    if len({row["seed"] for row in rows}) > 1:
        print("means over seeds")
        for row in mean_rows(rows, over="seed", by="variant"):
            print(" ".join(c.cell(row) for c in columns))


def mean_rows(rows: Iterable[Mapping[str, Any]], *, over: str, by: str) -> list[dict[str, Any]]:
    """One row for each value of `by`: means over the rows that differ in `over`."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[by], []).append({k: v for k, v in row.items() if k != over})
    return [_mean(group) for group in groups.values()]


def _mean(values: Sequence[Any]) -> Any:
    """Mean of numbers, field by field; None where one of them has none."""
    if isinstance(values[0], Mapping):
        return {k: _mean([v and v.get(k) for v in values]) for k in values[0]}
    if any(v is None for v in values):
        return None
    if isinstance(values[0], (int, float)):
        return fmean(values)
    return values[0] if all(v == values[0] for v in values) else None
