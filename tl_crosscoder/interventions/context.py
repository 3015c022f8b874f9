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

from tl_crosscoder.crosscoder.crosscoder import Crosscoder, sparse_codes
from tl_crosscoder.crosscoder.site_views import check_source
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes, offsets_of
from tl_crosscoder.data.harvest import shared_batches, within_limits
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.mesh import ALONE, Axis
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.progress import progress


@dataclass(frozen=True, eq=False, kw_only=True)
class InterventionContext:
    """Models, two of their sites, and a dictionary or none."""

    models: ModelPair
    crosscoder: Crosscoder | None = None

    @classmethod
    def of(cls, models: ModelPair, crosscoder: Crosscoder | None = None) -> "InterventionContext":
        """Check that models and dictionary fit, before any work.

        Args:
            models: two of their sites are compared (`ModelPair.comparing` chooses others, or the
                other direction); of a diff-SAE, their `difference()`.
            crosscoder: trained on these; None for what needs no dictionary.

        Raises:
            ValueError: the dictionary is of other models, hooks, processing or tokenizer, or the
                compared sites are not of one width.
        """
        if crosscoder is not None:
            check_source(models, crosscoder)
        if not isinstance(models, ModelPair):
            raise ValueError(
                "interventions run models, but these activations are from a cache. Load the models "
                "that the dictionary was trained on."
            )
        models.check_one_width()
        return cls(models=models, crosscoder=crosscoder)

    @property
    def base(self) -> int:
        """Position among the model sites of the one that stands for the base."""
        return self.models.check_one_width()[0]

    @property
    def finetuned(self) -> int:
        """Position among the model sites of the one that stands for the fine-tuned model."""
        return self.models.check_one_width()[1]

    @property
    def dictionary(self) -> Crosscoder:
        """The dictionary. Raises ValueError where there is none."""
        if self.crosscoder is None:
            raise ValueError("this needs a dictionary: give a crosscoder with the models.")
        return self.crosscoder

    def site_name(self, site: int) -> str:
        """Name of a site by position."""
        return self.models.model_sites[site].name

    @cached_property
    def difference(self) -> Float[Tensor, "d_sae d_model"]:
        """d_j^1 - d_j^0: what a unit of each latent adds to the difference of the activations."""
        crosscoder = self.dictionary
        if self.models.is_difference:
            return crosscoder.decoder(0).detach()
        return (self.decoder(self.finetuned) - self.decoder(self.base)).detach()

    @cached_property
    def bias_difference(self) -> Float[Tensor, " d_model"]:
        """b^1 - b^0: what the dictionary's bias adds to the difference of the activations."""
        crosscoder = self.dictionary
        if self.models.is_difference:
            return crosscoder.decoder_bias(0).detach()
        of = crosscoder.decoder_bias
        return (of(self.finetuned) - of(self.base)).detach()

    def decoder(self, site: int) -> Float[Tensor, "d_sae d_model"]:
        """Rows that write to a site; those of a diff-SAE all write to the fine-tuned one."""
        if not self.models.is_difference:
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
        x = self.models.site_activations(text.tokens, range(len(self.models.model_sites)))
        return self.encoded(tuple(x), index=index, text=text)

    def encoded(
        self,
        x: tuple[Float[Tensor, "batch pos _"], ...],
        *,
        index: Int[Tensor, " contexts"],
        text: TokenizedText,
    ) -> "SiteActivations":
        """Activations of all sites with their codes."""
        models, counted, codes = self.models, text.mask.to(x[0].device), None
        if self.crosscoder is None and text.norm_limits is None:
            return SiteActivations(index=index, text=text, x=x, codes=codes, counted=counted)
        rows = models.joined([x[i] for i in models.read_sites])
        if text.norm_limits is not None:
            within = within_limits(rows.flatten(0, 1), models.sites, text.norm_limits)
            counted = counted & within.view_as(counted)
        if self.crosscoder is not None:
            codes = _at(sparse_codes(self.crosscoder, rows[counted]), counted.flatten())
        return SiteActivations(index=index, text=text, x=x, codes=codes, counted=counted)

    def batches(
        self,
        text: TokenizedText,
        *,
        batch_size: int = 32,
        description: str | None = None,
        axis: Axis = ALONE,
    ) -> Iterator["SiteActivations"]:
        """Activations of a whole text, `batch_size` contexts at a time; a description shows a bar.

        Of several processes each gives other contexts.

        Raises:
            ValueError: there is no text, or less than a context a process, or its tokens are not
                those of the models.
        """
        if not len(text):
            raise ValueError("there are no contexts: the text is empty.")
        parts = shared_batches(text, batch_size, axis)
        bar = progress(parts, desc=description, unit="batch", show=description is not None)
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
