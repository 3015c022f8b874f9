"""Directions of x^1 - x^0 by averaging: its mean by position, and its principal components.

`activation_difference` (Activation Difference Lens): a fine-tune on a narrow subject moves the
activation the same way on any text, so the mean names the subject (Minder et al. 2025, arXiv
2510.13900, the first 5 positions of unrelated text). A position is counted from the start of a
context, so each context should be a text of its own (`pack=False`), as in the paper; in a packed
one it is wherever the context cut the text.

`difference_pca`: the directions in which a fine-tune moves the activation most,

    C = 1/n sum_i (delta_i - mean)(delta_i - mean)'      delta_i = x^1_i - x^0_i at token i

`components [n_components, d_model]` are unit eigenvectors, largest variance first. Their sign is
free: the entry of largest size is made positive. So steer with strengths of both signs. Contract:
one pass over a text, sums in float64 divided once; directions `[d_model]`, raw space. Limit: what
x^1 - x^0 does on few tokens is lost in means; where variances are equal, any basis of their span
would do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.baselines.directions import Directions, Which
from tl_crosscoder.data.harvest import harvest
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.site import site_parts
from tl_crosscoder.models.source import ActivationSource

_NO_TOKENS = "no token of this text counts: it is empty, or its masks or norm limits leave out all."


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
    first, sums = _first_position(text, n_positions), _Sums.of(source)
    by_position = torch.zeros(n_positions, *sums.total.shape).to(sums.total)
    counts = torch.zeros(n_positions, dtype=torch.long)
    description = "Averaging differences" if show_progress else None
    for difference, position in sums.over(source, text, batch_size, description):
        place = position - first
        is_early = place < n_positions
        counts += torch.bincount(place[is_early], minlength=n_positions)
        place, is_early = place.to(difference.device), is_early.to(difference.device)
        by_position.index_add_(0, place[is_early], difference[is_early])
    return ActivationDifference(
        **sums.facts(source),
        positions=tuple(range(first, first + n_positions)),
        counts=tuple(counts.tolist()),
        by_position=(by_position.cpu() / counts[:, None]).float(),
        mean=(sums.total.cpu() / sums.n_tokens).float(),
    )


def _first_position(text: TokenizedText, n_positions: int) -> int:
    """First position at which a token counts."""
    counted = text.mask.any(dim=0).nonzero().flatten().tolist()
    if not counted:
        raise ValueError(_NO_TOKENS)
    first = counted[0]
    if not 1 <= n_positions <= text.context_size - first:
        raise ValueError(
            f"n_positions={n_positions} from position {first} on: contexts of {text.context_size} "
            f"tokens have 1 to {text.context_size - first}."
        )
    return first


@dataclass(frozen=True, kw_only=True, eq=False)
class DifferencePCA(Directions):
    """Principal components of x^1 - x^0."""

    is_centred: bool
    """The mean was subtracted: components are of the variance, else of the mean square."""
    variance: tuple[float, ...]
    """Variance of each component: mean over tokens of its squared coefficient."""
    variance_ratio: tuple[float, ...]
    """Variance of each component over the sum of all `d_model` components."""
    components: Float[Tensor, "n_components d_model"]
    """Unit rows, largest variance first."""
    mean: Float[Tensor, " d_model"]
    """Mean of x^1 - x^0 over all tokens that count."""

    def which(self) -> tuple[Which, ...]:
        """Components, and `mean`."""
        return (*range(len(self.components)), "mean")

    def label(self, which: Which) -> str:
        """`PC 0`, or `ADL, mean`."""
        return f"PC {which}" if which != "mean" else "ADL, mean"

    def direction(self, which: Which = 0) -> Float[Tensor, " d_model"]:
        """A component by number, or the mean difference."""
        if which not in self.which():
            raise ValueError(
                f"there is no component {which!r}; there are 0 to {len(self.components) - 1}, and "
                "'mean'."
            )
        return self.mean if which == "mean" else self.components[which]


@torch.no_grad()
def difference_pca(
    source: ActivationSource,
    text: TokenizedText,
    *,
    n_components: int = 10,
    centred: bool = True,
    batch_size: int = 32,
) -> DifferencePCA:
    """Run the models over a text once and decompose x^1 - x^0.

    Args:
        source: a pair, more sites, or a cache.
        text: whose tokens that count are taken.
        n_components: to keep.
        centred: subtract the mean; it is reported either way. A constant shift, all that some
            fine-tunes do, is in the mean alone then.
        batch_size: contexts a forward pass.

    Raises:
        ValueError: no two sites of one width, no token that counts, as many components as there
            are not, or activations that do not differ.
    """
    sums = _Sums.of(source)
    d_model = len(sums.total)
    if not 1 <= n_components <= d_model:
        raise ValueError(
            f"n_components={n_components}: activations {d_model} wide have 1 to {d_model}"
        )
    outer = torch.zeros(d_model, d_model).to(sums.total)
    for difference, _ in sums.over(source, text, batch_size):
        outer.addmm_(difference.T, difference)
    facts, mean = sums.facts(source), sums.total / sums.n_tokens
    second_moment = outer / sums.n_tokens
    moment = second_moment - torch.outer(mean, mean) if centred else second_moment
    if not moment.trace() > 1e-12 * second_moment.trace():
        raise ValueError(
            f"x^1 - x^0 of {facts['compared']} is the same vector at all {sums.n_tokens:,} tokens, "
            "so nothing is to be decomposed: compare models that differ below this hook, or take "
            "the mean difference alone."
        )
    variance, components = principal(moment)
    kept = variance[:n_components]
    return DifferencePCA(
        **facts,
        is_centred=centred,
        variance=tuple(kept.tolist()),
        variance_ratio=tuple((kept / variance.sum()).tolist()),
        components=components[:n_components].float().cpu(),
        mean=mean.float().cpu(),
    )


def principal(
    moment: Float[Tensor, "d d"],
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Eigenvalues of a symmetric positive matrix, largest first, and eigenvectors as rows."""
    values, vectors = torch.linalg.eigh(moment)
    rows = vectors.T.flip(0)
    largest = rows.abs().argmax(dim=1, keepdim=True)
    # Rounding can leave eigenvalues of nothing a little below zero.
    return values.flip(0).clamp(min=0), rows * rows.gather(1, largest).sign()


@dataclass(kw_only=True)
class _Sums:
    """Sums over the tokens that count, float64: of x^1 - x^0, and of the norms of both sites."""

    pair: tuple[int, int]
    total: Float[Tensor, " d_model"]
    norms: Float[Tensor, "2"]
    n_tokens: int = 0

    @classmethod
    def of(cls, source: ActivationSource) -> "_Sums":
        """Zeros. Raises ValueError unless the compared sites are of one width."""
        pair = source.side_by_side().check_one_width()
        d_model = source.side_by_side().sites[pair[0]].d_model
        total = torch.zeros(d_model, dtype=torch.float64, device=source.device)
        return cls(pair=pair, total=total, norms=torch.zeros(2, dtype=torch.float64))

    def over(
        self,
        source: ActivationSource,
        text: TokenizedText,
        batch_size: int,
        description: str | None = None,
    ) -> Iterator[tuple[Float[Tensor, "tokens d_model"], Int[Tensor, " tokens"]]]:
        """x^1 - x^0 of some tokens at a time, which are added up, and their positions.

        Raises ValueError where no token counts.
        """
        source = source.side_by_side()
        for part in harvest(source, text, batch_size=batch_size, description=description):
            both = [site_parts(part.rows, source.sites)[i] for i in self.pair]
            difference = (both[1] - both[0]).double()
            self.total += difference.sum(dim=0)
            self.norms += torch.stack([x.norm(dim=-1).double().sum() for x in both]).cpu()
            self.n_tokens += len(difference)
            yield difference, part.text.mask.nonzero()[:, 1]
        if not self.n_tokens:
            raise ValueError(_NO_TOKENS)

    def facts(self, source: ActivationSource) -> dict[str, Any]:
        """Fields of `Directions`: the compared sites, and mean norms there."""
        base, finetuned = (source.model_sites[i] for i in source.check_one_width())
        return {
            "compared": (base.name, finetuned.name),
            "hook_names": (base.hook_name, finetuned.hook_name),
            "models": (base.label, finetuned.label),
            "n_tokens": self.n_tokens,
            "activation_norms": tuple(norm / self.n_tokens for norm in self.norms.tolist()),
        }


def component_rows(models: ModelPair, text: TokenizedText, n: int) -> Float[Tensor, "n d_model"]:
    """The first principal components of x^1 - x^0, as many as there are if they are fewer."""
    d_model = models.model_sites[0].d_model
    return difference_pca(models, text, n_components=min(n, d_model)).components


def mean_rows(models: ModelPair, text: TokenizedText, n: int) -> Float[Tensor, "n d_model"]:
    """Mean of x^1 - x^0, then at as many first positions as make n, if contexts reach."""
    n_positions = max(1, min(n - 1, text.context_size // 2))
    found = activation_difference(models, text, n_positions=n_positions)
    positions = [w for w in found.which() if w != "mean"]
    return torch.stack([found.direction(w) for w in ("mean", *positions)])
