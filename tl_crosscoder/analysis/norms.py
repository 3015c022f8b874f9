"""Which model a latent writes to, read off its decoder.

Contract: functions of the two decoders of a pair, `[d_sae, d_model]`, in the normalised space (each
row times its site's scale), or of their norms. One orientation throughout: 1 is the fine-tuned
model, 0 the base. Limit: norms alone say nothing about causes; see Latent Scaling for that.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.models.site import Site

LatentClass = Literal["base-only", "shared", "other", "finetuned-only"]
LATENT_CLASSES: tuple[LatentClass, ...] = get_args(LatentClass)
NORMS = ("relative_decoder_norm", "delta_norm", "decoder_cosine", "encoder_cosine")


def norm_measures(
    crosscoder: Crosscoder, pair: tuple[int, int] | None
) -> dict[str, Float[Tensor, " d_sae"]]:
    """The measures `NORMS` of two sites, base first; NaN for None, a single site."""
    if pair is None:
        none = crosscoder.W_dec.new_full((crosscoder.cfg.d_sae,), torch.nan)
        return dict.fromkeys(NORMS, none)
    decoders = normalised_decoders(crosscoder.W_dec, crosscoder.sites, pair)
    base, finetuned = (d.norm(dim=-1) for d in decoders)
    return {
        "relative_decoder_norm": relative_decoder_norm(base, finetuned),
        "delta_norm": delta_norm(base, finetuned),
        "decoder_cosine": decoder_cosine(*decoders),
        "encoder_cosine": decoder_cosine(*(crosscoder.encoder(i).detach().T for i in pair)),
    }


def normalised_decoders(
    W_dec: Float[Tensor, "d_sae d_in"], sites: Sequence[Site], pair: tuple[int, int]
) -> tuple[Float[Tensor, "d_sae _"], Float[Tensor, "d_sae _"]]:
    """The decoders of two sites, base first, in the normalised space.

    There the mean squared norm of a site is its width, so a wider site has longer rows: they are
    brought to the base's width, by a factor that is 1 where widths are equal.
    """
    rows = W_dec.detach().split([s.d_model for s in sites], dim=-1)
    base, finetuned = (rows[i] * sites[i].scale for i in pair)
    return base, finetuned * (base.shape[1] / finetuned.shape[1]) ** 0.5


def relative_decoder_norm(
    base: Float[Tensor, " d_sae"], finetuned: Float[Tensor, " d_sae"]
) -> Float[Tensor, " d_sae"]:
    """R_j = ||d_j^1|| / (||d_j^0|| + ||d_j^1||), in [0, 1], from the two norms.

    0 is base-only, 0.5 shared, 1 finetuned-only; NaN where both norms are zero.
    Source: Kassem et al. 2026, oriented to the fine-tune.
    """
    return finetuned / (base + finetuned)


def delta_norm(
    base: Float[Tensor, " d_sae"], finetuned: Float[Tensor, " d_sae"]
) -> Float[Tensor, " d_sae"]:
    """1/2 (1 + (||d_j^1|| - ||d_j^0||) / max(||d_j^0||, ||d_j^1||)), in [0, 1].

    0 is base-only, 0.5 equal norms, 1 finetuned-only; NaN where both norms are zero.
    Source: Minder et al. 2025, equation 5.
    """
    return (1 + (finetuned - base) / torch.maximum(base, finetuned)) / 2


def latent_class_ids(delta_norms: Float[Tensor, " d_sae"]) -> Int[Tensor, " d_sae"]:
    """Index into `LATENT_CLASSES`: >= 0.9 finetuned-only, <= 0.1 base-only, 0.4 to 0.6 shared.

    Everything else is `other`, a latent without norm (NaN) too. Source: Minder et al. 2025.
    """
    ids = torch.full_like(delta_norms, LATENT_CLASSES.index("other"), dtype=torch.long)
    ids[delta_norms >= 0.9] = LATENT_CLASSES.index("finetuned-only")
    ids[delta_norms <= 0.1] = LATENT_CLASSES.index("base-only")
    ids[(delta_norms >= 0.4) & (delta_norms <= 0.6)] = LATENT_CLASSES.index("shared")
    return ids


def decoder_cosine(
    base: Float[Tensor, "d_sae _"], finetuned: Float[Tensor, "d_sae _"]
) -> Float[Tensor, " d_sae"]:
    """Cosine of each latent's two decoder rows; 0 where one of them is zero.

    NaN for sites of unequal width, whose rows make no angle.
    """
    if base.shape != finetuned.shape:
        return base.new_full((len(base),), torch.nan)
    return torch.nn.functional.cosine_similarity(base, finetuned, dim=-1)
