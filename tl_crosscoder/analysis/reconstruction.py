"""How much of the activations, and of their difference, a crosscoder explains on a whole text.

Contract: every batch adds sums and counts in float64, which are divided once at the end.
Activations are rows, `[batch, n_sites, d_model]` or `[batch, d_in]`, in raw space, and codes are
entries. Limit: one difference, that of the two compared sites.
"""

import math
from dataclasses import dataclass

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.geometry import LATENT_CLASSES
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.mesh import Axis
from tl_crosscoder.models.site import site_parts

_LEAST_VARIANCE = 1e-12
"""Share of the mean squared norm below which float32 has nothing but rounding."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sum, sum of squared norms and count of vectors: enough for their variance."""

    total: Float[Tensor, "... d_model"]
    squares: Float[Tensor, "..."]
    n: int

    @classmethod
    def of(cls, vectors: Float[Tensor, "batch ... d_model"]) -> "Moments":
        """Moments of a batch, in float64."""
        vectors = vectors.double()
        squares = reduce(vectors.pow(2), "batch ... d_model -> ...", "sum")
        return cls(total=vectors.sum(dim=0), squares=squares, n=len(vectors))

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both."""
        return Moments(
            total=self.total + other.total, squares=self.squares + other.squares, n=self.n + other.n
        )

    def over(self, axis: Axis) -> "Moments":
        """Moments of the vectors of several processes."""
        n = axis.reduced(torch.tensor(self.n))
        total, squares = (axis.reduced(each) for each in (self.total, self.squares))
        return Moments(total=total, squares=squares, n=int(n))

    @property
    def sum_of_squared_deviations(self) -> Float[Tensor, "..."]:
        """Sum of ||v - mean||^2."""
        return (self.squares - self.total.pow(2).sum(dim=-1) / self.n).clamp(min=0)

    @property
    def varies(self) -> bool:
        """Whether vectors differ by more than the rounding of their size in float32."""
        return bool(self.sum_of_squared_deviations > _LEAST_VARIANCE * self.squares)


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How much a crosscoder explains on a text."""

    n_tokens: int
    """Tokens measured on."""
    fve: dict[str, float]
    """Site -> 1 - sum ||e^m||^2 / sum ||x^m - mean||^2; NaN where x^m is the same at all tokens."""
    difference_fve: float | None = None
    """1 - sum ||e^1 - e^0||^2 / sum ||(x^1 - x^0) - mean||^2; None where the models are equal (or
    differ by the same vector at every token), and where there is no difference to take."""
    difference_fve_by_class: dict[str, float] | None = None
    """Class -> FVE of x^1 - x^0 by f_j (d_j^1 - d_j^0) of these latents and the best constant."""
    difference_share: float | None = None
    """Variance of x^1 - x^0 over that of x^1: how much there is to explain. None for a single site
    and for sites of unequal width, which have no difference."""
    l0: float
    """Mean number of active latents a token."""
    dead_share: float
    """Latents that are active on none of these tokens."""


class ReconstructionSums:
    """Sums over a text, from which a `Reconstruction` is divided once."""

    def __init__(
        self,
        crosscoder: Crosscoder,
        class_ids: Int[Tensor, " d_sae"],
        *,
        pair: tuple[int, int] | None,
    ) -> None:
        """Begin without any token.

        Args:
            crosscoder: the dictionary.
            class_ids: index into `LATENT_CLASSES` of each latent.
            pair: positions of two sites of one width, base first; None where there are none.
        """
        self._crosscoder, self._class_ids, self._pair = crosscoder, class_ids, pair
        self._moments: dict[str, Moments] = {}
        self.n_active = torch.zeros(
            crosscoder.cfg.d_sae, dtype=torch.float64, device=crosscoder.W_dec.device
        )
        """Tokens on which each latent is active, `[d_sae]`."""

    def add(self, x: Float[Tensor, "batch *row"], codes: SparseCodes) -> None:
        """Take more tokens into account."""
        sites = self._crosscoder.sites
        decoded = codes.times(self._crosscoder.W_dec.detach()) + self._crosscoder.b_dec.detach()
        parts, decoded_parts = site_parts(x, sites), site_parts(decoded, sites)
        errors = [part - x_hat for part, x_hat in zip(parts, decoded_parts, strict=True)]
        for i in range(len(sites)):
            self._add(f"x.{i}", parts[i])
            self._add(f"error.{i}", errors[i])
        if self._pair is not None:
            base, finetuned = self._pair
            difference = parts[finetuned] - parts[base]
            self._add("difference", difference)
            self._add("error of the difference", errors[finetuned] - errors[base])
            by_class = self._explained_by_class(codes)
            self._add("left by class", difference[:, None] - by_class)
        latents = codes.pattern.latents.long()
        self.n_active += torch.bincount(latents, minlength=codes.pattern.d_sae)

    def gather(self, axis: Axis) -> None:
        """Add the sums of several processes, each of which has taken tokens into account."""
        self._moments = {name: own.over(axis) for name, own in self._moments.items()}
        self.n_active = axis.reduced(self.n_active)

    def result(self) -> Reconstruction:
        """Divide, once."""
        moments, n_tokens = self._moments, self._moments["x.0"].n
        fve = {
            site.name: self._fve(f"error.{i}", f"x.{i}")
            for i, site in enumerate(self._crosscoder.sites)
        }
        found = {}
        if self._pair is not None:
            variance = moments["difference"].sum_of_squared_deviations
            of_finetuned = moments[f"x.{self._pair[1]}"].sum_of_squared_deviations
            if moments[f"x.{self._pair[1]}"].varies:
                found["difference_share"] = (variance / of_finetuned).item()
            if moments["difference"].varies:
                left = moments["left by class"].sum_of_squared_deviations
                by_class = (1 - left / variance).tolist()
                found["difference_fve"] = self._fve("error of the difference", "difference")
                found["difference_fve_by_class"] = dict(zip(LATENT_CLASSES, by_class, strict=True))
        return Reconstruction(
            n_tokens=n_tokens,
            fve=fve,
            l0=(self.n_active.sum() / n_tokens).item(),
            dead_share=(self.n_active == 0).double().mean().item(),
            **found,
        )

    def _add(self, name: str, vectors: Float[Tensor, "batch ... d_model"]) -> None:
        new = Moments.of(vectors)
        self._moments[name] = self._moments[name] + new if name in self._moments else new

    def _explained_by_class(self, codes: SparseCodes) -> Float[Tensor, "batch n_classes d_model"]:
        """What the latents of each class explain of x^1 - x^0."""
        assert self._pair is not None
        base, finetuned = (self._crosscoder.decoder(site).detach() for site in self._pair)
        of_entries = self._class_ids[codes.pattern.latents.long()]
        by_class = [codes.where(of_entries == c) for c in range(len(LATENT_CLASSES))]
        return torch.stack([own.times(finetuned - base) for own in by_class], dim=1)

    def _fve(self, error: str, of: str) -> float:
        if not self._moments[of].varies:
            return math.nan
        variance = self._moments[of].sum_of_squared_deviations
        return (1 - self._moments[error].squares / variance).item()
