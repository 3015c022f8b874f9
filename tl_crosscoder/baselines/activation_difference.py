"""Activation Difference Lens: the mean of x^1 - x^0 at the first positions of unrelated text.

A fine-tune on a narrow subject moves the stream the same way on any text, so the mean names the
subject (Minder et al. 2025, arXiv 2510.13900, 5 positions). Contract: one pass
over a text, sums in float64 divided once; `by_position [n_positions, d_model]`, `mean [d_model]`,
raw space. A position is counted from the start of a context, so each context should be a text of
its own (`pack=False`), as in the paper; in a packed one it is wherever the context cut the text.
Limit: means alone; what x^1 - x^0 does on few tokens is lost in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.baselines.directions import Directions, Which, compared_facts, sum_of_norms
from tl_crosscoder.data.harvest import Harvested, harvest, within_limits
from tl_crosscoder.data.tokens import DROP_REASONS, TokenizedText
from tl_crosscoder.models.site import Site, site_parts
from tl_crosscoder.models.source import ActivationSource

N_POSITIONS = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class ActivationDifference(Directions):
    """Mean of x^1 - x^0 by position, and over all tokens that count."""

    positions: tuple[int, ...]
    """Positions in a context; 0 is its first token, BOS where there is one."""
    counts: tuple[int, ...]
    """Tokens averaged at each position; the mean of none is NaN."""
    by_position: Float[Tensor, "n_positions d_model"]
    mean: Float[Tensor, " d_model"]

    def which(self) -> tuple[Which, ...]:
        """Positions with a token, and `mean`."""
        found = [p for p, n in zip(self.positions, self.counts, strict=True) if n]
        return (*found, "mean")

    def label(self, which: Which) -> str:
        """`ADL, position 3`, or `ADL, mean`."""
        return "ADL, mean" if which == "mean" else f"ADL, position {which}"

    def direction(self, which: Which = "mean") -> Float[Tensor, " d_model"]:
        """Mean of x^1 - x^0 at a position, or over all tokens that count."""
        if which not in self.which():
            raise ValueError(f"there is no mean of {which!r}; there are those of {self.which()}.")
        return self.mean if which == "mean" else self.by_position[self.positions.index(which)]


@torch.no_grad()
def activation_difference(
    source: ActivationSource,
    text: TokenizedText,
    *,
    n_positions: int = N_POSITIONS,
    with_start: bool = False,
    batch_size: int = 32,
    show_progress: bool = False,
) -> ActivationDifference:
    """Run the models over a text once and average x^1 - x^0.

    Args:
        source: a pair, more sites, or a cache.
        text: unrelated to the fine-tune, unpacked.
        n_positions: averaged one by one, from the first at which a token counts: with the default
            masks, which leave out BOS and the first position, these are 1 to 5.
        with_start: begin at position 0, tokens included that the masks leave out there as `bos` or
            `first`; means over all tokens and norms stay as they are. A cache does not hold them.
        batch_size: contexts a forward pass.
        show_progress: with a progress bar.

    Raises:
        ValueError: no two sites of one width, no token that counts, contexts that are shorter than
            `n_positions`, or a cache without the start.
    """
    facts, source = compared_facts(source), source.side_by_side()
    pair = source.check_one_width()
    first = _first_position(text, n_positions, with_start=with_start)
    # Norm limits are applied to the sums: they would take the start away again.
    wide = replace(_with_start(text, n_positions) if with_start else text, norm_limits=None)
    d_model = source.sites[pair[0]].d_model
    sums = _Sums(
        by_position=torch.zeros(n_positions, d_model, dtype=torch.float64, device=source.device),
        total=torch.zeros(d_model, dtype=torch.float64, device=source.device),
        counts=torch.zeros(n_positions, dtype=torch.long),
        norms=torch.zeros(2, dtype=torch.float64),
    )
    description = "Averaging differences" if show_progress else None
    for part in harvest(source, wide, batch_size=batch_size, description=description):
        is_early, counted, place = _kinds(
            part, text, sites=source.sites, first=first, n_positions=n_positions
        )
        base, finetuned = (site_parts(part.rows, source.sites)[i] for i in pair)
        sums.add(base, finetuned, place, is_early=is_early, counted=counted)
    n_tokens = sums.n_tokens
    if n_tokens == 0:
        raise ValueError("no token of this text counts: all are above the norm limits.")
    return ActivationDifference(
        **facts,
        n_tokens=n_tokens,
        activation_norms=(sums.norms[0].item() / n_tokens, sums.norms[1].item() / n_tokens),
        positions=tuple(range(first, first + n_positions)),
        counts=tuple(sums.counts.tolist()),
        by_position=(sums.by_position.cpu() / sums.counts[:, None]).float(),
        mean=(sums.total.cpu() / n_tokens).float(),
    )


@dataclass(kw_only=True)
class _Sums:
    """Of x^1 - x^0 and of the streams' norms; float64."""

    by_position: Float[Tensor, "n_positions d_model"]
    total: Float[Tensor, " d_model"]
    counts: Int[Tensor, " n_positions"]
    norms: Float[Tensor, "2"]
    n_tokens: int = 0

    def add(
        self,
        base: Float[Tensor, "tokens d_model"],
        finetuned: Float[Tensor, "tokens d_model"],
        place: Int[Tensor, " tokens"],
        *,
        is_early: Bool[Tensor, " tokens"],
        counted: Bool[Tensor, " tokens"],
    ) -> None:
        difference = (finetuned - base).double()
        device = difference.device
        self.counts += torch.bincount(place[is_early], minlength=len(self.counts))
        self.by_position.index_add_(0, place[is_early].to(device), difference[is_early.to(device)])
        rows = counted.to(device)
        self.total += difference[rows].sum(dim=0)
        self.norms += sum_of_norms(base[rows], finetuned[rows])
        self.n_tokens += int(counted.sum())


def _kinds(
    part: Harvested, text: TokenizedText, *, sites: Sequence[Site], first: int, n_positions: int
) -> tuple[Bool[Tensor, " tokens"], Bool[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """Rows averaged by position, rows that count in `text`, and places from the first position."""
    mask = part.text.mask
    counted = text[part.index].cut(mask.shape[1]).mask[mask]
    is_start = ~counted
    if text.norm_limits is not None:
        counted &= within_limits(part.rows, sites, text.norm_limits).cpu()
    place = torch.arange(mask.shape[1]).expand_as(mask)[mask] - first
    is_early = (counted | is_start) & (place >= 0) & (place < n_positions)
    return is_early, counted, place


def _first_position(text: TokenizedText, n_positions: int, *, with_start: bool) -> int:
    counted = text.mask.any(dim=0).nonzero().flatten().tolist()
    if not counted:
        raise ValueError("no token of this text counts: it is empty, or its masks leave out all.")
    first = 0 if with_start else counted[0]
    if not 1 <= n_positions <= text.context_size - first:
        raise ValueError(
            f"n_positions={n_positions} from position {first} on: contexts of {text.context_size} "
            f"tokens have 1 to {text.context_size - first}."
        )
    return first


def _with_start(text: TokenizedText, n_positions: int) -> TokenizedText:
    """BOS and first positions count, among the first so many."""
    left_out = torch.isin(
        text.dropped, torch.tensor([DROP_REASONS.index(r) for r in ("bos", "first")])
    )
    at_start = torch.arange(text.context_size) < n_positions
    return replace(text, dropped=text.dropped.masked_fill(left_out & at_start, 0))
