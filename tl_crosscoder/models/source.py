"""`ActivationSource`: activations of one or more sites, from live models or from a cache of them.

Contract: contexts in, rows of activations out; `row_shape(source.sites)` is the shape of a row.
Two of the model sites are compared, base and fine-tuned; they are chosen once, on the source.
`difference()` is a view of the same source whose rows are x^1 - x^0 of these two. Limit: one
tokenizer.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.models.site import Site, compared_sites, row_shape, site_index

S = TypeVar("S", bound="ActivationSource")
DIFFERENCE = "difference"
"""Name of the one site of a difference."""


@runtime_checkable
class Contexts(Protocol):
    """Contexts of token ids, and which of their tokens are kept."""

    @property
    def tokens(self) -> Int[Tensor, "contexts pos"]:
        """Token ids."""
        ...

    @property
    def mask(self) -> Bool[Tensor, "contexts pos"]:
        """True where a token is kept."""
        ...

    @property
    def context_ids(self) -> Int[Tensor, " contexts"]:
        """Positions of these contexts in the whole text; a cache finds their rows by them."""
        ...


class ActivationSource(ABC):
    """Abstract: `ModelPair` runs models, `ActivationCache` reads what they gave.

    Subclasses set the fields below and `compared` by `_compare`.
    """

    weight_processing: str
    """`raw` or `processed` (norms folded, weights centred); recorded with a dictionary."""
    model_sites: tuple[Site, ...]
    """Every (model, hook point), in order; the first is the base."""
    compared: tuple[int, int] | None
    """Positions of the base and of the fine-tuned site; None for a single site."""
    tokenizer_name: str | None = None
    """Name or folder of a tokenizer that is not the models' own; recorded, to load it again."""
    is_difference: bool = False
    """Whether rows are x^1 - x^0 of the compared sites, instead of all sites side by side."""

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """Hugging Face tokenizer that makes the token ids."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the activations."""

    @property
    @abstractmethod
    def n_ctx(self) -> int:
        """Longest context, in tokens."""

    @property
    def computed_in(self) -> str:
        """Number format that the models compute in, for messages."""
        return "the format of the cache"

    @property
    def cache_id(self) -> str | None:
        """Hash of the cache that this reads from; None where models run."""
        return None

    @property
    def reads_by_row(self) -> bool:
        """Whether, with a `cache_id`, single rows are read as fast as whole contexts."""
        return self.cache_id is not None

    @abstractmethod
    def site_rows(
        self, contexts: Contexts, sites: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> list[Float[Tensor, "tokens _"]]:
        """Unscaled activations of some model sites, by position, at the kept tokens."""

    # --- what a dictionary is trained on ---------------------------------------------------------

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites of a row: all model sites, or the one site of the difference."""
        if not self.is_difference:
            return self.model_sites
        assert self.compared is not None
        base, finetuned = (self.model_sites[i] for i in self.compared)
        return (replace(finetuned, name=DIFFERENCE, minus=base),)

    @property
    def n_sites(self) -> int:
        """Number of sites of a row."""
        return len(self.sites)

    @property
    def d_model(self) -> int:
        """Width of the widest site."""
        return max(site.d_model for site in self.sites)

    @property
    def d_in(self) -> int:
        """Width of a row: the sum of the widths of its sites."""
        return sum(site.d_model for site in self.sites)

    def rows(
        self, contexts: Contexts, *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "tokens *row"]:
        """Unscaled activations at the kept tokens, in the order of the mask."""
        return self.joined(self.site_rows(contexts, self.read_sites, dtype=dtype))

    @property
    def read_sites(self) -> tuple[int, ...]:
        """Positions of the model sites that a row is made of."""
        if self.is_difference:
            assert self.compared is not None
            return self.compared
        return tuple(range(len(self.model_sites)))

    def joined(self, parts: Sequence[Float[Tensor, "*batch _"]]) -> Float[Tensor, "..."]:
        """Rows from the activations of `read_sites`: stacked, side by side, or subtracted."""
        if self.is_difference:
            base, finetuned = parts
            return finetuned - base
        if len(row_shape(self.sites)) == 2:
            return rearrange([*parts], "n_sites ... d_model -> ... n_sites d_model")
        return torch.cat([*parts], dim=-1)

    # --- which two sites are compared ------------------------------------------------------------

    def comparing(self: S, base: str, finetuned: str) -> S:
        """View of this source that compares two other sites, by name; models are shared.

        `comparing("finetuned", "base")` swaps the direction: everything then tells what the
        base has and the fine-tuned model lost. Raises ValueError for an unknown or equal site.
        """
        view = copy.copy(self)
        view._compare((base, finetuned))
        return view

    def difference(self: S, site: str | None = None, *, minus: str | None = None) -> S:
        """View whose rows are x^1 - x^0 alone, the input of a diff-SAE.

        Args:
            site: name of the site x^1; None is the compared fine-tuned site.
            minus: name of the site x^0; None is the compared base site.

        Raises:
            ValueError: a single site, an unknown one, or sites of unequal width.
        """
        if self.compared is None:
            raise ValueError(f"{self} has one site only: there is nothing to subtract.")
        base, finetuned = self.compared_names
        view = self.comparing(minus or base, site or finetuned)
        view.check_one_width()
        view.is_difference = True
        return view

    def side_by_side(self: S) -> S:
        """View whose rows are all model sites; the inverse of `difference()`."""
        view = copy.copy(self)
        view.is_difference = False
        return view

    @property
    def compared_names(self) -> tuple[str, str]:
        """Names of the compared sites, base first. Raises ValueError for a single site."""
        if self.compared is None:
            raise ValueError(f"{self} has one site only: there is nothing to compare it with.")
        base, finetuned = self.compared
        return self.model_sites[base].name, self.model_sites[finetuned].name

    def check_one_width(self) -> tuple[int, int]:
        """Positions of the compared sites. Raises ValueError unless they are of one width."""
        pair = self.compared
        names = [(s.name, s.d_model) for s in self.model_sites]
        if pair is None or self.model_sites[pair[0]].d_model != self.model_sites[pair[1]].d_model:
            raise ValueError(
                "this needs two sites of one width, base and fine-tuned, but the sites are "
                f"{names}. Choose two with comparing(base, finetuned)."
            )
        return pair

    def _compare(self, names: tuple[str, str] | None) -> None:
        if names is None:
            self.compared = compared_sites(self.model_sites)
            return
        pair = site_index(self.model_sites, names[0]), site_index(self.model_sites, names[1])
        if pair[0] == pair[1]:
            raise ValueError(
                f"site {names[0]!r} cannot be compared with itself; choose two of "
                f"{[s.name for s in self.model_sites]}."
            )
        self.compared = pair


class StoredRows(Protocol):
    """What a source with a `cache_id` has besides: rows by number."""

    def places(self, contexts: Contexts) -> Int[Tensor, " tokens"]:
        """Numbers of the rows that `rows(contexts)` gives."""
        ...

    def read(
        self, index: Int[Tensor, " n"], *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "n *row"]:
        """Rows by number, in any order."""
        ...
