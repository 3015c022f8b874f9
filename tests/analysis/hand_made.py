"""Crosscoders and measurements of which every number is chosen."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tl_crosscoder import Crosscoder, Measurement, Site
from tl_crosscoder.analysis.examples import (
    CollectedExamples,
    Example,
    ExampleCollector,
    ExampleSettings,
    TopTokens,
)
from tl_crosscoder.analysis.firing import Firing
from tl_crosscoder.analysis.geometry import delta_norm, relative_decoder_norm
from tl_crosscoder.analysis.latent_scaling import LatentScaling
from tl_crosscoder.analysis.latents import LatentMeasures, in_order
from tl_crosscoder.analysis.measurement import LatentSummary
from tl_crosscoder.analysis.reconstruction import Reconstruction
from tl_crosscoder.crosscoder.config import CrosscoderConfig
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes


def sites(d_model: int = 2) -> tuple[Site, Site]:
    base, finetuned = (
        Site(name=n, d_model=d_model, hook_name="blocks.1.hook_resid_post", model_name=f"tiny-{n}")
        for n in ("base", "finetuned")
    )
    return base, finetuned


def crosscoder(base: Tensor, finetuned: Tensor, *, b_dec: Tensor | None = None) -> Crosscoder:
    """With these two decoders, `[d_sae, d_model]`; the encoder is nothing."""
    W_dec = torch.cat([base, finetuned], dim=-1)
    d_sae, d_in = W_dec.shape
    made = Crosscoder(CrosscoderConfig(d_in=d_in, d_sae=d_sae, sites=sites(base.shape[1])))
    weights = {name: torch.zeros_like(t) for name, t in made.state_dict().items()}
    weights |= {"W_dec": W_dec} | ({} if b_dec is None else {"b_dec": b_dec})
    made.load_state_dict(weights)
    return made


def latent_measures(base: list[float], finetuned: list[float], n_active: list[int]):
    """Of latents with these decoder norms, on a text of one source."""
    norms = torch.tensor(base), torch.tensor(finetuned)
    counts = torch.tensor(n_active).double()
    return LatentMeasures(
        relative_decoder_norm=relative_decoder_norm(*norms),
        delta_norm=delta_norm(*norms),
        decoder_cosine=torch.ones(len(base)),
        encoder_cosine=torch.ones(len(base)),
        firing=firing(counts),
    )


def firing(counts: Tensor) -> Firing:
    """On a text of one source, where every token is one of plain text."""
    n_tokens = int(counts.max())
    by_role, by_position = (torch.zeros(n, len(counts)).double() for n in (6, 9))
    by_role[0] = by_position[0] = counts
    return Firing(
        n_tokens=n_tokens,
        sources=("text",),
        tokens_by_source=(n_tokens,),
        tokens_by_role=(n_tokens, 0, 0, 0, 0, 0),
        tokens_by_position=(n_tokens, 0, 0, 0, 0, 0, 0, 0, 0),
        n_active=counts,
        n_active_by_source=counts[None],
        n_active_by_role=by_role,
        n_active_by_position=by_position,
        sum_of_codes=counts,
        max_code=counts.clamp(max=1),
    )


def by_nu(direction: str, error: Sequence[float], reconstruction: Sequence[float]) -> LatentScaling:
    """Latent Scaling with these nu: betas of the own site are 1."""
    of = {"beta_error": error, "beta_reconstruction": reconstruction}
    betas = {k: torch.stack([torch.tensor(v), torch.ones(len(v))]).double() for k, v in of.items()}
    none = torch.ones(2, len(error)).double()
    return LatentScaling(
        direction=direction,
        beta_activation=none,
        beta_activation_no_bias=none,
        n_active=torch.ones(len(error)).double(),
        **betas,
    )


RECONSTRUCTION = Reconstruction(
    n_tokens=12_345,
    fve={"base": 0.9514, "finetuned": 0.9426},
    difference_fve=0.6788,
    difference_fve_by_class={
        "base-only": 0.0111,
        "shared": 0.2222,
        "other": 0.3333,
        "finetuned-only": 0.4444,
    },
    difference_share=0.0567,
    l0=12.34,
    dead_share=0.25,
)


def collected_examples(
    dense: Tensor,
    mask: Tensor,
    *,
    settings: ExampleSettings,
    order: Tensor | None = None,
    batch_size: int = 8,
) -> CollectedExamples:
    """As a pass over a text collects: rows of kept tokens, whole contexts in any order."""
    n, size, d_sae = dense.shape
    collector = ExampleCollector(d_sae, context_size=size, settings=settings)
    for index in (torch.arange(n) if order is None else order).split(batch_size):
        own = mask[index]
        positions = (index[:, None] * size + torch.arange(size))[own]
        collector.add(SparseCodes.of_dense(dense[index][own]), positions)
    return collector.result()


def example_rows(found: CollectedExamples) -> list[tuple]:
    """(latent, quantile, rank, value, position, window) of each example."""
    columns = (
        found.latents, found.quantiles, found.ranks, found.values, found.positions, found.windows
    )  # fmt: skip
    return list(zip(*(c.tolist() for c in columns), strict=True))


def no_tokens(d_sae: int) -> TopTokens:
    return TopTokens(values=torch.zeros(2, d_sae), positions=torch.full((2, d_sae), -1))


def measurement(
    latents: LatentMeasures,
    *,
    examples: dict[int, list[Example]],
    top_tokens: TopTokens | None = None,
    reconstruction: Reconstruction = RECONSTRUCTION,
) -> Measurement:
    """The latents with examples are the ranked ones."""
    rows = in_order(latents, [*examples], order="relative_decoder_norm").rows
    top = [LatentSummary(ranked=row, examples=examples[row.latent]) for row in rows]
    return Measurement(
        reconstruction=reconstruction,
        latents=latents,
        top=top,
        order="relative_decoder_norm",
        top_tokens=top_tokens or no_tokens(len(latents.n_active)),
        sources=("text",),
    )
