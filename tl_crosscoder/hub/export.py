"""Crosscoders as SAELens loads them where this package is not installed.

    x ~ all sites from x^m, affinely: x^m M + c (`BaseEstimate`)
    f ~ JumpReLU(x^m M W_enc + c W_enc + b_enc),    x̂^m = sum_j f_j d_j^m + b_dec^m

Each export is a new folder with `cfg.json`, `sae_weights.safetensors` and a `README.md`.
`export_concat` (all sites in, all out) and `export_transcoder` (all in, one out) are exact.
`export_site` (one model in and out, as above) is an approximation, fitted on one text and measured
on another. Limit: latents of the other sites suffer most in it (precision 0.70, and 0.89 elsewhere,
on the embedded taboo pair); `analysis.saelens_evals.SiteSAE` is exact, with all models at hand.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import JumpReLUTranscoder, JumpReLUTranscoderConfig
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.analysis.reconstruction import Moments
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.site_views import check_source
from tl_crosscoder.data.harvest import harvest_rows
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.files import CFG_NAME, WEIGHTS_NAME
from tl_crosscoder.hub.card import export_card
from tl_crosscoder.interventions.base_estimate import BaseEstimate
from tl_crosscoder.models.saelens import PairView
from tl_crosscoder.models.site import Site, compared_sites, site_parts
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.results.tables import without_nan

N_ROWS = 1024
"""Tokens whose codes are dense at once."""


def export_concat(folder: str | Path, crosscoder: Crosscoder) -> Path:
    """Write a `JumpReLUSAE` over the sites side by side: the same dictionary, exactly.

    Raises ValueError for a folder that is not empty.
    """
    sae = crosscoder.to_saelens()
    # The hook of `as_hooked_model()`, where activations of this form pass.
    sae.cfg.metadata.hook_name = PairView.HOOK_NAME
    card = export_card("concat", crosscoder.sites, sae.cfg.d_sae)
    return write_export(folder, sae, card, kind="concat")


@torch.no_grad()
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
    at, cfg = exported_site(crosscoder, site), crosscoder.cfg
    b_enc, b_dec = crosscoder.b_enc, crosscoder.b_dec.double()
    if cfg.apply_b_dec_to_input:  # a transcoder subtracts nothing from its input
        b_enc = (b_enc.double() - b_dec @ crosscoder.W_enc.double()).to(b_enc)
    metadata = cfg.metadata.to_dict() | {"hook_name": PairView.HOOK_NAME}
    transcoder_cfg = JumpReLUTranscoderConfig(
        d_in=cfg.d_in,
        d_sae=cfg.d_sae,
        d_out=crosscoder.sites[at].d_model,
        dtype=cfg.dtype,
        device=cfg.device,
        apply_b_dec_to_input=False,
        metadata=SAEMetadata.from_dict(metadata),
    )
    sae = JumpReLUTranscoder(transcoder_cfg)
    sae.load_state_dict(_site_weights(crosscoder, at, W_enc=crosscoder.W_enc, b_enc=b_enc))
    card = export_card("transcoder", crosscoder.sites, cfg.d_sae, at=at)
    return write_export(folder, sae, card, kind="transcoder", site=crosscoder.sites[at].name)


def _site_weights(
    crosscoder: Crosscoder,
    at: int,
    *,
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
) -> dict[str, Tensor]:
    """State of an SAE with this encoder and the decoder of one site."""
    return {
        "W_enc": W_enc,
        "b_enc": b_enc,
        "W_dec": crosscoder.decoder(at),
        "b_dec": crosscoder.decoder_bias(at),
        "threshold": crosscoder.threshold,
    }


def exported_site(crosscoder: Crosscoder, site: str | None) -> int:
    """Position of a site by name, for None of the fine-tuned one. Raises ValueError for no such."""
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
    made_with = f"tl_crosscoder {version('tl-crosscoder')}"
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
        files.write_text(temporary / "README.md", card)
    return folder


@dataclass(frozen=True, kw_only=True)
class SiteQuality:
    """How close a one-model SAE is to its crosscoder, on some text."""

    fvu: float
    """sum ||x^m - x̂^m||^2 / sum ||x^m - mean||^2 of the SAE."""
    fvu_of_crosscoder: float
    """FVU of the crosscoder, which sees all sites."""
    precision: float
    """Share of the SAE's active (token, latent) pairs that are active in the crosscoder."""
    recall: float
    """Share of the crosscoder's active pairs that are active in the SAE."""
    jaccard: float
    """Pairs active in both over pairs active in either (Jaccard 1912)."""
    l0: float
    """Active latents a token in the SAE."""
    l0_of_crosscoder: float
    estimate_fve: dict[str, float]
    """Fraction of variance that the affine estimate explains of each other site."""
    n_tokens: int


def export_site(
    folder: str | Path,
    crosscoder: Crosscoder,
    *,
    source: ActivationSource,
    fit_on: TokenizedText,
    measure_on: TokenizedText,
    site: str | None = None,
    batch_size: int = 32,
) -> SiteQuality:
    """Fit, measure and write a `JumpReLUSAE` of one model: its card records how close it is.

    Args:
        folder: new or empty.
        crosscoder: of two sites or more.
        source: the models it was trained on, or a cache of them.
        fit_on: text that the estimate of the other sites is fitted on: many times d_model tokens.
        measure_on: another text.
        site: whose SAE; None is the fine-tuned one.
        batch_size: contexts a forward pass.

    Raises:
        ValueError: a folder that is not empty, an unknown or single site or one whose width no
            other has, a dictionary of other models, or a text of too few tokens.
    """
    folder = files.new_folder(folder)
    check_source(source, crosscoder)
    at, sites = exported_site(crosscoder, site), crosscoder.sites
    compared = _other_site(sites, at).name, sites[at].name
    estimate = BaseEstimate.fit(source.comparing(*compared), fit_on, batch_size=batch_size)
    sae = one_model_sae(crosscoder, estimate)
    fve = estimate.quality(source, measure_on, batch_size=batch_size).fve
    batches = harvest_rows(source, measure_on, batch_size=batch_size)
    quality = SiteQuality(**_overlap(crosscoder, sae, batches, at=at), estimate_fve=fve)
    if sites[at].hook_name.endswith("_z"):
        sae.cfg.reshape_activations = "hook_z"  # SAELens has the heads apart there
    about = {"quality": asdict(quality), "n_fitted": estimate.n_tokens}
    card = export_card("site", sites, sae.cfg.d_sae, at=at, **about)
    write_export(folder, sae, card, kind="site", site=sites[at].name, **about)
    return quality


@torch.no_grad()
def one_model_sae(crosscoder: Crosscoder, estimate: BaseEstimate) -> JumpReLUSAE:
    """The SAE of the site that `estimate` estimates from, with the estimate in its encoder.

    Raises ValueError for an estimate of other sites.
    """
    estimate.check_sites(crosscoder.sites)
    at, metadata = estimate.finetuned, crosscoder.cfg.metadata
    site = crosscoder.sites[at]
    M, c = (t.to(crosscoder.W_enc.device, torch.float64) for t in estimate.matrix())
    if crosscoder.cfg.apply_b_dec_to_input:
        c = c - crosscoder.b_dec
    W_enc = crosscoder.W_enc.double()
    kept = {n: metadata[n] for n in ("weight_processing", "tokenizer_sha256") if n in metadata}
    cfg = JumpReLUSAEConfig(
        d_in=site.d_model,
        d_sae=crosscoder.cfg.d_sae,
        dtype="float32",
        device=crosscoder.cfg.device,
        apply_b_dec_to_input=False,
        metadata=SAEMetadata(
            hook_name=site.hook_name,
            model_name=site.label,
            prepend_bos=True,
            sites=[s.to_dict() for s in crosscoder.sites],
            **kept,
        ),
    )
    sae = JumpReLUSAE(cfg)
    b_enc = c @ W_enc + crosscoder.b_enc
    weights = _site_weights(crosscoder, at, W_enc=M @ W_enc, b_enc=b_enc)
    sae.load_state_dict({name: t.to(torch.float32) for name, t in weights.items()})
    return sae


def _other_site(sites: tuple[Site, ...], at: int) -> Site:
    """The first of the same width, which the quality of the estimate compares with."""
    for i, site in enumerate(sites):
        if i != at and site.d_model == sites[at].d_model:
            return site
    raise ValueError(
        f"no other site is as wide as {sites[at].name!r}, {[(s.name, s.d_model) for s in sites]}: "
        "an estimate is between sites of one width. Export it as transcoder, which is exact."
    )


@torch.no_grad()
def _overlap(
    crosscoder: Crosscoder,
    sae: JumpReLUSAE,
    batches: Iterable[Float[Tensor, "batch *row"]],
    *,
    at: int,
) -> dict[str, Any]:
    """Fields of `SiteQuality`, but for the estimate's, from sums over all tokens."""
    moments, sums = None, torch.zeros(5, dtype=torch.float64)
    for rows in (part for batch in batches for part in batch.split(N_ROWS)):
        x = site_parts(rows, crosscoder.sites)[at]
        exact, found = crosscoder.encode(rows.flatten(start_dim=1)), sae.encode(x)
        x_hat = site_parts(crosscoder.decode(exact), crosscoder.sites)[at]
        errors = [(x - each).double().square().sum() for each in (sae.decode(found), x_hat)]
        active = [found > 0, exact > 0, (found > 0) & (exact > 0)]
        sums += torch.stack([*errors, *(each.sum().double() for each in active)]).cpu()
        moments = Moments.of(x) if moments is None else moments + Moments.of(x)
    assert moments is not None
    error, error_of_crosscoder, n_found, n_exact, n_both = sums.tolist()
    variance = moments.sum_of_squared_deviations.item()
    return {
        "fvu": _ratio(error, variance),
        "fvu_of_crosscoder": _ratio(error_of_crosscoder, variance),
        "precision": _ratio(n_both, n_found),
        "recall": _ratio(n_both, n_exact),
        "jaccard": _ratio(n_both, n_found + n_exact - n_both),
        "l0": n_found / moments.n,
        "l0_of_crosscoder": n_exact / moments.n,
        "n_tokens": moments.n,
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
