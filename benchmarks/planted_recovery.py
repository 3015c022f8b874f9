"""Which planted features a dictionary found, and what it claims for the fine-tune alone.

A feature's latent is the living one whose decoder has the largest cosine with it, at the site where
the feature lives, at both side by side for a shared one. It counts as found by direction above a
cosine of 0.9, and as recovered where it is also of the right class by Delta-norm. A diff-SAE has no
classes: its latents are compared with v^1 - v^0, and features that both sites share are not there.
Limit: several latents for one feature (splitting) are not told apart from one.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from planted_world import PlantedWorld
from torch import Tensor

from tl_crosscoder.analysis.geometry import LATENT_CLASSES, latent_class_ids, norm_measures
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.models.site import compared_sites

MIN_COSINE = 0.9
CLASS_OF_KIND = {
    "base-only": "base-only",
    "finetuned-only": "finetuned-only",
    "shared": "shared",
    "rotated": "shared",
}


def class_ids(crosscoder: Crosscoder) -> Int[Tensor, " d_sae"] | None:
    """Class of each latent; None of a single site."""
    pair = compared_sites(crosscoder.sites)
    if pair is None:
        return None
    return latent_class_ids(norm_measures(crosscoder, pair)["delta_norm"])


def cosines(
    features: Float[Tensor, "n_features d"], decoder: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "n_features d_sae"]:
    """|cos| of features and latents; 0 where one of them is zero."""
    unit = [v / v.norm(dim=-1, keepdim=True).clamp(min=1e-12) for v in (features, decoder)]
    return (unit[0] @ unit[1].T).abs()


def feature_cosines(
    world: PlantedWorld, crosscoder: Crosscoder
) -> Float[Tensor, "n_features d_sae"]:
    """Cosine of each feature with each latent, at the sites that the feature has."""
    if crosscoder.n_sites == 1:
        difference = world.directions[:, 1] - world.directions[:, 0]
        return cosines(difference, crosscoder.W_dec.detach())
    decoders = crosscoder.W_dec.detach().unflatten(-1, (2, -1))
    at = {
        "base-only": cosines(world.directions[:, 0], decoders[:, 0]),
        "finetuned-only": cosines(world.directions[:, 1], decoders[:, 1]),
        "shared": cosines(world.directions.flatten(1), decoders.flatten(1)),
    }
    return torch.stack([at[CLASS_OF_KIND[kind]][i] for i, kind in enumerate(world.kinds)])


def planted_recovery(
    world: PlantedWorld, crosscoder: Crosscoder, is_living: Bool[Tensor, " d_sae"]
) -> dict[str, Any]:
    """By kind and for the rare features: how many there are, found by direction, recovered."""
    best = (feature_cosines(world, crosscoder) * is_living).max(dim=-1)
    is_found = best.values > MIN_COSINE
    classes = class_ids(crosscoder)
    is_recovered = None
    if classes is not None:
        expected = [LATENT_CLASSES.index(CLASS_OF_KIND[kind]) for kind in world.kinds]
        is_recovered = is_found & (classes[best.indices] == torch.tensor(expected))
    groups = {kind: [k == kind for k in world.kinds] for kind in dict.fromkeys(world.kinds)}
    for kind in list(groups):
        rare = [k == kind and r for k, r in zip(world.kinds, world.is_rare, strict=True)]
        groups |= {f"rare {kind}": rare} if any(rare) else {}
    if classes is None:
        groups = {name: which for name, which in groups.items() if not name.endswith("shared")}
    return {
        name: {
            "n": sum(which),
            "found": int(is_found[which].sum()),
            "recovered": None if is_recovered is None else int(is_recovered[which].sum()),
            "mean_cosine": best.values[which].mean().item(),
        }
        for name, which in groups.items()
    }


def claimed_finetuned_only(
    world: PlantedWorld, crosscoder: Crosscoder, is_living: Bool[Tensor, " d_sae"]
) -> dict[str, int] | None:
    """Living latents of the class finetuned-only: how many there are, and how many are false.

    True is one whose decoder at the fine-tuned site is along a finetuned-only feature. Of the false
    ones, `n_along_a_difference` lie along v^1 - v^0 of another feature that the sites do not share:
    where a recipe ties its shared latents, that is the only way to say that it differs.
    """
    classes = class_ids(crosscoder)
    if classes is None:
        return None
    is_claimed = is_living & (classes == LATENT_CLASSES.index("finetuned-only"))
    decoder = crosscoder.decoder(1).detach()[is_claimed]
    is_own = torch.tensor([kind == "finetuned-only" for kind in world.kinds])
    is_true = _along(world.directions[is_own, 1], decoder)
    others = (world.directions[:, 1] - world.directions[:, 0])[~is_own]
    is_difference = _along(others, decoder) & ~is_true
    return {
        "n": int(is_claimed.sum()),
        "n_false": int((~is_true).sum()),
        "n_along_a_difference": int(is_difference.sum()),
    }


def _along(
    features: Float[Tensor, "n_features d"], decoder: Float[Tensor, "n_latents d"]
) -> Bool[Tensor, " n_latents"]:
    """Whether each latent is along one of the features; none is, of no features."""
    if len(features) == 0:
        return torch.zeros(len(decoder), dtype=torch.bool)
    return (cosines(features, decoder) > MIN_COSINE).any(dim=0)
