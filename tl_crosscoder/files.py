"""Atomic writes: a file or folder under its final name is complete, or is not there.

Every artefact of a run goes through these functions, so that a kill at any byte leaves either
the old content or the new one. Limits: atomic on one file system, as `os.replace` is; a folder
that replaces a folder is for an instant not there; a kill leaves its hidden temporary behind.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`.

    Works for a file and for a folder (whoever writes decides which). An error removes the
    temporary path and leaves `path` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.parent / f".{path.name}.{os.getpid()}.{end}" for end in ("tmp", "old"))
    # A killed process that had the same number (common in containers) may have left its own.
    _remove(temporary, old)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            path.replace(old)  # deleting it here would take time, and a kill leave half of it
        temporary.replace(path)
    finally:
        if old.exists() and not path.exists():
            old.replace(path)
        _remove(temporary, old)


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON (NaN and infinity are refused: they are not JSON)."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; tensors may be views, on any device."""
    own = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(own, temporary, metadata=metadata)
        # safetensors 0.8 makes files that only their owner may read (its issue 782).
        temporary.chmod(mode)
