"""Crosscoder model diffing for TransformerLens: what did fine-tuning change inside this model?

    import tl_crosscoder as tlc

    diff = tlc.diff("org/base", "org/tuned", hook_name="blocks.9.hook_resid_post", text="t.jsonl")
    diff.top(10)

Importing this package is cheap and silent; each name loads what it needs when it is first used.
SAELens finds our dictionaries (`SAE.load_from_disk`) once one of these names has been used, or at
import if SAELens was imported before.
"""

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _declared() -> dict[str, str]:
    """Module of each public name, as the stub beside this file imports them."""
    stub = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    imports = (node for node in ast.parse(stub).body if isinstance(node, ast.ImportFrom))
    return {alias.name: str(node.module) for node in imports for alias in node.names}


_LAZY = _declared()
__all__ = sorted(_LAZY)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # First of all, since it quiets libraries that others import.
    importlib.import_module(f"{__name__}.progress")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "sae_lens" in sys.modules:
    importlib.import_module(f"{__name__}.crosscoder.training")
