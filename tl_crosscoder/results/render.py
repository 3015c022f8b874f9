"""Results as plain text, at most `WIDTH` columns wide: what `print` gives of a table.

Contract: columns of one length in (see `result_columns`), aligned lines out, numbers to the right;
columns that do not fit go below, each block with the first column again. Limit: long texts are cut.

Tables as HTML for notebooks: what the `_repr_html_` of results gives.

Contract: columns of one length in, one fragment out: all text escaped, numbers to the right, labels
of the field with their unit on hover (`result_columns`). No script and no colour of its own, so it
is as light or dark as the page. Limit: the first `N_ROWS` rows are shown.
"""

import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tl_crosscoder.results.measures import (
    N_ROWS,
    NONE,
    Shown,
    result_columns,
    shown_columns,
    visible,
)

if TYPE_CHECKING:
    from tl_crosscoder.results.tables import Tabular

WIDTH = 100
N_OF_TENSORS = 10
"""Rows of a table of tensors, which has a row a latent and many columns."""
_LONGEST = 48
"""Columns of the widest cell."""


def result_text(result: "Tabular", *, n_rows: int | None = N_ROWS) -> str:
    """A result with what holds for all of its rows; so many of them, or all (None)."""
    facts, columns = result_columns(result)
    n_rows = N_OF_TENSORS if "" in columns else n_rows
    about = ": ".join([type(result).__name__, *([", ".join(facts)] if facts else [])])
    return f"{wrapped(about)}\n\n{table_text(columns, n_rows=n_rows)}"


def table_text(columns: Mapping[str, Sequence[Any]], *, n_rows: int | None = N_ROWS) -> str:
    """Columns by field name; those without a value are named below, and so is what is cut off."""
    shown, said = shown_columns(columns, n_rows=n_rows)
    cells = [_cells(column) for column in shown]
    blocks = ["\n".join(map(_line, zip(*block, strict=True))) for block in _blocks(cells)]
    return "\n\n".join([*blocks, *map(wrapped, said)])


def _cells(column: Shown) -> list[str]:
    """Of one width, the label first."""
    texts = ["-" if text == NONE else cut(text, _LONGEST) for text in column.texts]
    texts = [column.label, *texts]
    width = max(map(n_columns, texts))
    room = (" " * (width - n_columns(text)) for text in texts)
    is_number = column.kind == "number"
    return [r + t if is_number else t + r for r, t in zip(room, texts, strict=True)]


def _blocks(cells: Sequence[list[str]]) -> list[list[list[str]]]:
    """Columns side by side as far as they fit."""
    blocks: list[list[list[str]]] = []
    left = 0
    for column in cells:
        width = n_columns(column[0]) + 2
        if not blocks or width > left:
            first = [cells[0]] if blocks else []
            blocks.append(first)
            left = WIDTH - sum(n_columns(each[0]) + 2 for each in first)
        blocks[-1].append(column)
        left -= width
    return blocks


def _line(row: Sequence[str]) -> str:
    return "  ".join(["", *row]).rstrip()


def wrapped(text: str) -> str:
    """A paragraph, its further lines indented."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ")


def n_columns(text: str) -> int:
    """Width in a terminal: two for a CJK character or an emoji, none for a combining mark."""
    marks = sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(c) in "WF" for c in text)


def cut(text: str, room: int) -> str:
    """The start of `text` that fits into `room` columns, with an ellipsis for the rest."""
    if n_columns(text) <= room:
        return text
    ends = accumulate(n_columns(c) for c in text)
    return "".join(c for c, end in zip(text, ends, strict=True) if end < room) + "…"


_STYLE = Markup(
    "<style>"
    "div.tlx{overflow-x:auto;margin:.5em 0}"
    "div.tlx p{margin:.4em 0}div.tlx p.tlx-note{opacity:.75}"
    "div.tlx table{border-collapse:collapse;border:0;margin:.3em 0;"
    "font-variant-numeric:tabular-nums}"
    "div.tlx th,div.tlx td{padding:.2em .6em;border:0;text-align:left;vertical-align:baseline}"
    "div.tlx thead th{border-bottom:1px solid rgba(128,128,128,.7);vertical-align:bottom}"
    "div.tlx th[title]{cursor:help}"
    "div.tlx tbody td{border-bottom:1px solid rgba(128,128,128,.25)}"
    "div.tlx td{white-space:pre-wrap}div.tlx td.tlx-t{font-family:monospace}"
    "div.tlx th.tlx-n,div.tlx td.tlx-n{text-align:right;white-space:nowrap}"
    "</style>"
)
_CLASSES = {"number": "tlx-n", "token": "tlx-t", "text": ""}


def result_html(result: "Tabular") -> str:
    """A result with what holds for all of its rows."""
    facts, columns = result_columns(result)
    return box(note(" · ".join([type(result).__name__, *facts])), table(columns))


def box(*parts: str) -> str:
    """Parts one below the other, with the one style; a part is escaped unless it is `Markup`."""
    return str(Markup('<div class="tlx">{}{}</div>').format(_STYLE, Markup("").join(parts)))


def note(text: str) -> Markup:
    """A line of small print."""
    return Markup('<p class="tlx-note">{}</p>').format(visible(text))


def heading(text: str) -> Markup:
    """A line above a table."""
    return Markup("<p><b>{}</b></p>").format(visible(text))


def table(columns: Mapping[str, Sequence[Any]]) -> Markup:
    """Columns by field name; those without a value are named below, and so is what is cut off."""
    shown, said = shown_columns(columns)
    notes = Markup("").join(map(note, said))
    if not shown:
        return notes
    rows = zip(*map(_cells_html_tables, shown), strict=True)
    made = Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(
        Markup("").join(map(_head, shown)),
        Markup("").join(Markup("<tr>{}</tr>").format(Markup("").join(row)) for row in rows),
    )
    return made + notes


def _head(column: Shown) -> Markup:
    title = Markup(' title="{}"').format(column.title) if column.title else ""
    text = _CLASSES[column.kind], title, column.label
    return Markup('<th scope="col" class="{}"{}>{}</th>').format(*text)


def _cells_html_tables(column: Shown) -> list[Markup]:
    kind = _CLASSES[column.kind]
    return [Markup('<td class="{}">{}</td>').format(kind, text) for text in column.texts]
