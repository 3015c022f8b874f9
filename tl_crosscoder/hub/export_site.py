"""One model's SAE out of a crosscoder: an approximation, with its error measured and written down.

    x ~ all sites from x^m, affinely: x^m M + c (`BaseEstimate`)
    f ~ JumpReLU(x^m M W_enc + c W_enc + b_enc),    x̂^m = sum_j f_j d_j^m + b_dec^m

Contract: `export_site` fits on one text, measures on another, and writes a `JumpReLUSAE` of width
d_model for one model at its hook. Limit: latents of another site suffer most (precision 0.70, and
0.89 elsewhere, on the embedded taboo pair); exact codes need all models: see
`analysis.saelens_evals.SiteSAE`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.analysis.reconstruction import Moments
from tl_crosscoder.crosscoder.checks import check_source
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.data.harvest import harvest_rows
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.hub.card import site_card
from tl_crosscoder.hub.export import exported_site, write_export
from tl_crosscoder.interventions.base_estimate import BaseEstimate
from tl_crosscoder.models.site import Site, site_parts
from tl_crosscoder.models.source import ActivationSource

N_ROWS = 1024
"""Tokens whose codes are dense at once."""


@dataclass(frozen=True, kw_only=True)
class SiteQuality:
    """How near a one-model SAE comes to its crosscoder, on some text."""

    fvu: float
    """sum ||x^m - x̂^m||^2 / sum ||x^m - mean||^2 of the SAE."""
    fvu_of_crosscoder: float
    """The same of the crosscoder, which sees all sites."""
    precision: float
    """Of the SAE's active (token, latent) pairs, the share that are active in the crosscoder."""
    recall: float
    """Of the crosscoder's, the share that are active in the SAE."""
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
    """Fit, measure and write a `JumpReLUSAE` of one model: approximate, and its card says how much.

    Args:
        folder: new or empty.
        crosscoder: of two sites or more.
        source: the models it was trained on, or a cache of them.
        fit_on: text that the estimate of the other sites is fitted on: many times d_model tokens.
        measure_on: another text.
        site: whose SAE; None is the fine-tuned one.
        batch_size: contexts a forward pass.

    Raises:
        ValueError: a folder that is not empty, an unknown or single site or one of a width of its
            own, a dictionary of other models, or a text of too few tokens.
    """
    files.new_folder(folder)
    check_source(source, crosscoder)
    at = exported_site(crosscoder, site)
    sites = crosscoder.sites
    compared = _other_site(sites, at).name, sites[at].name
    estimate = BaseEstimate.fit(source.comparing(*compared), fit_on, batch_size=batch_size)
    sae = one_model_sae(crosscoder, estimate)
    fve = estimate.quality(source, measure_on, batch_size=batch_size).fve
    rows = harvest_rows(source, measure_on, batch_size=batch_size)
    sums = [
        _Sums.of(crosscoder, sae, part, at=at) for batch in rows for part in batch.split(N_ROWS)
    ]
    quality = _quality(sums, fve)
    if sites[at].hook_name.endswith("_z"):
        sae.cfg.reshape_activations = "hook_z"  # where SAELens has the heads apart
    card = site_card(sites, at, sae.cfg.d_sae, quality=asdict(quality), n_fitted=estimate.n_tokens)
    about = {"site": sites[at].name, "quality": asdict(quality), "n_fitted": estimate.n_tokens}
    write_export(folder, sae, card, kind="side", **about)
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
    weights = {
        "W_enc": M @ W_enc,
        "b_enc": c @ W_enc + crosscoder.b_enc,
        "W_dec": crosscoder.decoder(at),
        "b_dec": crosscoder.decoder_bias(at),
        "threshold": crosscoder.threshold,
    }
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


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Of some tokens; adds up."""

    x: Moments
    error: float
    error_of_crosscoder: float
    n_active: int
    n_active_in_crosscoder: int
    n_both: int

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        crosscoder: Crosscoder,
        sae: JumpReLUSAE,
        rows: Float[Tensor, "tokens *row"],
        *,
        at: int,
    ) -> "_Sums":
        x = site_parts(rows, crosscoder.sites)[at]
        exact, found = crosscoder.encode(rows.flatten(start_dim=1)), sae.encode(x)
        x_hat = site_parts(crosscoder.decode(exact), crosscoder.sites)[at]
        return cls(
            x=Moments.of(x),
            error=(x - sae.decode(found)).double().square().sum().item(),
            error_of_crosscoder=(x - x_hat).double().square().sum().item(),
            n_active=int((found > 0).sum()),
            n_active_in_crosscoder=int((exact > 0).sum()),
            n_both=int(((found > 0) & (exact > 0)).sum()),
        )


def _quality(sums: list[_Sums], estimate_fve: dict[str, float]) -> SiteQuality:
    x = sums[0].x
    for more in sums[1:]:
        x = x + more.x
    variance = x.sum_of_squared_deviations.item()
    n_found, n_exact, n_both = (
        sum(getattr(s, name) for s in sums)
        for name in ("n_active", "n_active_in_crosscoder", "n_both")
    )
    return SiteQuality(
        fvu=_ratio(sum(s.error for s in sums), variance),
        fvu_of_crosscoder=_ratio(sum(s.error_of_crosscoder for s in sums), variance),
        precision=_ratio(n_both, n_found),
        recall=_ratio(n_both, n_exact),
        jaccard=_ratio(n_both, n_found + n_exact - n_both),
        l0=n_found / x.n,
        l0_of_crosscoder=n_exact / x.n,
        estimate_fve=estimate_fve,
        n_tokens=x.n,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
