"""`ActivationSource`: all that harvesting, training and measuring ask of the models.

Contract: tokens in, rows of activations out; `row_shape(source.sites)` is the shape of a row.
`ModelPair`, `ModelSites` and `SiteDifference` are sources. Limit: one tokenizer.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.site import Site


@runtime_checkable
class ActivationSource(Protocol):
    """Gives the activations of its sites at every token."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """What stands in a row, in this order; recorded with a dictionary."""
        ...

    @property
    def n_sites(self) -> int:
        """Number of sites."""
        ...

    @property
    def d_model(self) -> int:
        """Width of the widest site."""
        ...

    @property
    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer whose ids `activations` takes."""

    @property
    def device(self) -> torch.device:
        """Where activations live."""
        ...

    @property
    def n_ctx(self) -> int:
        """Longest context, in tokens."""
        ...

    @property
    def weight_processing(self) -> str:
        """`raw` or `processed`: recorded with a dictionary."""
        ...

    def activations(
        self, tokens: Int[Tensor, "batch pos"], *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "batch pos *row"]:
        """Unscaled activations of all sites."""
        ...
