"""Model pairs whose difference is known: the embedded default of the package.

    pair = organism("taboo")           # paths of base and adapter, and what was planted
    texts = training_documents("taboo", 10_000)

The micro-world, the suite and its text need no torch; training and measuring import it when called.
Fine-tuning is `tl_crosscoder.organisms.finetune.finetune`: a function may not share the name of its
module here.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tl_crosscoder.organisms.suite import (
    DataSettings,
    LoraSettings,
    Organism,
    load_suite,
    organism,
    training_documents,
)
from tl_crosscoder.organisms.world import Document, Message, documents

if TYPE_CHECKING:
    from tl_crosscoder.organisms.base import BaseResult, train_base
    from tl_crosscoder.organisms.behaviours import BehaviourReport, measure

__all__ = [
    "BaseResult",
    "BehaviourReport",
    "DataSettings",
    "Document",
    "LoraSettings",
    "Message",
    "Organism",
    "documents",
    "load_suite",
    "measure",
    "organism",
    "train_base",
    "training_documents",
]

_LAZY = {
    "BaseResult": "base",
    "train_base": "base",
    "BehaviourReport": "behaviours",
    "measure": "behaviours",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
    return getattr(module, name)
