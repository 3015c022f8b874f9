"""Flat configs from YAML files: the same fields as in Python and on the command line.

No torch here: the command line reads configs to print its help.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

C = TypeVar("C", bound="YamlConfig")


class YamlConfig:
    """Base of the configs that a YAML file can hold."""

    @classmethod
    def from_yaml(cls: type[C], path: str | Path, *, default: Mapping[str, Any] | None = None) -> C:
        """Read a YAML file of these fields; `default` stands in for fields that it lacks.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a mapping, an unknown field, a missing one, or a value that cannot be.
        """
        return cls.from_mapping({**(default or {}), **read_mapping(path)}, name=str(path))

    @classmethod
    def from_mapping(cls: type[C], given: Mapping[str, Any], *, name: str) -> C:
        """The same from fields at hand; errors call them `name`. Raises ValueError."""
        hints = get_type_hints(cls)
        own: list[Any] = [*fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(set(given) - {f.name for f in own})
        if unknown:
            valid = sorted(f.name for f in own)
            raise ValueError(f"{name} has unknown fields {unknown}; valid are {valid}.")
        values = {k: _converted(value, hints[k], k, name) for k, value in given.items()}
        missing = [f.name for f in own if _is_required(f) and f.name not in given]
        if missing:
            raise ValueError(f"{name} lacks {missing}.")
        return cls(**values)


def _is_required(own: Any) -> bool:
    return own.default is MISSING and own.default_factory is MISSING


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The fields of a YAML file. Raises as `from_yaml` does."""
    given = read_yaml(path)
    if not isinstance(given, dict):
        raise ValueError(
            f"{path} must be a mapping of fields to values, not {type(given).__name__}."
        )
    return given


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file; FileNotFoundError or ValueError where there is none."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path} (from {Path.cwd()}).")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML ({error}).") from error


def _converted(value: Any, hint: Any, field: str, name: str) -> Any:
    """YAML reads 1e-4, without a point, as text, and knows no tuples."""
    if hint in (float, float | None) and isinstance(value, str):
        try:
            return float(value)
        except ValueError as error:
            raise ValueError(f"{name}: {field} is {value!r}, which is no number.") from error
    item = next(iter(getattr(hint, "__args__", ())), None)
    if isinstance(item, type) and issubclass(item, YamlConfig) and not isinstance(value, str):
        return tuple(
            v if isinstance(v, item) else item.from_mapping(v, name=f"{name}, {field}")
            for v in value
        )
    return value
