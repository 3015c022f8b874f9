"""Parts of the dictionary: ranges of latents that live under rules of their own.

A part may have its own budget of active latents (Dual-K), one decoder row for all sites (designated
shared), sites that it does not read or write (dedicated exclusive), or a reduced penalty. Parts
stand one after the other: the first `share` of the latents is the first part, and so on.

The rules are orthogonal projections: `project_` applied to the weights at the start and to their
gradients at every step keeps values, gradients and Adam's moments on the same side, for good.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.models.site import Site


@dataclass(frozen=True, kw_only=True)
class Part:
    """A range of latents."""

    name: str
    share: float
    """Of the latents, above 0; the shares of all parts add up to 1."""
    k: float | None = None
    """Mean active latents a token, chosen among this part alone (Kassem et al. 2026, Dual-K).
    None: the part competes for the k of the sparsity with all others that have none."""
    tied: bool = False
    """Whether each latent has one decoder row, written to every site (designated shared)."""
    reads: Sequence[str] | None = None
    """Sites that the encoder reads; None is all, others have zero weights throughout."""
    writes: Sequence[str] | None = None
    """Sites that the decoder writes; None is all, others have zero weights throughout."""
    penalty_scale: float = 1.0
    """Of the sparsity's penalty on these latents."""

    def __post_init__(self) -> None:
        for name in ("reads", "writes"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if self.share <= 0:
            raise ValueError(f"the share of part {self.name!r} is {self.share}; it is above 0.")
        if self.k is not None and self.k <= 0:
            raise ValueError(f"k of part {self.name!r} is {self.k}; it must be above 0.")
        if self.tied and self.writes is not None:
            raise ValueError(
                f"part {self.name!r} is tied, so it writes to every site: leave `writes` out."
            )
        if self.penalty_scale < 0:
            raise ValueError(f"penalty_scale of part {self.name!r} is negative.")


@dataclass(frozen=True, kw_only=True)
class Range:
    """Where a part lies in a dictionary of a certain size."""

    part: Part
    latents: slice

    @property
    def n(self) -> int:
        """Number of latents."""
        return self.latents.stop - self.latents.start


def parts_from(given: Sequence[Part | Mapping[str, Any]]) -> tuple[Part, ...]:
    """Parts from objects or their JSON form."""
    return tuple(p if isinstance(p, Part) else Part(**p) for p in given)


def parts_to_dicts(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """JSON form."""
    return [
        asdict(p) | {n: v and list(v) for n, v in (("reads", p.reads), ("writes", p.writes))}
        for p in parts
    ]


def ranges(parts: Sequence[Part], d_sae: int) -> tuple[Range, ...]:
    """The parts of a dictionary of `d_sae` latents, in order.

    Raises:
        ValueError: shares that do not add up to 1, equal names, or a part without any latent.
    """
    if abs(sum(p.share for p in parts) - 1) > 1e-6:
        raise ValueError(
            f"the shares of the parts {[(p.name, p.share) for p in parts]} add up to "
            f"{sum(p.share for p in parts):g}; they must add up to 1."
        )
    if len({p.name for p in parts}) < len(parts):
        raise ValueError(f"part names must differ, got {[p.name for p in parts]}.")
    stops = [round(s * d_sae) for s in accumulate((p.share for p in parts), initial=0.0)]
    stops[-1] = d_sae
    found = tuple(
        Range(part=p, latents=slice(a, b)) for p, (a, b) in zip(parts, pairwise(stops), strict=True)
    )
    for r in found:
        if r.n < 1:
            raise ValueError(
                f"part {r.part.name!r} has a share of {r.part.share:g} of {d_sae} latents, which "
                "is none. Give it a larger share, or the dictionary more latents."
            )
        if r.part.k is not None and r.part.k > r.n:
            raise ValueError(
                f"part {r.part.name!r} has k = {r.part.k:g}, but only {r.n} latents. Choose a "
                "smaller k, a larger share or more latents."
            )
    return found


def check_sites(parts: Sequence[Part], sites: Sequence[Site]) -> None:
    """Refuse parts that name other sites, or tie decoders of different widths."""
    names = [s.name for s in sites]
    for part in parts:
        unknown = sorted({*(part.reads or ()), *(part.writes or ())} - set(names))
        if unknown:
            raise ValueError(f"part {part.name!r} names the sites {unknown}; there are {names}.")
        if part.tied and len({s.d_model for s in sites}) > 1:
            raise ValueError(
                f"part {part.name!r} ties decoder rows of different widths: "
                f"{[(s.name, s.d_model) for s in sites]}."
            )
        if part.writes == () or part.reads == ():
            raise ValueError(f"part {part.name!r} reads or writes no site at all.")


def selection_groups(parts: Sequence[Range], k: float, d_sae: int) -> list[tuple[slice, float]]:
    """Ranges of latents that compete with one another, each with its k.

    Raises:
        ValueError: parts without a k of their own that do not lie side by side.
    """
    groups: list[tuple[slice, float]] = []
    pooled: slice | None = None
    for r in parts:
        if r.part.k is not None:
            groups.append((r.latents, r.part.k))
        elif pooled is None:
            pooled = r.latents
        elif pooled.stop == r.latents.start:
            pooled = slice(pooled.start, r.latents.stop)
        else:
            raise ValueError("parts that share one k must lie side by side.")
    if not parts:
        pooled = slice(0, d_sae)
    return sorted([*groups, *([(pooled, k)] if pooled else [])], key=lambda g: g[0].start)


def is_constrained(part: Part) -> bool:
    """Whether the part's weights obey a rule."""
    return part.tied or part.reads is not None or part.writes is not None


@torch.no_grad()
def project_decoder_(
    W_dec: Float[Tensor, "d_sae d_in"], parts: Sequence[Range], sites: Sequence[Site]
) -> None:
    """Tie and silence the decoder rows of the parts, or their gradients."""
    for r in parts:
        rows = W_dec[r.latents].split([s.d_model for s in sites], dim=-1)
        if r.part.tied:
            mean = torch.stack(rows).mean(dim=0)
            for own in rows:
                own.copy_(mean)
        for site, own in zip(sites, rows, strict=True):
            if r.part.writes is not None and site.name not in r.part.writes:
                own.zero_()


@torch.no_grad()
def project_encoder_(
    W_enc: Float[Tensor, "d_in d_sae"], parts: Sequence[Range], sites: Sequence[Site]
) -> None:
    """Silence the encoder columns of the parts, or their gradients."""
    for r in parts:
        blocks = W_enc[:, r.latents].split([s.d_model for s in sites], dim=0)
        for site, own in zip(sites, blocks, strict=True):
            if r.part.reads is not None and site.name not in r.part.reads:
                own.zero_()
