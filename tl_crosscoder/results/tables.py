"""`Tabular`: a result that is a table, saved as JSON or parquet, loaded again, given to pandas.

Contract: columns of one length, and facts about the whole; what is loaded equals what was saved,
NaN included. `TableOfRows` is for few rows with names, `TableOfColumns` for tensors with one entry
a latent. Limit: entries are numbers, words, or lists of them.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.results.render import Section, as_html, as_text, plain

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T", bound="Tabular")
C = TypeVar("C", bound="TableOfColumns")
_KEY = "tl_crosscoder"
N_OF_TENSORS = 10
"""Rows shown of a table of tensors, which has a row a latent and many columns."""
Columns = dict[str, list[Any]]


class Tabular(ABC):
    """Abstract: a result with columns, and with facts about the whole."""

    @abstractmethod
    def columns(self) -> Columns:
        """Plain values by column; all columns are as long."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Facts that hold for all rows, as plain values."""

    @classmethod
    @abstractmethod
    def from_columns(cls: type[T], columns: Columns, about: dict[str, Any]) -> T:
        """Inverse of `columns` and `about`."""

    def to_frame(self) -> "pd.DataFrame":
        """A pandas data frame; what holds for all rows is in its `attrs`."""
        import pandas as pd

        frame = pd.DataFrame(self.columns())
        frame.attrs.update(self.about())
        return frame

    def sections(self) -> list[Section]:
        """Facts and columns as they are shown; tensors with an index, and few rows of them."""
        columns, about = self.columns(), self.about()
        facts = [f"{name} {plain(value)}" for name, value in about.items() if name != "tensors"]
        title = ": ".join([type(self).__name__, *([", ".join(facts)] if facts else [])])
        if "tensors" not in about:
            return [Section(title=title, columns=columns)]
        index = range(len(next(iter(columns.values()), ())))
        return [Section(title=title, columns={"": index, **columns}, n_rows=N_OF_TENSORS)]

    def __str__(self) -> str:
        return as_text(self.sections())

    def _repr_html_(self) -> str:
        return as_html(self.sections())

    def save(self, path: str | Path) -> Path:
        """Write a `.json` or `.parquet` file, atomically. Raises ValueError for another ending."""
        path = files.user_path(path)
        if _ending(path) == ".json":
            files.write_json(path, self.to_json())
        else:
            content = {"kind": type(self).__name__, "about": self.about()}
            _write_parquet(path, self.columns(), content)
        return path

    def to_json(self) -> dict[str, Any]:
        """What a `.json` file of it holds."""
        columns = self.columns()
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        content = {"kind": type(self).__name__, "about": self.about()}
        return without_nan(content | {"columns": list(columns), "rows": rows})

    @classmethod
    def load(cls: type[T], path: str | Path) -> T:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a file of this kind of result.
        """
        path = files.user_path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: save a {cls.__name__} first.")
        try:
            columns, content = (_read_json if _ending(path) == ".json" else _read_parquet)(path)
            kind, about = content["kind"], content["about"]
        except (KeyError, TypeError, OSError, ValueError) as error:
            raise ValueError(f"{path} is not a saved {cls.__name__} ({error}).") from error
        if kind != cls.__name__:
            raise ValueError(f"{path} holds a {kind}, not a {cls.__name__}: load it with {kind}.")
        try:
            return cls.from_columns(columns, about)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a saved {cls.__name__} ({error!r}).") from error


@dataclass(frozen=True, kw_only=True)
class TableOfRows(Tabular):
    """Abstract: rows are small dataclasses of plain values; subclasses add fields about the whole.

    The class of the rows is `ROW`.
    """

    ROW: ClassVar[type]
    rows: tuple[Any, ...]

    def columns(self) -> Columns:
        """Fields of the rows."""
        return {
            f.name: [_plain(getattr(row, f.name)) for row in self.rows] for f in fields(self.ROW)
        }

    def about(self) -> dict[str, Any]:
        """The other fields."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "rows"}

    @classmethod
    def from_columns(cls, columns: Columns, about: dict[str, Any]) -> "TableOfRows":
        """Rows of their class; null is NaN where a float belongs, and lists are tuples.

        Facts that an older file lacks have their default.
        """
        columns = {f.name: _as_declared(columns[f.name], f) for f in fields(cls.ROW)}
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        own = {f.name: _as_declared([about[f.name]], f)[0] for f in fields(cls) if f.name in about}
        return cls(rows=tuple(cls.ROW(**row) for row in rows), **own)


@dataclass(frozen=True, kw_only=True)
class TableOfColumns(Tabular):
    """Abstract: fields that are tensors `[n]` are columns, `[n_names, n]` several; the rest about.

    Columns of a matrix are called `field.0`, `field.1`. Float columns are float64 in the file; a
    tensor has its dtype again when loaded.
    """

    def columns(self) -> Columns:
        """One list a row of each tensor."""
        found: Columns = {}
        for name, tensor in self.tensors().items():
            if tensor.ndim == 1:
                found[name] = tensor.tolist()
            else:
                found |= {f"{name}.{i}": row.tolist() for i, row in enumerate(tensor)}
        return found

    def about(self) -> dict[str, Any]:
        """Fields that are not tensors, and dtype and rank of the tensors."""
        kinds = {
            n: [str(t.dtype).removeprefix("torch."), t.ndim] for n, t in self.tensors().items()
        }
        return {**self.facts(), "tensors": kinds}

    @classmethod
    def from_columns(cls, columns: Columns, about: dict[str, Any]) -> "TableOfColumns":
        """Tensors on the CPU."""
        tensors = {}
        for name, (dtype, n_dim) in about["tensors"].items():
            names = [n for n in columns if n == name or n.startswith(f"{name}.")]
            values = [[math.nan if v is None else v for v in columns[n]] for n in names]
            rows = torch.tensor(values, dtype=torch.float64).to(getattr(torch, dtype))
            tensors[name] = rows[0] if n_dim == 1 else rows
        return cls.from_tensors(tensors, about)

    def tensors(self) -> dict[str, Tensor]:
        """Fields that are tensors, on the CPU."""
        of_fields = {f.name: getattr(self, f.name) for f in fields(self)}
        return {n: t.detach().cpu() for n, t in of_fields.items() if isinstance(t, Tensor)}

    def facts(self) -> dict[str, Any]:
        """The other fields, as plain values."""
        tensors = self.tensors()
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)
                if f.name not in tensors}  # fmt: skip

    @classmethod
    def from_tensors(cls: type[C], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> C:
        """Inverse of `tensors` and `facts`."""
        own = {f.name: _as_declared([facts[f.name]], f)[0] for f in fields(cls)
               if f.name not in tensors}  # fmt: skip
        return cls(**tensors, **own)


def without_nan(value: Any) -> Any:
    """NaN and infinity as null: they are not JSON."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ending(path: Path) -> str:
    if path.suffix not in (".json", ".parquet"):
        raise ValueError(f"{path} must end in .json or .parquet: these are the formats of results.")
    return path.suffix


def _plain(value: Any) -> Any:
    """Tuples as lists, dataclasses as mappings: what JSON and parquet hold."""
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _as_declared(values: list[Any], field: Any) -> list[Any]:
    kind = str(field.type)
    if "float" in kind and "None" not in kind:
        values = [math.nan if v is None else v for v in values]
    if "tuple" in kind:
        gap = math.nan if "tuple[float" in kind else None
        values = [
            None if v is None else tuple(gap if each is None else each for each in v)
            for v in values
        ]
    return values


def _write_parquet(path: Path, columns: Columns, content: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(columns)
    table = table.replace_schema_metadata({_KEY: json.dumps(without_nan(content))})
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary:
        pq.write_table(table, temporary)


def _read_parquet(path: Path) -> tuple[Columns, dict[str, Any]]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return table.to_pydict(), json.loads((table.schema.metadata or {})[_KEY.encode()])


def _read_json(path: Path) -> tuple[Columns, dict[str, Any]]:
    content = files.read_object(path)
    columns = {name: [row[name] for row in content["rows"]] for name in content["columns"]}
    return columns, content
