"""What is patched: the variants, and the latents taken for the fine-tune's.

Contract: every variant is an `Edit` of the fine-tuned model's stream. Source: Minder et al. 2025.
Limit: candidates are chosen by Delta-norm; give `patching` other sets by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.geometry import LATENT_CLASSES, LatentClass
from tl_crosscoder.analysis.latents import MIN_ACTIVE_TOKENS, LatentMeasures, nu_keys
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import (
    AddLatents,
    Edit,
    EditAtTokens,
    ErrorAndBias,
    ProjectOut,
    ReplaceActivation,
    ReplaceWithReconstruction,
    TokenFilter,
)
from tl_crosscoder.interventions.running import unchanged

BASE, EVERYTHING = "base stream", "all latents"
N_RANDOM = 5
LEAST, SHARE = 10, 0.05
"""Where fewer latents are finetuned-only, this share of the living ones is taken."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table to be."""

    name: str
    group: str
    edit: Edit
    n_latents: int = 0


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The latents taken for the fine-tune's, by Delta-norm, and how they were chosen."""

    latents: Int[Tensor, " n"]
    how: str


def candidates(ctx: InterventionContext, latents: LatentMeasures) -> Candidates:
    """Living latents that are finetuned-only, or, where they are few, lean most to the fine-tune.

    Of a diff-SAE, which has no decoder norms to compare: those that say most of the difference.
    """
    alive = latents.n_active >= MIN_ACTIVE_TOKENS
    n_least = max(2, min(LEAST, int(alive.sum())))
    name: LatentClass = "finetuned-only" if ctx.base < ctx.finetuned else "base-only"
    lean = latents.delta_norm if name == "finetuned-only" else 1 - latents.delta_norm
    if ctx.is_of_difference:
        lean = _said_of_difference(ctx, latents)
        n = max(n_least, round(SHARE * int(alive.sum())))
        how = f"the {n} latents that say most of the difference"
    else:
        of_class = alive & (latents.class_ids == LATENT_CLASSES.index(name))
        n = int(of_class.sum())
        how = f"the {n} {name} latents"
        if n < n_least:
            few = f"{n} {name} latents are too few: "
            n = max(n_least, round(SHARE * int(alive.sum())))
            how = f"{few}the {n} living ones with the most extreme Delta-norm"
    order = lean.masked_fill(~alive, -torch.inf).nan_to_num(-torch.inf).argsort(descending=True)
    return Candidates(latents=order[:n].to(ctx.models.device), how=how)


def _said_of_difference(
    ctx: InterventionContext, latents: LatentMeasures
) -> Float[Tensor, " d_sae"]:
    return latents.firing.sum_of_codes * ctx.difference.norm(dim=1).cpu()


def patched(
    ctx: InterventionContext, chosen: Sequence[int] | Tensor, *, name: str, group: str
) -> Variant:
    """h_S."""
    ids = ctx.latents(chosen)
    return Variant(
        name=name,
        group=group,
        n_latents=len(ids),
        edit=AddLatents(
            site=ctx.finetuned,
            stream=ctx.base,
            latents=ids,
            directions=ctx.difference[ids],
        ),
    )


def whole(ctx: InterventionContext) -> list[Variant]:
    """The whole dictionary: streams, all latents, reconstructions, errors."""
    site, base, d_sae = ctx.finetuned, ctx.base, ctx.dictionary.cfg.d_sae
    every = patched(ctx, range(d_sae), name=EVERYTHING, group="dictionary")
    found = {
        BASE: ReplaceActivation(site=site, stream=base),
        "errors and biases, no latents": ErrorAndBias(site=site, ctx=ctx),
    }
    if not ctx.is_of_difference:
        parts = {"base": base, "fine-tuned": site}
        for name, own in parts.items():
            found[f"{name} reconstruction"] = ReplaceWithReconstruction(
                site=site, ctx=ctx, reconstruction=own
            )
        for name, own in parts.items():
            other = {"base": "fine-tuned", "fine-tuned": "base"}[name]
            found[f"{name} reconstruction, {other} error"] = ReplaceWithReconstruction(
                site=site, ctx=ctx, reconstruction=own, error=parts[other]
            )
    rest = [Variant(name=k, group="dictionary", edit=edit) for k, edit in found.items()]
    return [rest[0], every, *rest[1:]]


def of_candidates(
    ctx: InterventionContext, chosen: Int[Tensor, " n"], latents: LatentMeasures
) -> list[Variant]:
    """Candidates, their halves by what chose them and by nu, and other ways to patch them."""
    found = [patched(ctx, chosen, name="candidates", group="candidates")]
    first = "what they say" if ctx.is_of_difference else "Delta-norm"
    orders = {first: chosen, "nu": by_nu(ctx, chosen, latents)}
    for name, order in orders.items():
        if order is None or len(order) < 2:
            continue
        half = len(order) // 2
        found += [
            patched(ctx, order[:half], name=f"top half by {name}", group="candidates"),
            patched(ctx, order[half:], name=f"bottom half by {name}", group="candidates"),
        ]
    site, rows = ctx.finetuned, ctx.decoder(ctx.finetuned)[chosen]
    found.append(
        Variant(
            name="candidates, additive only",
            group="candidates",
            n_latents=len(chosen),
            edit=AddLatents(site=site, stream=ctx.base, latents=chosen, directions=rows),
        )
    )
    found.append(
        Variant(
            name="fine-tuned stream without candidates",
            group="candidates",
            n_latents=len(chosen),
            edit=ProjectOut(site=site, stream=site, directions=rows),
        )
    )
    return found


def by_nu(
    ctx: InterventionContext, chosen: Int[Tensor, " n"], latents: LatentMeasures
) -> Int[Tensor, " n"] | None:
    """Candidates by the sum of their ranks in |nu_error| and |nu_reconstruction|, lowest first."""
    direction = "finetuned" if ctx.base < ctx.finetuned else "base"
    scaling = latents.scaling.get(direction)
    if scaling is None:
        return None
    own = chosen.cpu()
    keys = nu_keys(scaling.nu_error.cpu()[own], scaling.nu_reconstruction.cpu()[own])
    order = keys.nan_to_num(-torch.inf).argsort(descending=True, stable=True)
    return chosen[order.to(chosen.device)]


def at_places(ctx: InterventionContext, kinds: Mapping[str, TokenFilter]) -> list[Variant]:
    """The fine-tuned stream itself at some tokens, and the base stream elsewhere."""
    site = ctx.finetuned
    places = {"template": TokenFilter(roles=("template",)), **kinds}
    return [
        Variant(
            name=f"fine-tuned stream at {name} tokens",
            group="places",
            edit=EditAtTokens(edit=unchanged(site), places=place, otherwise=ctx.base),
        )
        for name, place in places.items()
    ]


def random_controls(
    ctx: InterventionContext, chosen: Int[Tensor, " n"], latents: LatentMeasures, *, seed: int
) -> list[Variant]:
    """As many living latents drawn at random, and random directions in the candidates' place."""
    generator = torch.Generator().manual_seed(seed)
    living = (latents.n_active >= MIN_ACTIVE_TOKENS).nonzero().squeeze(1)
    found = []
    for i in range(N_RANDOM):
        drawn = living[torch.randperm(len(living), generator=generator)[: len(chosen)]]
        found.append(patched(ctx, drawn, name=f"random latents {i}", group="random"))
    for i in range(N_RANDOM):
        directions = random_like(ctx.difference[chosen], generator)
        edit = AddLatents(
            site=ctx.finetuned, stream=ctx.base, latents=chosen, directions=directions
        )
        found.append(
            Variant(
                name=f"candidates, random directions {i}",
                group="random",
                n_latents=len(chosen),
                edit=edit,
            )
        )
    return found


def random_like(
    rows: Float[Tensor, "n d_model"], generator: torch.Generator
) -> Float[Tensor, "n d_model"]:
    """Gaussian directions, each of the norm of its row."""
    noise = torch.randn(rows.shape, generator=generator).to(rows)
    return noise * (rows.norm(dim=1) / noise.norm(dim=1))[:, None]
