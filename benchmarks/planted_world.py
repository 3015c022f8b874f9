"""A world whose features are known, with the site at which each of them lives.

Directions, firings and magnitudes come from `sae_lens.synthetic`; one draw of firings is written to
both sites, each through its own dictionary of directions. Rows are `[batch, 2, d_model]`, base
first. In the planted world 6 features live in the base alone, 6 in the fine-tuned model alone, and
28 in both: 22 along the same direction, 6 turned by the fine-tune to a cosine of 0.6, which no
direction common to both sites meets (its cosine with the two would be 0.894). One finetuned-only
and one shared feature are rare. Directions are random: superposition is mild, with cosines of
about 0.1. Limit: features fire independently.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from sae_lens.synthetic import ActivationGenerator, FeatureDictionary
from torch import Tensor

D_MODEL = 64
KINDS = {"base-only": 6, "finetuned-only": 6, "shared": 22, "rotated": 6}
"""Features of each kind in the planted world."""
NULL_KINDS = {"shared": 40}
ROTATED_COSINE = 0.6
P_FIRING, P_RARE = 0.105, 0.005
"""Probability that a feature is active on a token; 38 * 0.105 + 2 * 0.005 = 4 features a token."""
MAGNITUDE_STD = 0.3
"""Around 1, cut off at 0."""
NOISE_STD = 0.03
"""A dimension: 1.4 % of the variance of a site."""
SETTINGS = {
    "kinds": KINDS,
    "rotated_cosine": ROTATED_COSINE,
    "p_firing": P_FIRING,
    "p_rare": P_RARE,
    "magnitude_std": MAGNITUDE_STD,
    "noise_std": NOISE_STD,
    "d_model": D_MODEL,
}
"""For the file of results."""
WORLDS = ("planted", "null", "noise")
"""`null`: the fine-tune did nothing, x^1 = x^0. `noise`: nor here, but each site has noise of its
own, without which nothing ever tells the two sites of a dictionary apart."""


@dataclass(frozen=True, kw_only=True)
class PlantedWorld:
    """Features at two sites, and rows of activations made of them."""

    kinds: tuple[str, ...]
    """Kind of each feature: one of `KINDS`."""
    probabilities: Float[Tensor, " n_features"]
    """Probability that a feature is active on a token."""
    directions: Float[Tensor, "n_features 2 d_model"]
    """Unit rows; zero at a site where the feature does not live."""
    has_equal_noise: bool
    """Whether both sites have the same noise."""
    seed: int

    @property
    def is_rare(self) -> list[bool]:
        """Whether each feature is a rare one."""
        return (self.probabilities < P_FIRING).tolist()

    @property
    def l0(self) -> float:
        """Features a token."""
        return self.probabilities.double().sum().item()

    @property
    def difference_l0(self) -> float:
        """Features a token that the two sites do not share."""
        differs = torch.tensor([kind != "shared" for kind in self.kinds])
        return self.probabilities.double()[differs].sum().item()

    def rows(self, n: int, *, stream: int, index: int = 0) -> Float[Tensor, "n 2 d_model"]:
        """Activations; the same for the same seed, stream and index."""
        generator = ActivationGenerator(
            len(self.kinds), self.probabilities, std_firing_magnitudes=MAGNITUDE_STD
        )
        with torch.random.fork_rng(devices=[]):  # SAELens draws from the global generator
            torch.manual_seed(_seed(self.seed, stream, index))
            firings = generator.sample(n)
            noise = NOISE_STD * torch.randn(n, 2, D_MODEL)
        sites = [_dictionary(d)(firings) for d in self.directions.unbind(dim=1)]
        return torch.stack(sites, dim=1).detach() + (
            noise[:, :1] if self.has_equal_noise else noise
        )


def planted_world(name: str, seed: int) -> PlantedWorld:
    """The world of this name, one of `WORLDS`, with directions drawn from the seed."""
    counts = KINDS if name == "planted" else NULL_KINDS
    kinds = tuple(kind for kind, n in counts.items() for _ in range(n))
    rare = [kinds.index(kind) for kind in ("shared", "finetuned-only") if kind in kinds]
    probabilities = torch.full((len(kinds),), P_FIRING)
    probabilities[rare] = P_RARE
    return PlantedWorld(
        kinds=kinds,
        probabilities=probabilities,
        directions=_directions(kinds, seed),
        has_equal_noise=name == "null",
        seed=seed,
    )


def _directions(kinds: tuple[str, ...], seed: int) -> Float[Tensor, "n_features 2 d_model"]:
    """Directions at both sites."""
    one, other = (
        FeatureDictionary(
            len(kinds), D_MODEL, initializer=None, seed=_seed(seed, i)
        ).feature_vectors.detach()
        for i in range(2)
    )
    beside = other - (other * one).sum(dim=-1, keepdim=True) * one
    beside = beside / beside.norm(dim=-1, keepdim=True)
    turned = ROTATED_COSINE * one + (1 - ROTATED_COSINE**2) ** 0.5 * beside
    nothing = torch.zeros(D_MODEL)
    of_kind = {
        "base-only": lambda i: (one[i], nothing),
        "finetuned-only": lambda i: (nothing, one[i]),
        "shared": lambda i: (one[i], one[i]),
        "rotated": lambda i: (one[i], turned[i]),
    }
    return torch.stack([torch.stack(of_kind[kind](i)) for i, kind in enumerate(kinds)])


def _dictionary(vectors: Float[Tensor, "n_features d_model"]) -> FeatureDictionary:
    """SAELens's dictionary of these directions."""
    dictionary = FeatureDictionary(*vectors.shape, initializer=None, seed=0)
    dictionary.feature_vectors.data = vectors
    return dictionary


def _seed(*key: int) -> int:
    """A seed for this key; nearby keys give unrelated draws."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])
