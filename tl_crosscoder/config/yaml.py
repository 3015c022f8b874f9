"""Settings dataclasses from YAML files and mappings, with strict errors.

A field takes a value of its declared type alone; unknown and missing fields are named. No torch
here: the command line reads settings to print its help.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tl_crosscoder import files

C = TypeVar("C", bound="YamlConfig")
T = TypeVar("T")

_INVALID: Any = object()
_EXPONENT = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+")
_MOST_VALUES = 100_000
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false",
          NoneType: "null"}  # fmt: skip


class YamlConfig:
    """Base of the settings that a YAML file can hold."""

    @classmethod
    def from_yaml(cls: type[C], path: str | Path, *, default: Mapping[str, Any] | None = None) -> C:
        """Read a YAML file of these fields; `default` stands in, unchecked, for fields it lacks.

        Raises:
            FileNotFoundError: no such file.
            ValueError: see `from_mapping`, and for a file that is not a mapping.
        """
        return cls.from_mapping(read_mapping(path), name=str(path), default=default)

    @classmethod
    def from_mapping(
        cls: type[C],
        given: Mapping[str, Any],
        *,
        name: str,
        default: Mapping[str, Any] | None = None,
    ) -> C:
        """Settings from a mapping of fields to values, which errors call `name`; see below."""
        return from_mapping(cls, given, name=name, default=default)


def from_mapping(
    cls: type[T], given: Mapping[str, Any], *, name: str, default: Mapping[str, Any] | None = None
) -> T:
    """A dataclass from a mapping of fields to values.

    Raises:
        ValueError: an unknown field, a missing one, or a value of another type.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} is {given!r}; it must be a mapping of fields to values.")
    hints = get_type_hints(cls)
    own: list[Any] = [*fields(cls)]  # type: ignore[arg-type]
    if unknown := sorted(set(given) - {f.name for f in own}):
        valid = sorted(f.name for f in own)
        raise ValueError(f"{name} has unknown fields {unknown}; valid are {valid}.")
    values = dict(default or {})
    for key, value in given.items():
        values[key] = read = _read(value, hints[key], f"{name}, {key}")
        if read is _INVALID:
            raise ValueError(f"{name}: {key} is {value!r}; it must be {_kinds(hints[key])}.")
    required = [f.name for f in own if f.default is MISSING and f.default_factory is MISSING]
    if missing := [key for key in required if key not in values]:
        raise ValueError(f"{name} lacks {missing}.")
    return cls(**values)


def check_positive(settings: Any, *names: str) -> None:
    """Raise ValueError for a field that is 0 or below; None is no value."""
    for name in names:
        if (value := getattr(settings, name)) is not None and value <= 0:
            raise ValueError(f"{name} is {value}; it must be above 0.")


def check_choices(settings: Any, **choices: Any) -> None:
    """Raise ValueError for a field that is not one of the values of its `Literal`, or None."""
    for name, kind in choices.items():
        if _read(value := getattr(settings, name), kind | None, name) is _INVALID:
            raise ValueError(f"{name} is {value!r}; it must be {_kinds(kind)}.")


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The fields of a YAML file. Raises ValueError for one that is not a mapping."""
    given = read_yaml(path)
    if not isinstance(given, dict):
        raise ValueError(
            f"{path} must be a mapping of fields to values, not {type(given).__name__}."
        )
    return given


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file; FileNotFoundError or ValueError where there is none."""
    import yaml

    path = files.user_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path} (from {Path.cwd()}).")
    try:
        text = path.read_text(encoding="utf-8")
        n_values = _n_values(yaml.compose(text, Loader=yaml.SafeLoader), {})
        if n_values <= _MOST_VALUES:
            return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is not valid YAML ({error}).") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for settings.") from error
    raise ValueError(
        f"{path} holds {n_values:,} values, aliases (*name) written out; settings have at most "
        f"{_MOST_VALUES:,}."
    )


def _n_values(node: Any, known: dict[int, int]) -> int:
    """Values below a node of YAML, those of an alias counted each time that it stands there."""
    if not isinstance(children := getattr(node, "value", None), list):
        return 1
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # what refers to itself has no end
        parts = [part for c in children for part in (c if isinstance(c, tuple) else (c,))]
        known[id(node)] = 1 + sum(_n_values(part, known) for part in parts)
    return known[id(node)]


def _read(value: Any, kind: Any, name: str) -> Any:
    """The value as a field of this type holds it; `_INVALID` where it is of another type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        found = (_read(value, each, name) for each in args)
        return next((v for v in found if v is not _INVALID), _INVALID)
    if origin is Literal:
        return value if value in args else _INVALID
    if origin is tuple:
        items = [*value] if isinstance(value, list | tuple) else [_INVALID]
        read = tuple(_read(item, args[0], name) for item in items)
        return _INVALID if _INVALID in read else read
    if isinstance(value, Mapping) and is_dataclass(kind):
        return from_mapping(kind, value, name=name)  # type: ignore[arg-type]
    if kind in (int, float):
        return _number(value, kind)
    return value if isinstance(value, kind) else _INVALID


def _number(value: Any, kind: type) -> Any:
    """An int or a float, or `_INVALID`; a whole number may be written 1e6 or 1_000_000.0."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)  # YAML reads 1e-4, without a point, as text
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _INVALID
    if kind is float:
        return float(value)
    return int(value) if math.isfinite(value) and value == int(value) else _INVALID


def _kinds(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_kinds, args))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"a list, each item {_kinds(args[0])}"
    return _WORDS.get(kind, f"a mapping of the fields of {getattr(kind, '__name__', kind)}")
