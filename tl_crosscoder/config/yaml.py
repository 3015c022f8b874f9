"""Settings from YAML files, with strict errors: unknown and missing fields are named.

No torch here: the command line reads settings to print its help.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from tl_crosscoder import files
from tl_crosscoder.config.settings import Settings, from_mapping

C = TypeVar("C", bound="YamlConfig")

_MOST_VALUES = 100_000


class YamlConfig(Settings):
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


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The fields of a YAML file. Raises ValueError for one that is not a mapping."""
    given = read_yaml(path)
    if not isinstance(given, dict):
        raise ValueError(
            f"{path} must be a mapping of fields to values, not {type(given).__name__}."
        )
    return given


def read_yaml(path: str | Path, *, loader: Any = None) -> Any:
    """The content of a YAML file; FileNotFoundError or ValueError where there is none.

    Another safe loader may know more tags.
    """
    import yaml

    path = files.user_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path} (from {Path.cwd()}).")
    try:
        text = path.read_text(encoding="utf-8")
        loader = loader or yaml.SafeLoader
        n_values = _n_values(yaml.compose(text, Loader=loader), {})
        if n_values <= _MOST_VALUES:
            return yaml.load(text, Loader=loader)
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
