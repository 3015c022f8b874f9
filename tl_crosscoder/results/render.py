"""One renderer of results: sections of facts and columns as text for a terminal, or as HTML.

Contract: `Section`s in, columns of one length by field name; out come labels and digits of
`MEASURES`, NaN as a dash, numbers to the right, intervals folded into their column. Text is at most
`WIDTH` columns wide; HTML has every text escaped, no script and no colour of its own, so it is as
light or dark as the page. Limit: the first `Section.n_rows` rows, and cells of `_LONGEST` columns
in text.
"""

import html
import math
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

from markupsafe import Markup

from tl_crosscoder.results.measures import MEASURES, Measure

WIDTH = 100
N_ROWS = 50
NONE = "\N{EN DASH}"
_INDENT = " " * 6
_LONGEST = 48
_MOST_CHARACTERS, _MOST_ITEMS = 4000, 12
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_INTERVALS = {"off_target_kl": "off_target"}
"""Stems of the columns `_low` and `_high` where they are not the column's own name."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table with a line above it and notes below it: what results and core objects give."""

    title: str = ""
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Values by field name, all of one length; columns without a value are named below."""
    examples: Sequence[Sequence[Any]] = ()
    """For each row tokens with `before`, `token`, `after` and `source`: lines below it in text, in
    HTML the first in a cell."""
    notes: Sequence[str] = ()
    n_rows: int | None = N_ROWS
    """Rows that are shown at most; None is all."""


def as_text(sections: Iterable[Section], *, is_whole: bool = False) -> str:
    """Sections for a terminal; with `is_whole` all rows of them."""
    blocks = []
    for section in sections:
        n_rows = None if is_whole else section.n_rows
        table = [table_text(section, n_rows=n_rows)] if section.columns else []
        title = [wrapped(visible(section.title))] if section.title else []
        blocks.append("\n".join([*title, *table, *map(wrapped, map(visible, section.notes))]))
    return "\n\n".join(blocks)


def as_html(sections: Iterable[Section]) -> str:
    """Sections as one fragment for a notebook."""
    parts = [part for section in sections for part in _section_html(section)]
    return str(Markup('<div class="tlx">{}{}</div>').format(_STYLE, Markup("").join(parts)))


def visible(value: object) -> str:
    """Text with control characters, and marks that turn its direction, as their escapes."""
    return "".join(
        repr(c)[1:-1] if c in _BIDI or unicodedata.category(c) in ("Cc", "Cs") else c
        for c in str(value)
    )


def escaped(text: str) -> str:
    """Text as HTML that stands between tags; quotes stay, since plotly does not decode them."""
    return html.escape(text, quote=False)


def wrapped(text: str) -> str:
    """A paragraph, its further lines indented by two more columns."""
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


# --- values as words ------------------------------------------------------------------------------


def plain(value: Any) -> str:
    """A value as words: lists are cut, NaN is a dash."""
    if _is_none(value):
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return _listed(f"{k}: {plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return _listed(str(v) if isinstance(v, int) else plain(v) for v in value)
    return _first(visible(value))


def _listed(items: Iterable[str]) -> str:
    items = [*items]
    rest = f", … ({len(items)} in all)" if len(items) > _MOST_ITEMS else ""
    return _first(", ".join(items[:_MOST_ITEMS])) + rest or NONE


def _first(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def _measure(name: str) -> Measure:
    """Of `field@10` the heading is 10. Counts in tensors are floats."""
    field, _, place = name.partition("@")
    if field and place and field in MEASURES:
        return replace(MEASURES[field], symbol=place)
    return MEASURES.get(name) or Measure(name, form=",.0f" if name.startswith("n_") else None)


def _formatter(form: str | None, values: Iterable[Any]) -> Callable[[Any], str]:
    """One format for a column of numbers: its own, or thousands, or three digits."""
    numbers = [v for v in values if not _is_none(v)]
    if form is None or form == "token":
        sizes = [abs(v) for v in numbers if v]
        if all(isinstance(v, int) for v in numbers):
            form = ",.0f"
        else:
            form = ".3f" if all(1e-3 <= size < 1e4 for size in sizes) else ".3g"
    return lambda value: NONE if _is_none(value) else format(value, form)


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- columns --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A column ready to be laid out."""

    label: str
    title: str
    kind: Literal["number", "token", "text"]
    texts: list[str]


def _shown_columns(
    columns: Mapping[str, Sequence[Any]], n_rows: int | None
) -> tuple[list[_Column], list[str]]:
    """Columns with a value, intervals folded into theirs, and the notes on what is left out."""
    n = max(map(len, columns.values()), default=0)
    if not n:
        return [], ["no rows"]
    bounds = _bounds(columns)
    folded = {name for pair in bounds.values() for name in pair}
    own = [name for name in columns if name not in folded]
    empty = [name for name in own if all(map(_is_none, columns[name]))]
    # A latent without norms has no class, though the field is "other".
    if "relative_decoder_norm" in empty and "latent_class" in own:
        empty.append("latent_class")
    cut_off = {name: values[:n_rows] for name, values in columns.items()}
    shown = [_shown(name, cut_off, bounds.get(name)) for name in own if name not in empty]
    notes = [
        f"{n_rows} of {n:,} rows; to_frame() has all" if n_rows is not None and n > n_rows else "",
        f"without values: {', '.join(visible(_measure(n).label) for n in empty)}" if empty else "",
    ]
    return shown, [line for line in notes if line]


def row_texts(columns: Mapping[str, Sequence[Any]]) -> list[list[tuple[str, str]]]:
    """Labels and texts of each row, for a text about one row."""
    shown, _ = _shown_columns(columns, None)
    rows = zip(*(column.texts for column in shown), strict=True)
    return [[(c.label, text) for c, text in zip(shown, row, strict=True)] for row in rows]


def _bounds(columns: Mapping[str, Sequence[Any]]) -> dict[str, tuple[str, str]]:
    """Columns with an interval, and the names of its ends."""
    stems = {name: _INTERVALS.get(name, name) for name in columns}
    pairs = {name: (f"{stem}_low", f"{stem}_high") for name, stem in stems.items()}
    return {name: pair for name, pair in pairs.items() if columns.keys() >= {*pair}}


def _shown(
    name: str, columns: Mapping[str, Sequence[Any]], bounds: tuple[str, str] | None
) -> _Column:
    measure, values = _measure(name), columns[name]
    is_numeric = all(_is_none(v) or _is_number(v) for v in values)
    shown = _formatter(measure.form, values) if is_numeric else plain
    texts = [v if hasattr(v, "__html__") else shown(v) for v in values]
    if bounds:
        parts = zip(texts, values, *(columns[b] for b in bounds), strict=True)
        texts = [
            t if _is_none(v) or _is_none(a) or _is_none(b) else f"{t} [{shown(a)}, {shown(b)}]"
            for t, v, a, b in parts
        ]
    return _Column(
        label=visible(measure.label),
        title=measure.explanation + (" With its 95 % interval." if bounds else ""),
        kind="number" if is_numeric else "token" if measure.form == "token" else "text",
        texts=texts,
    )


# --- text -----------------------------------------------------------------------------------------


def table_text(section: Section, *, n_rows: int | None = N_ROWS) -> str:
    """The table of a section; columns that do not fit go below, with the first column again."""
    shown, notes = _shown_columns(section.columns, n_rows)
    columns = [_cells(column) for column in shown]
    lines: list[str] = []
    for block in _blocks(columns):
        height = max(len(head) for head, _ in block)
        heads = [[" " * n_columns(head[0])] * (height - len(head)) + head for head, _ in block]
        lines += ([""] if lines else []) + [*map(_line, zip(*heads, strict=True))]
        start = len(lines)
        lines += map(_line, zip(*(cells for _, cells in block), strict=True))
        if block[-1] is columns[-1]:
            for i, examples in reversed([*enumerate(section.examples)]):
                lines[start + i + 1 : start + i + 1] = map(in_context, examples)
    return "\n".join([*lines, *map(wrapped, notes)])


def _cells(column: _Column) -> tuple[list[str], list[str]]:
    """Lines of the heading and cells, all of one width; a heading wider than its cells is wrapped.

    >>> _cells(_Column(label="p (Holm)", title="", kind="number", texts=["0.01"]))
    (['     p', '(Holm)'], ['  0.01'])
    """
    texts = ["-" if text == NONE else cut(text, _LONGEST) for text in column.texts]
    words = (min(n_columns(word), _LONGEST) for word in column.label.split())
    width = max([1, *map(n_columns, texts), *words])
    head = textwrap.wrap(column.label, width, break_on_hyphens=False) or [""]

    def padded(text: str) -> str:
        space = " " * (width - n_columns(text))
        return space + text if column.kind == "number" else text + space

    return [*map(padded, head)], [*map(padded, texts)]


def _blocks(columns: Sequence[tuple[list[str], list[str]]]) -> Iterator[list[Any]]:
    """Columns side by side as far as they fit."""
    block: list[Any] = []
    for column in columns:
        if block and sum(n_columns(head[0]) + 2 for head, _ in [*block, column]) > WIDTH:
            yield block
            block = [columns[0]]
        block.append(column)
    if block:
        yield block


def _line(row: Sequence[str]) -> str:
    return "  ".join(["", *row]).rstrip()


def in_context(example: Any) -> str:
    """One line: the end of the context, the token in brackets, and what follows."""
    token = visible(example.token)
    before, after = (visible(" ".join(t.split())) for t in (example.before, example.after))
    gap = " " if example.before[-1:].isspace() or token[:1].isspace() else ""
    gap_after = " " if example.after[:1].isspace() or example.token[-1:].isspace() else ""
    token, source = cut(token.strip() or token, 40), cut(visible(example.source), 30)
    space = WIDTH - len(_INDENT) - n_columns(f"{gap}[{token}]   ({source})")
    before = cut(before[::-1], space * 2 // 3)[::-1]
    after = cut(after, space - n_columns(before))
    return f"{_INDENT}{before}{gap}[{token}]{gap_after}{after}  ({source})"


def n_columns(text: str) -> int:
    """Width in a terminal: two for a CJK character or an emoji, none for a combining mark."""
    marks = sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(c) in "WF" for c in text)


def cut(text: str, width: int) -> str:
    """The start of `text` that fits into `width` columns, with an ellipsis for the rest."""
    if n_columns(text) <= width:
        return text
    ends = accumulate(n_columns(c) for c in text)
    return "".join(c for c, end in zip(text, ends, strict=True) if end < width) + "…"


# --- HTML -----------------------------------------------------------------------------------------

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
    "div.tlx th.tlx-n,div.tlx td.tlx-n{text-align:right}div.tlx td.tlx-n{white-space:nowrap}"
    "</style>"
)
_CLASSES = {"number": "tlx-n", "token": "tlx-t", "text": ""}


def table_html(columns: Mapping[str, Sequence[Any]], *, n_rows: int | None = N_ROWS) -> Markup:
    """The table alone, and notes on what is left out."""
    shown, notes = _shown_columns(columns, n_rows)
    rows = zip(*map(_cells_html, shown), strict=True)
    table = Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(
        Markup("").join(map(_head, shown)),
        Markup("").join(Markup("<tr>{}</tr>").format(Markup("").join(row)) for row in rows),
    )
    return Markup("").join([*([table] if shown else []), *map(_note, notes)])


def _section_html(section: Section) -> Iterator[Markup]:
    if section.title:
        yield Markup("<p>{}</p>").format(visible(section.title))
    if section.columns:
        columns = dict(section.columns)
        if section.examples:
            columns["example"] = [_in_context_html(e[0]) if e else None for e in section.examples]
        yield table_html(columns, n_rows=section.n_rows)
    yield from map(_note, section.notes)


def _in_context_html(example: Any) -> Markup:
    parts = map(visible, (example.before, example.token, example.after))
    return Markup("{}<b><u>{}</u></b>{}").format(*parts)


def _note(text: str) -> Markup:
    return Markup('<p class="tlx-note">{}</p>').format(visible(text))


def _head(column: _Column) -> Markup:
    title = Markup(' title="{}"').format(column.title) if column.title else ""
    side = "" if column.kind == "number" else Markup(' style="text-align:left"')
    values = _CLASSES[column.kind], side, title, column.label
    return Markup('<th scope="col" class="{}"{}{}>{}</th>').format(*values)


def _cells_html(column: _Column) -> list[Markup]:
    # Jupyter and nbconvert push text to the right, and GitHub leaves styles out.
    side = "" if column.kind == "number" else Markup(' style="text-align:left"')
    kind = _CLASSES[column.kind]
    return [Markup('<td class="{}"{}>{}</td>').format(kind, side, text) for text in column.texts]
