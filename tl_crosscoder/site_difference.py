"""The difference between two sites as a source of its own: what a diff-SAE is trained on.

Contract: one site; `activations(tokens)` is x^1 - x^0, [batch, pos, d_model], unscaled. Its `Site`
is that of x^1 with x^0 under `minus`, so that a saved dictionary finds both models again.
Source: Aranguri, Drori and Nanda 2025 (SAE on activation differences). Limit: equal widths.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.compared_models import ComparedModels
from tl_crosscoder.site import Site

NAME = "difference"
"""What the one site is called."""


class SiteDifference:
    """x^1 - x^0 of two sites of a pair, or of any list of sites.

    Args:
        models: the models, which stay as they are.
        site: name of the site x^1.
        minus: name of the site x^0.

    Raises:
        ValueError: an unknown site, or sites of unequal width.
    """

    def __init__(self, models: ComparedModels, site: str, *, minus: str) -> None:
        self.models = models
        self._positions = [models.site_index(name) for name in (site, minus)]
        one, other = (models.sites[i] for i in self._positions)
        if one.d_model != other.d_model or one == other:
            raise ValueError(
                f"the difference {site!r} - {minus!r} is not one between two sites of one width: "
                f"they are {one.d_model} and {other.d_model} wide. Choose from "
                f"{[(s.name, s.d_model) for s in models.sites]}."
            )
        self.sites: tuple[Site, ...] = (replace(one, name=NAME, minus=other),)

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
        return self.models.tokenizer

    @property
    def device(self) -> torch.device:
        """Where activations live."""
        return self.models.device

    @property
    def n_ctx(self) -> int:
        """Longest context, in tokens."""
        return self.models.n_ctx

    @property
    def weight_processing(self) -> str:
        """`raw` or `processed`."""
        return self.models.weight_processing

    def activations(
        self, tokens: Int[Tensor, "batch pos"], *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "batch pos d_model"]:
        """x^1 - x^0 at every token; only the models of the two sites run. Subtracted in `dtype`."""
        one, other = self.models.site_activations(tokens, self._positions, dtype=dtype)
        return one - other

    def __repr__(self) -> str:
        names = [self.models.sites[i].name for i in self._positions]
        return f"SiteDifference({names[0]} - {names[1]} of {self.models})"
