"""Whether dictionaries trained apart found the same latents: agreement over seeds.

Contract: latents are matched by the cosine of their decoder rows (or encoder columns), all sites
side by side in the normalised space; `Agreement` has one entry for each latent of the first
dictionary. A match is mutual where both latents are each other's nearest, which makes mutual
matches one to one. Limit: mutual matches are not the best assignment of all; the Hungarian method
finds that one, and gives every latent a partner, also where none is near.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.analysis.geometry import Rows, latent_rows, nearest
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.results.tables import TableOfColumns, TableOfRows

Subset = Sequence[int] | Int[Tensor, " n"]


@dataclass(frozen=True, kw_only=True)
class Agreement(TableOfColumns):
    """For each latent of a first dictionary, its nearest latent of a second one."""

    cosine: Float[Tensor, " d_sae"]
    """Cosine to the nearest; NaN for a latent that is left out or has no direction."""
    match: Int[Tensor, " d_sae"]
    """The nearest latent; -1 where there is none."""
    is_mutual: Bool[Tensor, " d_sae"]
    """The match's own nearest latent is this one."""
    by: str
    """`decoder` or `encoder`."""
    sites: tuple[str, ...]
    """Sites whose rows were compared, side by side."""

    def n_latents(self, subset: Subset | None = None) -> int:
        """Number of latents with a direction, in all or among some."""
        return len(self._known(subset))

    def mean_max_cosine(self, subset: Subset | None = None) -> float:
        """MMCS: mean cosine to the nearest, over all latents or some; NaN over none.

        Source: Sharkey, Braun and Millidge 2022.
        """
        return self.cosine[self._known(subset)].double().mean().item()

    def mutual_share(self, threshold: float = 0.7, subset: Subset | None = None) -> float:
        """Share of latents, of all or of some, with a mutual match above a cosine; NaN of none.

        0.7 is from Paulo and Belrose 2025 (arXiv 2501.16615), who match by the Hungarian method.
        """
        ids = self._known(subset)
        return (self.is_mutual[ids] & (self.cosine[ids] > threshold)).double().mean().item()

    def _known(self, subset: Subset | None) -> Int[Tensor, " n"]:
        """Latents of a subset that have a direction."""
        d_sae = len(self.cosine)
        ids = torch.arange(d_sae) if subset is None else torch.as_tensor(subset, dtype=torch.long)
        bad = ids[(ids < 0) | (ids >= d_sae)].tolist()
        if bad:
            raise ValueError(
                f"latents {bad} of the subset are not in the first dictionary, whose {d_sae:,} are "
                f"numbered 0 to {d_sae - 1}."
            )
        ids = ids.to(self.cosine.device)
        return ids[~self.cosine[ids].isnan()]


def agreement(
    first: Crosscoder,
    second: Crosscoder,
    *,
    active: tuple[Bool[Tensor, " d_first"], Bool[Tensor, " d_second"]] | None = None,
    by: Rows = "decoder",
    sites: Sequence[str] | None = None,
) -> Agreement:
    """Match the latents of one dictionary with those of another. Swap them for the other way.

    Args:
        first: the dictionary whose latents are listed.
        second: trained on the same sites; it may have more latents, or fewer.
        active: which latents of each are matched; None is all that have a direction.
        by: compare what latents write, or what they read.
        sites: at these sites; None is all.

    Raises:
        ValueError: the dictionaries are of other sites or widths, or a mask is of another length.
    """
    return _agreements([first, second], active, by=by, sites=sites)[0, 1]


@dataclass(frozen=True, kw_only=True)
class SeedAgreement:
    """How many latents of one dictionary are found again in another."""

    first: int
    """Position in the list."""
    second: int
    """Position in the list."""
    n_latents: int
    """Latents of the first that the row is about."""
    mean_max_cosine: float
    """MMCS, see `Agreement.mean_max_cosine`."""
    mutual_share_above_0_7: float
    """Share of these latents with a mutual match of cosine above 0.7."""
    mutual_share_above_0_9: float
    """Share of these latents with a mutual match of cosine above 0.9."""


@dataclass(frozen=True, kw_only=True)
class SeedAgreements(TableOfRows):
    """All ordered pairs of dictionaries."""

    ROW: ClassVar[type] = SeedAgreement
    by: str
    """`decoder` or `encoder`."""
    sites: tuple[str, ...]
    """Sites whose rows were compared, side by side."""


def agreement_over_seeds(
    crosscoders: Sequence[Crosscoder],
    *,
    subsets: Sequence[Subset] | None = None,
    active: Sequence[Bool[Tensor, " _"]] | None = None,
    by: Rows = "decoder",
    sites: Sequence[str] | None = None,
) -> SeedAgreements:
    """Agreement of dictionaries that differ by their seed, each with each.

    Args:
        crosscoders: two or more.
        subsets: of each, the latents that its rows are about, such as the first n of a ranking;
            their matches are sought among all latents of the other. None is all.
        active: see `agreement`.
        by: see `agreement`.
        sites: see `agreement`.

    Raises:
        ValueError: fewer than two dictionaries, not one subset for each, or what `agreement`
            refuses.
    """
    if len(crosscoders) < 2 or (subsets is not None and len(subsets) != len(crosscoders)):
        n = "no" if subsets is None else str(len(subsets))
        raise ValueError(
            f"{len(crosscoders)} dictionaries and {n} subsets: give two dictionaries or more, and "
            "one subset for each or none."
        )
    found = _agreements(crosscoders, active, by=by, sites=sites)
    of = subsets or [None] * len(crosscoders)
    rows = tuple(
        SeedAgreement(
            first=i,
            second=j,
            n_latents=each.n_latents(of[i]),
            mean_max_cosine=each.mean_max_cosine(of[i]),
            mutual_share_above_0_7=each.mutual_share(0.7, of[i]),
            mutual_share_above_0_9=each.mutual_share(0.9, of[i]),
        )
        for (i, j), each in found.items()
    )
    return SeedAgreements(rows=rows, by=by, sites=found[0, 1].sites)


def _agreements(
    crosscoders: Sequence[Crosscoder],
    active: Sequence[Tensor] | None,
    *,
    by: Rows,
    sites: Sequence[str] | None,
) -> dict[tuple[int, int], Agreement]:
    """Every ordered pair, each search made once."""
    _check(crosscoders, active)
    names = tuple(sites or [s.name for s in crosscoders[0].sites])
    rows = [latent_rows(each, by=by, sites=names) for each in crosscoders]
    if active is not None:
        # A row of zeros is nobody's neighbour.
        rows = [r * mask.to(r.device)[:, None] for r, mask in zip(rows, active, strict=True)]
    pairs = list(permutations(range(len(rows)), 2))
    near = {(i, j): nearest(rows[i], rows[j].to(rows[i].device)) for i, j in pairs}
    found = {}
    for i, j in pairs:
        cosine, match = (column.squeeze(1).cpu() for column in near[i, j])
        back = near[j, i][1].squeeze(1).cpu()
        is_mutual = (match >= 0) & (back[match] == torch.arange(len(match)))
        found[i, j] = Agreement(cosine=cosine, match=match, is_mutual=is_mutual, by=by, sites=names)
    return found


def _check(crosscoders: Sequence[Crosscoder], active: Sequence[Tensor] | None) -> None:
    each = [[(s.name, s.hook_name, s.d_model) for s in c.sites] for c in crosscoders]
    odd = next((sites for sites in each if sites != each[0]), None)
    if odd is not None:
        raise ValueError(
            f"these dictionaries are of other sites, {each[0]} and {odd} (name, hook, width): only "
            "latents that write to the same places can agree. Compare dictionaries trained on the "
            "same models at the same hooks."
        )
    expected = [c.cfg.d_sae for c in crosscoders]
    if active is not None and [len(mask) for mask in active] != expected:
        raise ValueError(
            f"active has masks of {[len(mask) for mask in active]} latents for dictionaries of "
            f"{expected}: give one mask for each dictionary, with one entry a latent."
        )
