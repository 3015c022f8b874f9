"""Crosscoders as SAELens loads them where this package is not installed.

Contract: each export is a new folder with `cfg.json`, `sae_weights.safetensors` and a `README.md`
that says what it is. `export_concat` (all sites in, all out) and `export_transcoder` (all in, one
out) are exact; for one model alone see `export_site`. Limit: SAELens knows no sites, so inputs are
put side by side by hand, in the order of the card.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import JumpReLUTranscoder, JumpReLUTranscoderConfig
from torch import Tensor

import tl_crosscoder
from tl_crosscoder import files
from tl_crosscoder.crosscoder.crosscoder import CFG_NAME, WEIGHTS_NAME, Crosscoder
from tl_crosscoder.hub.card import concat_card, transcoder_card
from tl_crosscoder.models.saelens import PairView
from tl_crosscoder.models.site import compared_sites
from tl_crosscoder.results.tables import without_nan

CARD_NAME = "README.md"


def export_concat(folder: str | Path, crosscoder: Crosscoder) -> Path:
    """Write a `JumpReLUSAE` over the sites side by side: the same dictionary, exactly.

    Raises ValueError for a folder that is not empty.
    """
    sae = crosscoder.to_saelens()
    # Where activations of this form pass: the hook of `as_hooked_model()`.
    sae.cfg.metadata.hook_name = PairView.HOOK_NAME
    return write_export(folder, sae, concat_card(crosscoder.sites, sae.cfg.d_sae), kind="concat")


def export_transcoder(
    folder: str | Path, crosscoder: Crosscoder, *, site: str | None = None
) -> Path:
    """Write a `JumpReLUTranscoder` from the sites side by side to one of them, exactly.

    Args:
        folder: new or empty.
        crosscoder: of two sites or more.
        site: which is reconstructed; None is the fine-tuned one.

    Raises:
        ValueError: a folder that is not empty, an unknown site, or a single site.
    """
    at = exported_site(crosscoder, site)
    sae = site_transcoder(crosscoder, at)
    card = transcoder_card(crosscoder.sites, at, sae.cfg.d_sae)
    return write_export(folder, sae, card, kind="transcoder", site=crosscoder.sites[at].name)


@torch.no_grad()
def site_transcoder(crosscoder: Crosscoder, site: int) -> JumpReLUTranscoder:
    """From all sites side by side to one; a bias taken off the input is folded into `b_enc`."""
    metadata = crosscoder.cfg.metadata.to_dict() | {"hook_name": PairView.HOOK_NAME}
    cfg = JumpReLUTranscoderConfig(
        d_in=crosscoder.cfg.d_in,
        d_sae=crosscoder.cfg.d_sae,
        d_out=crosscoder.sites[site].d_model,
        dtype=crosscoder.cfg.dtype,
        device=crosscoder.cfg.device,
        apply_b_dec_to_input=False,
        metadata=SAEMetadata.from_dict(metadata),
    )
    sae = JumpReLUTranscoder(cfg)
    weights = {
        "W_enc": crosscoder.W_enc,
        "b_enc": input_bias_folded(crosscoder, crosscoder.W_enc, crosscoder.b_dec),
        "W_dec": crosscoder.decoder(site),
        "b_dec": crosscoder.decoder_bias(site),
        "threshold": crosscoder.threshold,
    }
    sae.load_state_dict(weights)
    return sae


def input_bias_folded(
    crosscoder: Crosscoder, W_enc: Float[Tensor, "d d_sae"], b_dec: Float[Tensor, " d"]
) -> Float[Tensor, " d_sae"]:
    """`b_enc` for an input from which no bias is taken off."""
    if not crosscoder.cfg.apply_b_dec_to_input:
        return crosscoder.b_enc
    return (crosscoder.b_enc.double() - b_dec.double() @ W_enc.double()).to(crosscoder.b_enc)


def exported_site(crosscoder: Crosscoder, site: str | None) -> int:
    """Position of the site, of None the fine-tuned one. Raises ValueError where there is none."""
    compared = compared_sites(crosscoder.sites)
    if compared is None:
        raise ValueError(
            f"the dictionary has one site, {crosscoder.sites[0].name!r}, and is an SAE of it "
            "already: export it as concat."
        )
    return compared[1] if site is None else crosscoder.site_index(site)


def write_export(
    folder: str | Path, sae: JumpReLUSAE | JumpReLUTranscoder, card: str, **about: Any
) -> Path:
    """Write config, weights and card, all or none. Raises ValueError for a folder in use."""
    folder = files.new_folder(folder)
    # Less than 32 bits would round thresholds and with them change what is active.
    dtype = torch.float64 if sae.dtype == torch.float64 else torch.float32
    made_with = f"tl_crosscoder {tl_crosscoder.__version__}"
    metadata = sae.cfg.metadata.to_dict() | {"made_with": made_with, "export": about}
    cfg = sae.cfg.to_dict() | {
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "metadata": without_nan(metadata),
    }
    with files.replacing(folder) as temporary:
        weights = {name: tensor.to(dtype) for name, tensor in sae.state_dict().items()}
        files.write_tensors(temporary / WEIGHTS_NAME, weights)
        files.write_json(temporary / CFG_NAME, cfg)
        files.write_text(temporary / CARD_NAME, card)
    return folder
