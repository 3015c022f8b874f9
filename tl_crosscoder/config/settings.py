"""`Settings`: dataclasses whose fields keep to the type and the range that they declare.

    lr: PositiveFloat = 1e-3

`checked` looks at every value, however the settings are made: in Python, on the command line, from
YAML or from a record. No torch here: the command line reads settings to print its help. Limit: of
types other than those of settings (mappings, objects) only the class is looked at.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

T = TypeVar("T")

_INVALID: Any = object()
_EXPONENT = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+")
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false",
          NoneType: "null"}  # fmt: skip


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds."""

    least: float
    most: float = math.inf
    is_open: bool = False
    """Whether the bounds themselves are outside."""

    def __contains__(self, value: float) -> bool:
        """Whether a number is within; NaN and infinity never are."""
        if self.is_open:
            return self.least < value < self.most
        return self.least <= value <= self.most and value < math.inf

    def __str__(self) -> str:
        """What a number must be."""
        if self.most == math.inf:
            return f"above {self.least:g}" if self.is_open else f"{self.least:g} or more"
        both = f"{self.least:g}, {self.most:g}"
        return f"in ({both})" if self.is_open else f"in [{both}]"


PositiveInt = Annotated[int, Range(0, is_open=True)]
NaturalInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, is_open=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Number = Annotated[float, Range(-math.inf)]
"""Any finite number."""
Share = Annotated[float, Range(0, 1)]
ProperShare = Annotated[float, Range(0, 1, is_open=True)]
"""A share of something, neither nothing nor all of it."""


class Settings:
    """Base of settings: no field has a value of another type or out of its range."""

    def __post_init__(self) -> None:
        """Check every field, and read it: 1e6 for a whole number, a list for a tuple.

        Raises:
            ValueError: with the field, its value, and what is valid.
        """
        hints = _hints(type(self))
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is tyro.MISSING_NONPROP:  # a default that the command line must replace
                continue
            read = checked(value, hints[field.name], field.name)
            if type(value) is not int:  # which is as good where a float is declared
                object.__setattr__(self, field.name, read)


def from_mapping(
    cls: type[T], given: Mapping[str, Any], *, name: str, default: Mapping[str, Any] | None = None
) -> T:
    """A dataclass from a mapping of fields to values.

    Raises:
        ValueError: an unknown field, a missing one, or a value of another type or out of its range.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} is {given!r}; it must be a mapping of fields to values.")
    own: list[Any] = [*fields(cls)]  # type: ignore[arg-type]
    if unknown := sorted(set(map(str, given)) - {f.name for f in own}):
        valid = sorted(f.name for f in own)
        raise ValueError(f"{name} has unknown fields {unknown}; valid are {valid}.")
    values, hints = dict(default or {}), _hints(cls)
    for key, value in given.items():
        values[key] = checked(value, hints[key], f"{name}: {key}")
    required = [f.name for f in own if f.default is MISSING and f.default_factory is MISSING]
    if missing := [key for key in required if key not in values]:
        raise ValueError(f"{name} lacks {missing}.")
    return cls(**values)


def checked(value: Any, kind: Any, name: str) -> Any:
    """The value as a field of this type holds it.

    Raises:
        ValueError: it is of another type or out of its range; the message begins with `name`.
    """
    read = _read(value, kind, name)
    if read is _INVALID:
        raise ValueError(f"{name} is {value!r}; it must be {_kinds(kind)}.")
    own = _range(kind)
    for number in (read if isinstance(read, tuple) else (read,)) if own else ():
        if number is not None and number not in own:
            finite = " and finite" if math.inf in (number, -number) else ""
            raise ValueError(f"{name} is {value!r}; it must be {own}{finite}.")
    return read


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _range(kind: Any) -> Range | None:
    """The range that a type declares, for its value or the items of its tuple."""
    own = next((each for each in getattr(kind, "__metadata__", ()) if type(each) is Range), None)
    return own or next(filter(None, map(_range, get_args(kind))), None)


def _read(value: Any, kind: Any, name: str) -> Any:
    """The value as a field of this type holds it; `_INVALID` where it is of another type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _read(value, args[0], name)
    if origin in (Union, UnionType):
        found = (_read(value, each, name) for each in args)
        return next((v for v in found if v is not _INVALID), _INVALID)
    if origin is Literal:
        return value if value in args else _INVALID
    if origin is tuple:
        items = [*value] if isinstance(value, list | tuple) else [_INVALID]
        read = tuple(_read(item, args[0], name) for item in items)
        return _INVALID if _INVALID in read else read
    if origin is not None:
        return value
    if isinstance(value, Mapping) and is_dataclass(kind):
        return from_mapping(kind, value, name=name)  # type: ignore[arg-type]
    if kind in (int, float):
        return _number(value, kind)
    if kind is str and isinstance(value, Path):
        return str(value)
    return value if isinstance(value, kind) else _INVALID


def _number(value: Any, kind: type) -> Any:
    """An int or a float, or `_INVALID`; a whole number may be written 1e6 or 1_000_000.0."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)  # YAML reads 1e-4, without a point, as text
    if isinstance(value, bool) or not isinstance(value, Integral | Real):
        return _INVALID
    if isinstance(value, Integral):  # also NumPy's; of those beyond a float a range tells
        whole = int(value)
        return float(whole) if kind is float and abs(whole) < 2**1000 else whole
    number = float(value)
    if kind is float:
        return number
    return int(number) if math.isfinite(number) and number == int(number) else _INVALID


def _kinds(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _kinds(args[0])
    if origin in (Union, UnionType):
        return " or ".join(map(_kinds, args))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"a list, each item {_kinds(args[0])}"
    return _WORDS.get(kind, f"a mapping of the fields of {getattr(kind, '__name__', kind)}")
