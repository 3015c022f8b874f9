"""The difference between two sites as a source of its own: what a diff-SAE is trained on.

Contract: one site; `rows(contexts)` is x^1 - x^0, [tokens, d_model], unscaled. Its `Site`
is that of x^1 with x^0 under `minus`, so that a saved dictionary finds both models again.
Source: Aranguri, Drori and Nanda 2025 (SAE on activation differences). Limit: equal widths.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.models.site import Site, compared_sites, site_columns, site_index, site_parts
from tl_crosscoder.models.source import ActivationSource, Contexts, StoredRows
from tl_crosscoder.results.render import Section, as_html

if TYPE_CHECKING:
    from tl_crosscoder.models.sites import ComparedModels

NAME = "difference"
"""What the one site is called."""


@runtime_checkable
class SiteRows(ActivationSource, Protocol):
    """What has several sites and can give some of them: models, or a cache."""

    def site_rows(
        self, contexts: Contexts, sites: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> list[Float[Tensor, "tokens d_model"]]:
        """Rows of some of the sites, by position."""
        ...


class SiteDifference:
    """x^1 - x^0 of two sites of a pair, of any list of sites, or of a cache.

    Args:
        source: the models or the cache, which stay as they are.
        site: name of the site x^1.
        minus: name of the site x^0.

    Raises:
        ValueError: an unknown site, or sites of unequal width.
    """

    def __init__(self, source: SiteRows, site: str, *, minus: str) -> None:
        self.source = source
        self._positions = [site_index(source.sites, name) for name in (site, minus)]
        one, other = (source.sites[i] for i in self._positions)
        if one.d_model != other.d_model or one == other:
            raise ValueError(
                f"the difference {site!r} - {minus!r} is not one between two sites of one width: "
                f"they are {one.d_model} and {other.d_model} wide. Choose from "
                f"{[(s.name, s.d_model) for s in source.sites]}."
            )
        self.sites: tuple[Site, ...] = (replace(one, name=NAME, minus=other),)

    @property
    def positions(self) -> tuple[int, int]:
        """Positions of x^0 and x^1 among the source's sites."""
        return self._positions[1], self._positions[0]

    @property
    def n_sites(self) -> int:
        """One."""
        return 1

    @property
    def d_model(self) -> int:
        """Width of the difference."""
        return self.sites[0].d_model

    @property
    def tokenizer(self) -> Any:
        """Of the models."""
        return self.source.tokenizer

    @property
    def device(self) -> torch.device:
        """Where activations live."""
        return self.source.device

    @property
    def n_ctx(self) -> int:
        """Longest context, in tokens."""
        return self.source.n_ctx

    @property
    def weight_processing(self) -> str:
        """`raw` or `processed`."""
        return self.source.weight_processing

    @property
    def cache_id(self) -> str | None:
        """Of the cache, where this is of one."""
        return self.source.cache_id

    def activations(
        self, tokens: Int[Tensor, "batch pos"], *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "batch pos d_model"]:
        """x^1 - x^0 at every token; only the models of the two sites run. Subtracted in `dtype`.

        Raises ValueError for a cache, which has the rows of its own text alone.
        """
        if self.cache_id is not None:
            raise ValueError(
                "a cache cannot run tokens; read its own contexts with rows(cache.text[...])."
            )
        models = cast("ComparedModels", self.source)
        one, other = models.site_activations(tokens, self._positions, dtype=dtype)
        return one - other

    def rows(
        self, contexts: Contexts, *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "tokens d_model"]:
        """x^1 - x^0 at the tokens that count, in the order of the mask. Subtracted in `dtype`."""
        one, other = self.source.site_rows(contexts, self._positions, dtype=dtype)
        return one - other

    def places(self, contexts: Contexts) -> Int[Tensor, " tokens"]:
        """Of a cache: the numbers of the rows that `rows(contexts)` gives."""
        return cast(StoredRows, self.source).places(contexts)

    def read(
        self, index: Int[Tensor, " n"], *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "n d_model"]:
        """Of a cache: any rows by number."""
        rows = cast(StoredRows, self.source).read(index, dtype=dtype)
        parts = site_parts(rows, self.source.sites)
        return parts[self._positions[0]] - parts[self._positions[1]]

    def __repr__(self) -> str:
        names = [self.source.sites[i].name for i in self._positions]
        return f"SiteDifference({names[0]} - {names[1]} of {self.source})"

    def _repr_html_(self) -> str:
        title = f"{type(self).__name__}: {self.weight_processing} weights"
        return as_html([Section(title=title, columns=site_columns(self.sites))])


def difference_of(
    source: SiteRows, site: str | None = None, *, minus: str | None = None
) -> SiteDifference:
    """x^1 - x^0 of two sites: by default the fine-tuned less the base, see `compared_sites`.

    Raises:
        ValueError: a single site, an unknown one, or sites of unequal width.
    """
    pair = compared_sites(source.sites)
    if pair is None:
        raise ValueError(f"{source} has one site only: there is nothing to subtract.")
    base, finetuned = (source.sites[i].name for i in pair)
    return SiteDifference(source, site or finetuned, minus=minus or base)
