"""`ActivationSource`: all that harvesting, training and measuring ask of the models.

Contract: contexts in, rows of activations out; `row_shape(source.sites)` is the shape of a row.
`ModelPair`, `ModelSites`, `SiteDifference` run models; an `ActivationCache` reads what they gave.
Limit: one tokenizer.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.models.site import Site


@runtime_checkable
class Contexts(Protocol):
    """Contexts of token ids, and which of their tokens count."""

    @property
    def tokens(self) -> Int[Tensor, "contexts pos"]:
        """Ids."""
        ...

    @property
    def mask(self) -> Bool[Tensor, "contexts pos"]:
        """True where a token counts."""
        ...

    @property
    def context_ids(self) -> Int[Tensor, " contexts"]:
        """Which contexts of a whole text these are; a cache finds them by it."""
        ...


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
        """A Hugging Face tokenizer that makes the ids."""

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

    @property
    def cache_id(self) -> str | None:
        """Which cache this reads from; None where models run."""
        ...

    def rows(
        self, contexts: Contexts, *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "tokens *row"]:
        """Unscaled activations of all sites at the tokens that count, in the order of the mask."""
        ...


class StoredRows(Protocol):
    """What a source with a `cache_id` has besides: rows by number."""

    def places(self, contexts: Contexts) -> Int[Tensor, " tokens"]:
        """The numbers of the rows that `rows(contexts)` gives."""
        ...

    def read(
        self, index: Int[Tensor, " n"], *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "n *row"]:
        """Any rows by number, in any order."""
        ...
