"""Sites of a dictionary: views of its parameters, and whether they are those of the models at hand.

Contract: parameters are SAELens's, `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_in]`, `b_dec [d_in]`,
with the sites side by side in `d_in`; views share their memory. `check_source` refuses models
before any work where sites, models, weight processing or tokenizer are not those of training.
Limits: stacked activations need sites of equal width; models are told apart by name, revision and
adapter, and a field that an old dictionary lacks is not compared.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.crosscoder.config import CrosscoderConfig
from tl_crosscoder.models.site import Site
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.models.tokenizer import tokenizer_sha256


def split_sites(flat: Tensor, sites: tuple[Site, ...], *, dim: int = -1) -> tuple[Tensor, ...]:
    """Views of a concatenation, one per site, along `dim`."""
    return flat.split([s.d_model for s in sites], dim=dim)


class SiteViews:
    """Per-site views of flattened parameters, shared by the trained and the training class."""

    cfg: CrosscoderConfig
    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, in the order of the concatenation; site 0 is the base."""
        return self.cfg.sites

    @property
    def n_sites(self) -> int:
        """Number of sites."""
        return len(self.cfg.sites)

    def site_index(self, site: str | int) -> int:
        """Position of a site given by name or position."""
        names = [s.name for s in self.sites]
        if isinstance(site, str) and site in names:
            return names.index(site)
        if isinstance(site, int) and -len(names) <= site < len(names):
            return site % len(names)
        raise ValueError(f"site {site!r} is not in this crosscoder; its sites are {names}.")

    def encoder(self, site: str | int) -> Float[Tensor, "d_model d_sae"]:
        """View of the encoder of one site, raw space."""
        return split_sites(self.W_enc, self.sites, dim=0)[self.site_index(site)]

    def decoder(self, site: str | int) -> Float[Tensor, "d_sae d_model"]:
        """View of the decoder of one site, raw space."""
        return split_sites(self.W_dec, self.sites)[self.site_index(site)]

    def decoder_bias(self, site: str | int) -> Float[Tensor, " d_model"]:
        """View of the decoder bias of one site, raw space."""
        return split_sites(self.b_dec, self.sites)[self.site_index(site)]

    def decoder_norms(self) -> Float[Tensor, "d_sae n_sites"]:
        """||d_j^m|| in the normalised space, where training saw every site at the same size.

        A saved dictionary works on raw activations; multiplying by the site's scale undoes that.
        """
        rows = zip(split_sites(self.W_dec, self.sites), self.sites, strict=True)
        return torch.stack([r.norm(dim=-1) * s.scale for r, s in rows], dim=-1)

    def get_W_dec_norm(self) -> Float[Tensor, " d_sae"]:
        """n_j = sum_m ||d_j^m||, the weight of a latent in selection, penalties and folding."""
        return self.decoder_norms().sum(dim=-1).clamp(min=1e-8)

    @torch.no_grad()
    def fold_site_scales_(self, scales: Sequence[float]) -> None:
        """Make a dictionary for activations times `scales` one for the activations themselves.

        The scales, one per site, are recorded in the sites: decoder norms are read through them.
        """
        for site, scale in enumerate(scales):
            self.encoder(site).mul_(scale)
            self.decoder(site).div_(scale)
            self.decoder_bias(site).div_(scale)
        pairs = zip(self.sites, scales, strict=True)
        self.cfg.sites = tuple(replace(s, scale=s.scale * scale) for s, scale in pairs)
        self.cfg.metadata.sites = [s.to_dict() for s in self.cfg.sites]

    def flatten(self, x: Tensor) -> Float[Tensor, "... d_in"]:
        """Stacked `[..., n_sites, d_model]` or flat `[..., d_in]` activations as flat ones."""
        d_in = self.cfg.d_in
        if x.shape[-1] == d_in:  # also where a single site's axis could be taken for another
            return x
        if x.ndim >= 2 and x.shape[-2] == self.n_sites and x.shape[-2] * x.shape[-1] == d_in:
            return rearrange(x, "... site d_model -> ... (site d_model)")
        raise ValueError(
            f"activations of shape {list(x.shape)} do not fit this crosscoder: it takes "
            f"[..., {self.n_sites}, d_model] or [..., {d_in}] for the sites "
            f"{[(s.name, s.d_model) for s in self.sites]}."
        )


def check_source(source: ActivationSource, crosscoder: SiteViews) -> None:
    """Refuse models that are not those of the dictionary.

    Raises:
        ValueError: other hook points, widths, models, weight processing or tokenizer, or another
            device.
    """
    check_sites(source, crosscoder)
    theirs, ours = ([_model(s) for s in of.sites] for of in (crosscoder, source))
    if theirs != ours:
        raise ValueError(
            f"the dictionary was trained on {_listed(theirs)}, but the models are {_listed(ours)}. "
            "Load those that it names. If they are the same under other names, say so with "
            "crosscoder.rename_models_(pair.sites)."
        )
    metadata = crosscoder.cfg.metadata
    processing = getattr(metadata, "weight_processing", None)
    if processing not in (None, source.weight_processing):
        raise ValueError(
            f"the dictionary was trained on models with {processing} weights, but these have "
            f"{source.weight_processing} ones (norms folded or weights centred), which moves "
            "activations to other coordinates. Load the models the other way."
        )
    made_with = getattr(metadata, "tokenizer_sha256", None)
    if made_with not in (None, tokenizer_sha256(source.tokenizer)):
        raise ValueError(
            "the dictionary was trained with another tokenizer than that of these models. Give "
            "them the one it was trained with (tokenizer=...)."
        )
    device = crosscoder.W_dec.device
    if device != source.device:
        raise ValueError(
            f"the crosscoder is on {device} and the models on {source.device}: load it with "
            f"Crosscoder.load(..., device='{source.device}')."
        )


def check_sites(source: ActivationSource, crosscoder: SiteViews) -> None:
    """Refuse models whose hook points or widths are not those of the dictionary."""
    theirs, ours = ([_where(s) for s in of.sites] for of in (crosscoder, source))
    if theirs != ours:
        is_difference = any(s.minus for s in crosscoder.sites)
        raise ValueError(
            f"the crosscoder was trained on the sites {theirs}, but the models have {ours}. Load "
            "the models with the hook point that the dictionary's cfg.json names"
            + (", and take their pair.difference()." if is_difference else ".")
        )


def _where(site: Site) -> tuple[Any, ...]:
    minus = ("minus", _where(site.minus)) if site.minus else ()
    return site.name, site.hook_name, site.d_model, *minus


def _model(site: Site) -> tuple[Any, ...]:
    minus = _model(site.minus) if site.minus else ()
    return site.model_name, site.revision, site.adapter, *minus


def _listed(models: list[tuple[Any, ...]]) -> str:
    return "; ".join(" ".join(str(part) for part in m if part is not None) for m in models)


def checked_latents(
    latents: Sequence[int] | Int[Tensor, " n"], crosscoder: SiteViews
) -> Int[Tensor, " n"]:
    """Latents as a tensor. Raises ValueError where there is none, or one is out of range."""
    d_sae = crosscoder.cfg.d_sae
    ids = torch.as_tensor(latents, dtype=torch.long).to(crosscoder.W_dec.device)
    bad = ids[(ids < 0) | (ids >= d_sae)].tolist()
    if bad or not len(ids):
        raise ValueError(
            f"latents {bad or '[]'} are not in the dictionary: name at least one of its {d_sae:,}, "
            f"numbered 0 to {d_sae - 1}."
        )
    return ids
