"""Edits that latents make: ablation of the fine-tuned model, and steering of any.

Ablation takes out what some latents S add to the fine-tuned activation:

    delta:    x^1 - sum_{j in S} f_j (d_j^1 - d_j^0)     what the fine-tune added, the default
    zero:     x^1 - sum_{j in S} f_j d_j^1               all that the latents write
    project:  x^1 - Q Q' x^1                             Q spans the d_j^1; at every token, no codes

`delta` takes back the patch of Minder et al. 2025. Tokens without codes (BOS, first position) stay
as they are under `delta` and `zero`. Steering adds a direction at every token:

    h + alpha s d / ||d||        s: mean norm of the activation at this hook; alpha: the strength

so that strengths compare between layers and models. A direction is a latent's decoder row or any
vector `[d_model]`. Contract: edits `[batch, pos, d_model]`, for scoring or for `live`. Limit: s is
a mean over tokens that count; BOS, whose norm is far above it, is steered too.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.data.harvest import harvest_rows
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import AddLatents, AddVector, Edit, ProjectOut, unchanged
from tl_crosscoder.models.site import site_index, site_parts
from tl_crosscoder.models.source import ActivationSource

Mode = Literal["delta", "zero", "project"]
DIFFERENCE = "difference"
Direction = int | Float[Tensor, " d_model"]
"""A latent by number, or a vector."""


def ablation(
    ctx: InterventionContext, latents: Sequence[int] | Int[Tensor, " n"], mode: Mode = "delta"
) -> Edit:
    """The fine-tuned activation without some latents; the activation itself without any.

    Raises:
        ValueError: an unknown mode, or latents out of range.
    """
    check_mode(mode)
    ids = ctx.latents(latents)
    if not len(ids):
        return unchanged(ctx.finetuned)
    return ablation_along(ctx, ids, ablated_directions(ctx, ids, mode), mode)


def ablation_along(
    ctx: InterventionContext, ids: Int[Tensor, " n"], rows: Float[Tensor, "n d_model"], mode: Mode
) -> Edit:
    """Ablation of latents as if these rows were their directions."""
    site = ctx.finetuned
    if mode == "project":
        return ProjectOut(site=site, stream=site, directions=rows)
    return AddLatents(site=site, stream=site, latents=ids, directions=rows, sign=-1.0)


def check_mode(mode: str) -> None:
    """Raise ValueError for an unknown mode."""
    if mode not in get_args(Mode):
        raise ValueError(f"the mode of ablation is {mode!r}; it is one of {get_args(Mode)}.")


def ablated_directions(
    ctx: InterventionContext, ids: Int[Tensor, " n"], mode: Mode
) -> Float[Tensor, "n d_model"]:
    """What a unit of each latent takes out of the activation; the directions projected out."""
    return (ctx.difference if mode == "delta" else ctx.decoder(ctx.finetuned))[ids]


@torch.no_grad()
def activation_norms(
    source: ActivationSource, text: TokenizedText, *, batch_size: int = 32
) -> dict[str, float]:
    """The mean norm of each site's activation, over the tokens that count.

    Args:
        source: models, or a cache.
        text: like that which is steered on.
        batch_size: contexts a forward pass.

    Raises:
        ValueError: no token counts.
    """
    source = source.side_by_side()
    sums, n = torch.zeros(source.n_sites, dtype=torch.float64), 0
    for rows in harvest_rows(source, text, batch_size=batch_size):
        parts = site_parts(rows, source.sites)
        sums += torch.stack([part.double().norm(dim=1).sum().cpu() for part in parts])
        n += len(rows)
    if not n:
        raise ValueError("no token of the text counts, so there is no norm: give more text.")
    return dict(zip([s.name for s in source.sites], (sums / n).tolist(), strict=True))


def steering(
    ctx: InterventionContext,
    direction: Direction,
    *,
    strength: float,
    norm: float,
    site: str | None = None,
    of: str | None = None,
) -> AddVector:
    """Add a direction to one model's activation at every token.

    Args:
        ctx: models; with their dictionary where a direction is a latent.
        direction: a latent, or a vector, whose length does not matter.
        strength: alpha, in units of `norm`; below 0 steers away.
        norm: mean norm of the activation at the steered site, from `activation_norms`.
        site: name of the steered site; None is the fine-tuned one.
        of: which row of a latent is its direction: that of a site by name, or `difference` for
            d_j^1 - d_j^0. None is the fine-tuned row, whichever model is steered (methods).

    Raises:
        ValueError: a direction of zero or of another width, an unknown site or latent, a norm that
            is not above 0, or `of` beside a vector.
    """
    sites = ctx.models.model_sites
    at = ctx.finetuned if site is None else site_index(sites, site)
    if not norm > 0:
        raise ValueError(
            f"norm is {norm}; it is the mean norm of the site's activation (activation_norms)."
        )
    vector, name = _vector(ctx, direction, of)
    if vector.shape != (sites[at].d_model,):
        raise ValueError(
            f"{name} has shape {tuple(vector.shape)}, but the site {sites[at].name!r} is "
            f"{sites[at].d_model} wide."
        )
    length = vector.norm()
    if not (length > 0 and length.isfinite()):
        raise ValueError(
            f"{name} has length {length.item()}, so it has no direction. Steer by another one, "
            "such as the row of the other site."
        )
    return AddVector(site=at, stream=at, vector=(strength * norm / length * vector).float())


def _vector(
    ctx: InterventionContext, direction: Direction, of: str | None
) -> tuple[Float[Tensor, "..."], str]:
    """The direction, float64, and what to call it."""
    if isinstance(direction, Tensor):
        if of is not None:
            raise ValueError(f"of={of!r} chooses a row of a latent, but the direction is a vector.")
        return direction.detach().to(ctx.models.device).double(), "the direction"
    (latent,) = ctx.latents([direction]).tolist()
    if of == DIFFERENCE:
        return ctx.difference[latent].double(), f"the difference row of latent {latent}"
    at = ctx.finetuned if of is None else site_index(ctx.models.model_sites, of)
    name = f"the {ctx.site_name(at)} row of latent {latent}"
    return ctx.decoder(at)[latent].double(), name


def random_like(
    rows: Float[Tensor, "n d_model"],
    generator: torch.Generator,
    *,
    factor: Float[Tensor, "d_model d_model"] | None = None,
) -> Float[Tensor, "n d_model"]:
    """Gaussian directions, each of the norm of its row.

    Isotropic, or with the covariance F F' of a factor F; where that is nothing, they are zero.
    """
    noise = torch.randn(rows.shape, generator=generator).to(rows)
    noise = noise if factor is None else noise @ factor.to(rows).T
    return noise * (rows.norm(dim=1) / noise.norm(dim=1).clamp(min=1e-30))[:, None]
