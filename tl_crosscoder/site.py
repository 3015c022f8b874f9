"""A site: one hook point of one model, as recorded with a dictionary.

Contract: plain values only, so that a saved dictionary names its sites without the models at hand.
"""

from dataclasses import asdict, dataclass
from typing import Any

from tl_crosscoder.hooked_model import stop_layer


@dataclass(frozen=True, kw_only=True)
class Site:
    """One hook point of one model."""

    name: str
    """What it is called here: `base`, `finetuned`."""
    d_model: int
    """Width of the activation, heads flattened."""
    hook_name: str
    model_name: str
    """Hub name or folder, as the user gave it."""
    revision: str | None = None
    adapter: str | None = None
    """PEFT adapter merged into `model_name`, as the user gave it."""
    scale: float = 1.0
    """Activations are multiplied by this in training; saved dictionaries have it folded in."""

    @property
    def stop_at_layer(self) -> int | None:
        """The first layer that need not run; None where the hook is outside the blocks."""
        return stop_layer(self.hook_name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Site":
        """Inverse of `to_dict`."""
        return cls(**values)
