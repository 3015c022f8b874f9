"""Tables as HTML for notebooks: what the `_repr_html_` of results gives.

Contract: columns of one length in, one fragment out: all text escaped, numbers to the right with
few digits, NaN as an en dash, labels of the field with their unit on hover. No script and no colour
of its own, so it is as light or dark as the page. Limit: the first `N_ROWS` rows are shown.
"""

import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from tl_crosscoder.tables import Tabular

N_ROWS = 50
_MOST_CHARACTERS = 4000
_MOST_ITEMS = 12
_NONE = "\N{EN DASH}"
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
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


@dataclass(frozen=True)
class Column:
    """How a column is shown."""

    label: str
    title: str = ""
    """Unit and meaning, on hover."""
    form: str | None = None
    """Format of its numbers; `token` is text whose spaces count; None is found from the values."""
    interval: str | None = None
    """Stem of the columns `_low` and `_high` that belong to it; None is its own name."""


_SHARE, _COUNT, _NUMBER = ".2%", ",.0f", ".3f"
COLUMNS: dict[str, Column] = {
    "": Column("", "index, from 0", "d"),
    # latents
    "place": Column("#", "place in the ranking", _COUNT),
    "latent": Column("latent", "index in the dictionary", "d"),
    "score": Column("score", "R times the share of the difference that it says alone", ".4f"),
    "relative_decoder_norm": Column(
        "R", "relative decoder norm: 1 is the fine-tuned model only, 0 the base only", _NUMBER
    ),
    "delta_norm": Column("Delta-norm", "1 is the fine-tuned model only, 0 the base", _NUMBER),
    "decoder_cosine": Column("cosine", "between the decoder rows of the two models", "+.2f"),
    "encoder_cosine": Column("encoder cosine", "between the encoder columns", "+.2f"),
    "nu_error": Column("nu error", "Latent Scaling: 0 is not in the other model, 1 in both", ".2f"),
    "nu_reconstruction": Column(
        "nu rec.", "Latent Scaling of the reconstruction: 0 is not in the other model", ".2f"
    ),
    "difference_alone": Column(
        "says", "share of the variance of the difference that goes if only it speaks", _SHARE
    ),
    "said": Column("says here", "share of the difference on these tokens that goes", _SHARE),
    "difference_lost_without": Column(
        "lost without", "share of that variance left unexplained besides if only it is silent",
        _SHARE,
    ),
    "n_active": Column("active", "tokens on which it is active", _COUNT),
    "active_share": Column("fires", "share of the tokens on which it is active", _SHARE),
    "template_share": Column("template", "share of these that are of the chat template", ".0%"),
    "latent_class": Column("class", "by Delta-norm"),
    "max_code": Column("max code", "largest code", _NUMBER),
    # tokens
    "token": Column("token", form="token"),
    "token_id": Column("id", "of the token", "d"),
    "example": Column("example", "a token in context", "token"),
    "n_on_token": Column("on it", "examples where the text lies on the token itself", _COUNT),
    "n_near": Column("near", "examples with the text in their window", _COUNT),
    "n_examples": Column("examples", "that are kept of it", _COUNT),
    "is_promoted": Column("promoted", "else suppressed"),
    "rank": Column("rank", "1 is the strongest", _COUNT),
    "logit": Column("logit", "centred over the vocabulary, for a unit of code", _NUMBER),
    "probability": Column("probability", form=".2%"),
    "unpatched_probability": Column("unpatched", "probability without the patch", ".2%"),
    # sites and interventions
    "hook_name": Column("hook point"),
    "n_latents": Column("latents", "how many; 0 where it is none of them", _COUNT),
    "n_tokens": Column("tokens", "how many", _COUNT),
    "n_prompts": Column("prompts", "how many", _COUNT),
    "kl": Column("KL", "to the fine-tuned model, nats a token", _NUMBER),
    "ce": Column("CE", "cross-entropy of the text, nats a token", _NUMBER),
    "recovery": Column("recovery", "1 - KL / KL of the base stream", ".0%"),
    "strength": Column("strength", "of steering, in mean norms of the stream", "g"),
    "value": Column("value", "of the effect under the edit", ".3g"),
    "base": Column("base", "the same of the base model as it is", ".3g"),
    "finetuned": Column("fine-tuned", "the same of the fine-tuned model as it is", ".3g"),
    "share": Column("share", "of the change from base to fine-tuned that goes or comes", ".0%"),
    "random_mean": Column("random", "mean share of random directions", ".0%"),
    "random_high": Column("random 95th", "95th percentile of them", ".0%"),
    "effect_size": Column("effect size", "standard deviations above random directions", ".1f"),
    "p_random": Column("p", "random directions that do as much", ".2g"),
    "p_random_holm": Column("p Holm", "corrected for the number of sets", ".2g"),
    "matched_mean": Column("same rate", "mean share of latents of the same firing rate", ".0%"),
    "p_matched": Column("p same rate", "such latents that do as much", ".2g"),
    "null_mean": Column("null", "mean share of directions of a null pair", ".0%"),
    "off_target_kl": Column(
        "off-target KL", "to the unedited model on neutral text, nats a token", ".4f", "off_target"
    ),
    "random_off_target_kl": Column("random KL", "the same of random directions", ".4f"),
}  # fmt: skip
"""Names, units and digits of the fields of results."""


def result_html(result: "Tabular") -> str:
    """A result with what holds for all of its rows."""
    from tl_crosscoder.tables import TableOfColumns

    columns, about = result.columns(), result.about()
    if isinstance(result, TableOfColumns):
        about.pop("tensors")
        columns = {"": range(len(next(iter(columns.values()), ()))), **columns}
    facts = [type(result).__name__, *(f"{k} {plain(v)}" for k, v in about.items())]
    return box(note(" · ".join(facts)), table(columns))


def box(*parts: str) -> str:
    """Parts one below the other, with the one style; a part is escaped unless it is `Markup`."""
    return str(Markup('<div class="tlx">{}{}</div>').format(_STYLE, Markup("").join(parts)))


def note(text: str) -> Markup:
    """A line of small print."""
    return Markup('<p class="tlx-note">{}</p>').format(visible(text))


def heading(text: str) -> Markup:
    """A line above a table."""
    return Markup("<p><b>{}</b></p>").format(visible(text))


def table(columns: Mapping[str, Sequence[Any]], *, n_rows: int = N_ROWS) -> Markup:
    """Columns by field name; those without a value are named below, and so is what is cut off."""
    n = max(map(len, columns.values()), default=0)
    if not n:
        return note("no rows")
    bounds = _bounds(columns)
    folded = {name for pair in bounds.values() for name in pair}
    own = [name for name in columns if name not in folded]
    empty = [name for name in own if all(map(_is_none, columns[name]))]
    shown = [_shown(name, columns, bounds.get(name), n_rows) for name in own if name not in empty]
    rows = zip(*(cells for _, cells in shown), strict=True)
    made = Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(
        Markup("").join(head for head, _ in shown),
        Markup("").join(Markup("<tr>{}</tr>").format(Markup("").join(row)) for row in rows),
    )
    lines = [
        f"{n_rows} of {n:,} rows; to_frame() has all" if n > n_rows else "",
        f"without values: {', '.join(empty)}" if empty else "",
    ]
    return made + Markup("").join(note(line) for line in lines if line)


def visible(value: object) -> str:
    """Text with control characters, and marks that turn its direction, as their escapes."""
    return "".join(
        repr(c)[1:-1] if c in _BIDI or unicodedata.category(c) in ("Cc", "Cs") else c
        for c in str(value)
    )


def plain(value: Any) -> str:
    """A value as words: lists are cut, NaN is a dash."""
    if _is_none(value):
        return _NONE
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
    return _cut(visible(value))


def _shown(
    name: str,
    columns: Mapping[str, Sequence[Any]],
    bounds: tuple[str, str] | None,
    n_rows: int,
) -> tuple[Markup, list[Markup]]:
    """A column's heading and cells."""
    column, values = COLUMNS.get(name) or Column(name), columns[name][:n_rows]
    is_numeric = all(_is_none(v) or _is_number(v) for v in values)
    shown = _formatter(column.form, values) if is_numeric else plain
    kind = "tlx-n" if is_numeric else "tlx-t" if column.form == "token" else ""
    low, high = ([shown(v) for v in columns[b][:n_rows]] for b in bounds) if bounds else ((), ())
    texts = [v if isinstance(v, Markup) else shown(v) for v in values]
    if bounds:
        parts = zip(texts, values, low, high, strict=True)
        texts = [t if _is_none(v) else f"{t} [{a}, {b}]" for t, v, a, b in parts]
    title = column.title + ("; 95 % interval" if bounds else "")
    head = Markup('<th scope="col" class="{}"{}>{}</th>').format(
        kind, Markup(' title="{}"').format(title) if title else "", visible(column.label)
    )
    return head, [Markup('<td class="{}">{}</td>').format(kind, text) for text in texts]


def _formatter(form: str | None, values: Iterable[Any]) -> Callable[[Any], str]:
    """One format for a column of numbers: its own, or thousands, or three digits."""
    numbers = [v for v in values if not _is_none(v)]
    if form is None or form == "token":
        if all(isinstance(v, int) for v in numbers):
            form = _COUNT
        else:
            sizes = [abs(v) for v in numbers if v]
            is_even = all(1e-3 <= size < 1e4 for size in sizes)
            form = _NUMBER if is_even else ".3g"
    return lambda value: _NONE if _is_none(value) else format(value, form)


def _bounds(columns: Mapping[str, Sequence[Any]]) -> dict[str, tuple[str, str]]:
    """Columns with an interval, and the names of its ends."""
    stems = {name: (COLUMNS.get(name) or Column(name)).interval or name for name in columns}
    pairs = {name: (f"{stem}_low", f"{stem}_high") for name, stem in stems.items()}
    return {name: pair for name, pair in pairs.items() if columns.keys() >= {*pair}}


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _listed(items: Iterable[str]) -> str:
    items = [*items]
    rest = f", … ({len(items)} in all)" if len(items) > _MOST_ITEMS else ""
    return _cut(", ".join(items[:_MOST_ITEMS])) + rest or _NONE


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
