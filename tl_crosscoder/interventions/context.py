"""`InterventionContext`: the models and the dictionary that an intervention is made with.

Contract: two sites of the models are compared, called base and fine-tuned here whatever their
names; swap them for the other direction. Codes are a row a token, and none at tokens that the
dictionary was not trained on (BOS, first positions). Limit: both sites are of one width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_crosscoder.crosscoder.checks import check_source
from tl_crosscoder.crosscoder.crosscoder import Crosscoder, sparse_codes
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.crosscoder.sparse.kernels import offsets_of
from tl_crosscoder.data.harvest import batches_of, within_limits
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.difference import SiteDifference
from tl_crosscoder.models.site import compared_sites, row_shape, site_index
from tl_crosscoder.models.sites import ComparedModels


@dataclass(frozen=True, eq=False, kw_only=True)
class InterventionContext:
    """Models, two of their sites, and a dictionary or none."""

    models: ComparedModels
    base: int
    """Position among the models' sites of the one that stands for the base."""
    finetuned: int
    """Position of the one that stands for the fine-tuned model."""
    crosscoder: Crosscoder | None = None
    is_of_difference: bool = False
    """The dictionary is of the difference alone (a diff-SAE)."""

    @classmethod
    def of(
        cls,
        models: ComparedModels | SiteDifference,
        crosscoder: Crosscoder | None = None,
        *,
        compared: tuple[str, str] | None = None,
    ) -> "InterventionContext":
        """Check that all fits, before any work.

        Args:
            models: a pair, or any list of sites; of a diff-SAE, its difference.
            crosscoder: trained on these; None for what needs no dictionary.
            compared: names of the two sites, base first; None is `compared_sites`. The other way
                round, everything is said of what the base model has and the fine-tuned one lost.

        Raises:
            ValueError: the dictionary is of other models, hooks, processing or tokenizer, or there
                are no two sites of one width.
        """
        if crosscoder is not None:
            check_source(models, crosscoder)
        source = models.source if isinstance(models, SiteDifference) else models
        if not isinstance(source, ComparedModels):
            raise ValueError(
                "interventions run models, but these activations are from a cache. Load the models "
                "that the dictionary was trained on."
            )
        if isinstance(models, SiteDifference) and compared is None:
            pair: tuple[int, int] | None = models.positions
        elif compared is None:
            pair = compared_sites(source.sites)
        else:
            pair = site_index(source.sites, compared[0]), site_index(source.sites, compared[1])
        widths = [] if pair is None else [source.sites[i].d_model for i in pair]
        if pair is None or pair[0] == pair[1] or widths[0] != widths[1]:
            names = [(s.name, s.d_model) for s in source.sites]
            raise ValueError(
                f"an intervention needs two sites of one width, base and fine-tuned, but the "
                f"models have {names} and {compared} was asked for. Name two with compared=(base, "
                "finetuned)."
            )
        return cls(
            models=source,
            base=pair[0],
            finetuned=pair[1],
            crosscoder=crosscoder,
            is_of_difference=isinstance(models, SiteDifference),
        )

    @property
    def dictionary(self) -> Crosscoder:
        """The dictionary. Raises ValueError where there is none."""
        if self.crosscoder is None:
            raise ValueError("this needs a dictionary: give a crosscoder with the models.")
        return self.crosscoder

    @property
    def d_model(self) -> int:
        """Width of the compared sites."""
        return self.models.sites[self.base].d_model

    def site_name(self, site: int) -> str:
        """Name of a site by position."""
        return self.models.sites[site].name

    @cached_property
    def difference(self) -> Float[Tensor, "d_sae d_model"]:
        """d_j^1 - d_j^0: what a unit of each latent adds to the difference of the streams."""
        crosscoder = self.dictionary
        if self.is_of_difference:
            return crosscoder.decoder(0).detach()
        return (self.decoder(self.finetuned) - self.decoder(self.base)).detach()

    def decoder(self, site: int) -> Float[Tensor, "d_sae d_model"]:
        """Rows that write to a site; those of a diff-SAE all write to the fine-tuned one."""
        if not self.is_of_difference:
            return self.dictionary.decoder(site).detach()
        rows = self.dictionary.decoder(0).detach()
        return rows if site == self.finetuned else torch.zeros_like(rows)

    def latents(self, chosen: Sequence[int] | Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Latents as a tensor. Raises ValueError where one is out of range or named twice."""
        d_sae = self.dictionary.cfg.d_sae
        ids = torch.as_tensor(chosen, dtype=torch.long, device=self.models.device)
        bad = [j for j in ids.tolist() if not 0 <= j < d_sae]
        if bad or len(ids.unique()) < len(ids):
            raise ValueError(
                f"latents {bad or ids.tolist()} are out of range or named twice: the dictionary "
                f"has {d_sae:,}, numbered 0 to {d_sae - 1}."
            )
        return ids

    @torch.no_grad()
    def acts(self, index: Int[Tensor, " contexts"], text: TokenizedText) -> "SiteActivations":
        """Run all models to their hooks, and encode."""
        x = self.models.site_activations(text.tokens, range(self.models.n_sites))
        return self.encoded(tuple(x), index=index, text=text)

    def encoded(
        self,
        x: tuple[Float[Tensor, "batch pos _"], ...],
        *,
        index: Int[Tensor, " contexts"],
        text: TokenizedText,
    ) -> "SiteActivations":
        """Activations of all sites with their codes."""
        sites, counted = self.models.sites, text.mask.to(x[0].device)
        rows = torch.stack(x, dim=2) if len(row_shape(sites)) == 2 else torch.cat(x, dim=2)
        if text.norm_limits is not None:
            within = within_limits(rows.flatten(0, 1), sites, text.norm_limits)
            counted = counted & within.view_as(counted)
        codes = None
        if self.crosscoder is not None:
            inputs = x[self.finetuned] - x[self.base] if self.is_of_difference else rows
            codes = _at(sparse_codes(self.crosscoder, inputs[counted]), counted.flatten())
        return SiteActivations(index=index, text=text, x=x, codes=codes, counted=counted)

    def batches(
        self, text: TokenizedText, *, batch_size: int = 32, description: str | None = None
    ) -> Iterator["SiteActivations"]:
        """Activations of a whole text, `batch_size` contexts at a time; a description shows a bar.

        Raises:
            ValueError: there is no text, or its tokens are not those of the models.
        """
        if not len(text):
            raise ValueError("there are no contexts: the text is empty.")
        parts = batches_of(text, batch_size)
        bar = tqdm(parts, desc=description, unit="batch", disable=None if description else True)
        for index, part in bar:
            yield self.acts(index, part)


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteActivations:
    """What passes the hooks on some contexts."""

    index: Int[Tensor, " contexts"]
    """Which contexts of the text."""
    text: TokenizedText
    """These contexts."""
    x: tuple[Float[Tensor, "batch pos _"], ...]
    """Activations, of each site of the models."""
    codes: SparseCodes | None
    """One row a token, padding included; None without a dictionary."""
    counted: Bool[Tensor, "batch pos"]
    """Tokens of the kind that the dictionary was trained on; the others have no codes."""


def _at(codes: SparseCodes, rows: Tensor) -> SparseCodes:
    """The codes of chosen rows among all rows; the others have none."""
    where = rows.nonzero().squeeze(1).int()
    tokens = where[codes.pattern.tokens.long()]
    pattern = replace(codes.pattern, offsets=offsets_of(tokens, len(rows)))
    return cast(SparseCodes, replace(codes, pattern=pattern))
