"""A crosscoder of another library, between its files and ours.

Contract: weights for raw activations, with normalisation folded in, in float64; codes at the
library's own scale. Limit: sites of one width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.hub.convert_files import ForeignFiles


@dataclass(frozen=True, eq=False, kw_only=True)
class Foreign:
    """Weights for raw activations, float64, and what the files say beside."""

    library: str
    W_enc: Float[Tensor, "n_sites d_model d_sae"]
    W_dec: Float[Tensor, "n_sites d_sae d_model"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, "n_sites d_model"]
    threshold: Float[Tensor, " d_sae"]
    scales: tuple[float, ...]
    """By which training multiplied each site; folded in already."""
    names: Mapping[str, str] = field(default_factory=dict)
    """`base` and `hook_name`, where the files have them."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Plain values to be recorded."""


def check_tensors(files: ForeignFiles, needed: set[str], *, optional: set[str]) -> None:
    """Refuse a file with a tensor too few, or with others: they are of another forward pass."""
    missing = sorted(needed - set(files.tensors))
    if missing:
        raise ValueError(
            f"{files.path} lacks the tensors {missing}: the file is not whole, or of another "
            "variant of the layout. Save model.state_dict() again."
        )
    more = sorted(set(files.tensors) - needed - optional)
    if more:
        raise unrepresentable(files, f"the tensors {more}", f"only {sorted(needed | optional)}")


def unrepresentable(files: ForeignFiles, what: str, known: str) -> ValueError:
    """What is in the files, and what is understood instead."""
    return ValueError(
        f"{files.path} has {what}, which a crosscoder here cannot represent or which is another "
        f"variant of the layout; it takes {known}. Export it again without that, or build the "
        "weights yourself with Crosscoder(CrosscoderConfig(...)).load_state_dict(...)."
    )
