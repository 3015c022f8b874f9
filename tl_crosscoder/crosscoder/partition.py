"""Partitions of the dictionary: ranges of latents that live under rules of their own.

A partition may have its own budget of active latents (Dual-K), one decoder row for all sites
(designated shared), sites that it does not read or write (dedicated exclusive), or a reduced
penalty. Partitions stand one after the other: the first `share` of the latents is the first one.

The rules are orthogonal projections: `project_` applied to the weights at the start and to their
gradients at every step keeps values, gradients and Adam's moments within the rules, for good.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from einops import reduce, repeat
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.config.settings import NonNegativeFloat, PositiveFloat, Settings
from tl_crosscoder.models.site import Site


@dataclass(frozen=True, kw_only=True)
class Partition(Settings):
    """A range of latents with rules of its own."""

    name: str
    share: PositiveFloat
    """Share of the latents, above 0; the shares of all partitions add up to 1."""
    k: PositiveFloat | None = None
    """Mean active latents a token, chosen among this partition alone (Kassem et al. 2026, Dual-K).
    None: its latents compete for the k of the sparsity with all others that have none."""
    tied: bool = False
    """Whether each latent has one decoder row, written to every site (designated shared)."""
    reads: Sequence[str] | None = None
    """Sites that the encoder reads; None is all, others have zero weights throughout."""
    writes: Sequence[str] | None = None
    """Sites that the decoder writes; None is all, others have zero weights throughout."""
    penalty_scale: NonNegativeFloat = 1.0
    """Factor of the sparsity's penalty on these latents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reads", "writes"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if self.tied and self.writes is not None:
            raise ValueError(
                f"partition {self.name!r} is tied, so it writes to every site: leave `writes` out."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(self).items()}


def placed(partitions: Sequence[Partition], d_sae: int) -> list[tuple[Partition, slice]]:
    """Each partition with its range of latents in a dictionary of `d_sae`.

    Raises:
        ValueError: shares that do not add up to 1, equal names, a partition without any latent or
            with fewer than its k.
    """
    total = sum(p.share for p in partitions)
    if partitions and abs(total - 1) > 1e-6:
        raise ValueError(
            f"the shares of the partitions {[(p.name, p.share) for p in partitions]} add up to "
            f"{total:g}; they must add up to 1."
        )
    if len({p.name for p in partitions}) < len(partitions):
        raise ValueError(f"partition names must differ, got {[p.name for p in partitions]}.")
    stops = [round(s * d_sae) for s in accumulate((p.share for p in partitions), initial=0.0)]
    stops[-1] = d_sae
    found = [(p, slice(a, b)) for p, (a, b) in zip(partitions, pairwise(stops), strict=True)]
    for p, latents in found:
        n = latents.stop - latents.start
        if n < 1:
            raise ValueError(
                f"partition {p.name!r} has a share of {p.share:g} of {d_sae} latents, which is "
                "none. Give it a larger share, or the dictionary more latents."
            )
        if p.k is not None and p.k > n:
            raise ValueError(
                f"partition {p.name!r} has k = {p.k:g}, but only {n} latents. Choose a smaller k, "
                "a larger share or more latents."
            )
    return found


def check_sites(partitions: Sequence[Partition], sites: Sequence[Site]) -> None:
    """Refuse partitions that name other sites, or tie decoders of different widths."""
    names, widths = [s.name for s in sites], [(s.name, s.d_model) for s in sites]
    for p in partitions:
        unknown = sorted({*(p.reads or ()), *(p.writes or ())} - set(names))
        if unknown:
            raise ValueError(f"partition {p.name!r} names the sites {unknown}; there are {names}.")
        if p.tied and len({s.d_model for s in sites}) > 1:
            raise ValueError(
                f"partition {p.name!r} ties decoder rows of different widths: {widths}."
            )
        if p.writes == () or p.reads == ():
            raise ValueError(f"partition {p.name!r} reads or writes no site at all.")


@torch.no_grad()
def project_decoder_(
    W_dec: Float[Tensor, "d_sae d_in"],
    partitions: Sequence[tuple[Partition, slice]],
    sites: Sequence[Site],
) -> None:
    """Tie and silence the decoder rows of the partitions, or their gradients."""
    for p, latents in partitions:
        if p.tied:
            mean = reduce(W_dec[latents], "n (site d_model) -> n d_model", "mean", site=len(sites))
            W_dec[latents] = repeat(mean, "n d_model -> n (site d_model)", site=len(sites))
        rows = W_dec[latents].split([s.d_model for s in sites], dim=-1)
        for site, own in zip(sites, rows, strict=True):
            if p.writes is not None and site.name not in p.writes:
                own.zero_()


@torch.no_grad()
def project_encoder_(
    W_enc: Float[Tensor, "d_in d_sae"],
    partitions: Sequence[tuple[Partition, slice]],
    sites: Sequence[Site],
) -> None:
    """Silence the encoder columns of the partitions, or their gradients."""
    for p, latents in partitions:
        blocks = W_enc[:, latents].split([s.d_model for s in sites], dim=0)
        for site, own in zip(sites, blocks, strict=True):
            if p.reads is not None and site.name not in p.reads:
                own.zero_()


def with_renamed_keys(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config or record, where version 0.1.0 wrote `parts` and `delta_loss.part`."""
    renamed = {"partitions" if n == "parts" else n: v for n, v in fields.items()}
    delta = renamed.get("delta_loss")
    if isinstance(delta, Mapping) and "part" in delta:
        renamed["delta_loss"] = {"partition" if n == "part" else n: v for n, v in delta.items()}
    return renamed
