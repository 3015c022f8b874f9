"""Activation Difference Lens: the mean of x^1 - x^0 at the first positions of unrelated text.

A fine-tune on a narrow subject moves the activation the same way on any text, so the mean names the
subject (Minder et al. 2025, arXiv 2510.13900, 5 positions). Contract: one pass
over a text, sums in float64 divided once; `by_position [n_positions, d_model]`, `mean [d_model]`,
raw space. A position is counted from the start of a context, so each context should be a text of
its own (`pack=False`), as in the paper; in a packed one it is wherever the context cut the text.
Limit: means alone; what x^1 - x^0 does on few tokens is lost in them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.baselines.directions import Directions, Which, compared_facts, sum_of_norms
from tl_crosscoder.data.harvest import harvest
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.site import site_parts
from tl_crosscoder.models.source import ActivationSource


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
    n_positions: int = 5,
    batch_size: int = 32,
    show_progress: bool = False,
) -> ActivationDifference:
    """Run the models over a text once and average x^1 - x^0.

    Args:
        source: a pair, more sites, or a cache.
        text: unrelated to the fine-tune, unpacked.
        n_positions: averaged one by one, from the first at which a token counts: with the default
            masks, which leave out BOS and the first position, these are 1 to 5.
        batch_size: contexts a forward pass.
        show_progress: with a progress bar.

    Raises:
        ValueError: no two sites of one width, no token that counts, or contexts that are shorter
            than `n_positions`.
    """
    facts, source = compared_facts(source), source.side_by_side()
    pair = source.check_one_width()
    first = _first_position(text, n_positions)
    d_model = source.sites[pair[0]].d_model
    by_position = torch.zeros(n_positions, d_model, dtype=torch.float64, device=source.device)
    total, counts = torch.zeros_like(by_position[0]), torch.zeros(n_positions, dtype=torch.long)
    norms, n_tokens = torch.zeros(2, dtype=torch.float64), 0
    description = "Averaging differences" if show_progress else None
    for part in harvest(source, text, batch_size=batch_size, description=description):
        base, finetuned = (site_parts(part.rows, source.sites)[i] for i in pair)
        difference = (finetuned - base).double()
        place = part.text.mask.nonzero()[:, 1] - first
        is_early = place < n_positions
        counts += torch.bincount(place[is_early], minlength=n_positions)
        place, is_early = place.to(difference.device), is_early.to(difference.device)
        by_position.index_add_(0, place[is_early], difference[is_early])
        total += difference.sum(dim=0)
        norms += sum_of_norms(base, finetuned)
        n_tokens += len(difference)
    if n_tokens == 0:
        raise ValueError("no token of this text counts: all are above the norm limits.")
    return ActivationDifference(
        **facts,
        n_tokens=n_tokens,
        activation_norms=(norms[0].item() / n_tokens, norms[1].item() / n_tokens),
        positions=tuple(range(first, first + n_positions)),
        counts=tuple(counts.tolist()),
        by_position=(by_position.cpu() / counts[:, None]).float(),
        mean=(total.cpu() / n_tokens).float(),
    )


def _first_position(text: TokenizedText, n_positions: int) -> int:
    """First position at which a token counts."""
    counted = text.mask.any(dim=0).nonzero().flatten().tolist()
    if not counted:
        raise ValueError("no token of this text counts: it is empty, or its masks leave out all.")
    first = counted[0]
    if not 1 <= n_positions <= text.context_size - first:
        raise ValueError(
            f"n_positions={n_positions} from position {first} on: contexts of {text.context_size} "
            f"tokens have 1 to {text.context_size - first}."
        )
    return first
