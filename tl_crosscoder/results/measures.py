"""Columns of results: what they are called, and their values as words.

Contract: columns of one length by field name in, `Shown` columns out: labels of the field with
their unit, numbers of few digits, NaN as `NONE`, no control character in any text. `html_tables`
and `text_tables` lay them out. Limit: the first `N_ROWS` rows, unless all are asked for.
"""

import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tl_crosscoder.results.tables import Tabular

N_ROWS = 50
NONE = "\N{EN DASH}"
_MOST_CHARACTERS = 4000
_MOST_ITEMS = 12
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


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


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A column ready to be laid out."""

    label: str
    title: str
    kind: Literal["number", "token", "text"]
    texts: list[str]


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
    "finetuned_only": Column("fine-tuned only", "index of a latent", "d"),
    "base_only": Column("base only", "index of a latent", "d"),
    "neighbour": Column("neighbour", "index of a latent", "d"),
    "cosine": Column("cosine", "", "+.2f"),
    "decoder_cosine": Column("cosine", "between the decoder rows of the two models", "+.2f"),
    "encoder_cosine": Column("encoder cosine", "between the encoder columns", "+.2f"),
    "nu_error": Column("nu error", "Latent Scaling: 0 is not in the other model, 1 in both", ".2f"),
    "nu_reconstruction": Column(
        "nu rec.", "Latent Scaling of the reconstruction: 0 is not in the other model", ".2f"
    ),
    "explained_difference": Column(
        "says", "share of the variance of the difference that goes if only it speaks", _SHARE
    ),
    "said": Column("says here", "share of the difference on these tokens that goes", _SHARE),
    "explained_difference_drop": Column(
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
    "n_latents": Column("n latents", "how many; 0 where it is none of them", _COUNT),
    "n_tokens": Column("n tokens", "how many", _COUNT),
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

DIRECTIONS = {
    "finetuned": "of the fine-tuned rows",
    "base": "of the base rows",
    "random": "random directions",
    "other": "other latents' rows",
}
"""Of Latent Scaling, and its controls."""


def result_columns(result: "Tabular") -> tuple[list[str], Mapping[str, Sequence[Any]]]:
    """What holds for all rows of a result, in words, and its columns: of tensors with an index."""
    columns, about = result.columns(), result.about()
    facts = [f"{name} {plain(value)}" for name, value in about.items() if name != "tensors"]
    if "tensors" not in about:
        return facts, columns
    return facts, {"": range(len(next(iter(columns.values()), ()))), **columns}


def shown_columns(
    columns: Mapping[str, Sequence[Any]], *, n_rows: int | None = N_ROWS
) -> tuple[list[Shown], list[str]]:
    """Columns with a value, intervals folded into theirs, and what there is to say below.

    Args:
        columns: by field name, all of one length; `Markup` in them stays as it is.
        n_rows: at most so many; None is all.
    """
    n = max(map(len, columns.values()), default=0)
    if not n:
        return [], ["no rows"]
    bounds = _bounds(columns)
    folded = {name for pair in bounds.values() for name in pair}
    own = [name for name in columns if name not in folded]
    empty = [name for name in own if all(map(_is_none, columns[name]))]
    # A latent without norms has no class, though the field says "other".
    if "relative_decoder_norm" in empty and "latent_class" in own:
        empty.append("latent_class")
    cut = {name: values[:n_rows] for name, values in columns.items()}
    shown = [_shown(name, cut, bounds.get(name)) for name in own if name not in empty]
    said = [
        f"{n_rows} of {n:,} rows; to_frame() has all" if n_rows is not None and n > n_rows else "",
        f"without values: {', '.join(map(visible, empty))}" if empty else "",
    ]
    return shown, [line for line in said if line]


def shown_value(name: str, value: Any) -> str:
    """One value of a field, in the field's own digits."""
    column = _column(name)
    return _formatter(column.form, [value])(value) if _is_number(value) else plain(value)


def visible(value: object) -> str:
    """Text with control characters, and marks that turn its direction, as their escapes."""
    return "".join(
        repr(c)[1:-1] if c in _BIDI or unicodedata.category(c) in ("Cc", "Cs") else c
        for c in str(value)
    )


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
    return _cut(visible(value))


def _column(name: str) -> Column:
    """Counts in tensors are floats."""
    return COLUMNS.get(name) or Column(name, form=_COUNT if name.startswith("n_") else None)


def _shown(
    name: str, columns: Mapping[str, Sequence[Any]], bounds: tuple[str, str] | None
) -> Shown:
    column, values = _column(name), columns[name]
    is_numeric = all(_is_none(v) or _is_number(v) for v in values)
    shown = _formatter(column.form, values) if is_numeric else plain
    texts = [v if hasattr(v, "__html__") else shown(v) for v in values]
    if bounds:
        low, high = (map(shown, columns[b]) for b in bounds)
        parts = zip(texts, values, low, high, strict=True)
        texts = [t if _is_none(v) else f"{t} [{a}, {b}]" for t, v, a, b in parts]
    return Shown(
        label=visible(column.label),
        title=column.title + ("; 95 % interval" if bounds else ""),
        kind="number" if is_numeric else "token" if column.form == "token" else "text",
        texts=texts,
    )


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
    return lambda value: NONE if _is_none(value) else format(value, form)


def _bounds(columns: Mapping[str, Sequence[Any]]) -> dict[str, tuple[str, str]]:
    """Columns with an interval, and the names of its ends."""
    stems = {name: _column(name).interval or name for name in columns}
    pairs = {name: (f"{stem}_low", f"{stem}_high") for name, stem in stems.items()}
    return {name: pair for name, pair in pairs.items() if columns.keys() >= {*pair}}


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _listed(items: Iterable[str]) -> str:
    items = [*items]
    rest = f", … ({len(items)} in all)" if len(items) > _MOST_ITEMS else ""
    return _cut(", ".join(items[:_MOST_ITEMS])) + rest or NONE


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
