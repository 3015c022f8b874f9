"""PCA of x^1 - x^0: the directions in which a fine-tune moves the activation most.

    C = 1/n sum_i (delta_i - mean)(delta_i - mean)'      delta_i = x^1_i - x^0_i at token i

Contract: one pass over a text that adds up delta and delta delta' in float64, `[d_model, d_model]`,
on the device of the activations; `components [n_components, d_model]` are unit eigenvectors,
largest variance first. Their sign is free: the entry of largest size is made positive. So steer
with strengths of both signs. Limit: where variances are equal, any basis of their span would do.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.baselines.directions import Directions, Which, compared_facts, sum_of_norms
from tl_crosscoder.data.harvest import harvest_rows
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.site import site_parts
from tl_crosscoder.models.source import ActivationSource


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
    facts, source = compared_facts(source), source.side_by_side()
    pair = source.check_one_width()
    d_model = source.sites[pair[0]].d_model
    if not 1 <= n_components <= d_model:
        raise ValueError(
            f"n_components={n_components}: activations {d_model} wide have 1 to {d_model}"
        )
    outer = torch.zeros(d_model, d_model, dtype=torch.float64, device=source.device)
    total, norms, n_tokens = torch.zeros_like(outer[0]), torch.zeros(2, dtype=torch.float64), 0
    for rows in harvest_rows(source, text, batch_size=batch_size):
        base, finetuned = (site_parts(rows, source.sites)[i] for i in pair)
        difference = (finetuned - base).double()
        outer.addmm_(difference.T, difference)
        total += difference.sum(dim=0)
        norms += sum_of_norms(base, finetuned)
        n_tokens += len(rows)
    if n_tokens == 0:
        raise ValueError("no token of this text counts: it is empty, or its masks leave out all.")
    mean = total / n_tokens
    second_moment = outer / n_tokens
    moment = second_moment - torch.outer(mean, mean) if centred else second_moment
    if not moment.trace() > 1e-12 * second_moment.trace():
        raise ValueError(
            f"x^1 - x^0 of {facts['compared']} is the same vector at all {n_tokens:,} tokens, so "
            "nothing is to be decomposed: compare models that differ below this hook, or take the "
            "mean difference alone."
        )
    variance, components = principal(moment)
    kept = variance[:n_components]
    return DifferencePCA(
        **facts,
        n_tokens=n_tokens,
        activation_norms=(norms[0].item() / n_tokens, norms[1].item() / n_tokens),
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
