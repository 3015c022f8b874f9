"""Tables as HTML for notebooks: what the `_repr_html_` of results gives.

Contract: columns of one length in, one fragment out: all text escaped, numbers to the right, labels
of the field with their unit on hover (`result_columns`). No script and no colour of its own, so it
is as light or dark as the page. Limit: the first `N_ROWS` rows are shown.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tl_crosscoder.result_columns import Shown, result_columns, shown_columns, visible

if TYPE_CHECKING:
    from tl_crosscoder.tables import Tabular

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
    rows = zip(*map(_cells, shown), strict=True)
    made = Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(
        Markup("").join(map(_head, shown)),
        Markup("").join(Markup("<tr>{}</tr>").format(Markup("").join(row)) for row in rows),
    )
    return made + notes


def _head(column: Shown) -> Markup:
    title = Markup(' title="{}"').format(column.title) if column.title else ""
    text = _CLASSES[column.kind], title, column.label
    return Markup('<th scope="col" class="{}"{}>{}</th>').format(*text)


def _cells(column: Shown) -> list[Markup]:
    kind = _CLASSES[column.kind]
    return [Markup('<td class="{}">{}</td>').format(kind, text) for text in column.texts]
