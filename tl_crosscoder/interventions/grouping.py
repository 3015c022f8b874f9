"""Groups of latents that carry the change together, and their number.

What latents carry in each passage, A `[n_passages, n_latents]` (nats, what carries the change
positive), is factorised, A ≈ W H with W, H >= 0 (scikit-learn's NMF, from `nndsvda`): a row of H is
a group's latents, a column of W its passages. Rows of A are first scaled to about the same length,
or the few passages with most nats would decide alone; those far below the usual size stay small.
Every entry of A is then shared out as W H is, so that shares add up to what latents carry.

The number is the largest at which other starts, and halves of the documents, find the same rows of
H again (cosine of `AGREEMENT` or more: of halves the lower quartile, row by row) and every group
carries `LEAST_SHARE` or more. It may be 0. Limit: groups that share all their latents are one.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MOST = 8
"""Groups that are looked for at most."""
AGREEMENT = 0.9
"""Cosine at which a row of H is found again."""
LEAST_SHARE = 0.05
"""Of what latents carry, for the smallest group: below it the larger ones are only cut in two."""
USUAL = 0.01
"""Of the usual length of a row, weighted by length: rows far below it are noise, not groups."""
N_STARTS, N_SPLITS = 4, 10
"""Random starts of the fit that the first one is compared with, and splits into halves."""
Passages = Float[Tensor, "n_passages n_latents"]
Rows = Float[Tensor, "n n_latents"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Groups:
    """What was found."""

    rows: Rows
    """H: latents of each group, of length 1."""
    agreement: Float[Tensor, " n"]
    """Cosine at which each is found again: the least over starts, and over halves."""
    tried: tuple[float, ...]
    """Least agreement with 1, 2, ... groups; NaN where one of them is below `LEAST_SHARE`."""

    def parts(self, A: Passages) -> Float[Tensor, "n n_passages n_latents"]:
        """What of each entry belongs to each group; parts add up to A.

        The passages may be others than those of the grouping.
        """
        return _parts(A, _weights(A, self.rows), self.rows)


def grouped(A: Passages, documents: Int[Tensor, " n_passages"], *, seed: int = 0) -> Groups:
    """Find the groups.

    Args:
        A: what latents carry in each passage; entries below 0 work against the change.
        documents: which document each passage is of: halves are of documents.
        seed: of starts and halves.
    """
    best, tried = None, []
    different = documents.unique()
    most = min(MOST, *A.shape) if len(different) > 3 and bool((A > 0).any()) else 0
    halves = [*_halves(documents, seed=seed)] if most else []
    scaled = _scaled(A)
    for n in range(1, most + 1):
        W, H = _fit(scaled, n)
        shares = _parts(A.clamp(min=0), W, H).sum(dim=(1, 2)) / A.clamp(min=0).sum()
        if shares.min() < LEAST_SHARE:
            tried.append(math.nan)
            continue
        again = _found_again(scaled, H, halves, seed=seed)
        tried.append(again.min().item())
        if tried[-1] >= AGREEMENT:
            best = H, again
    rows, agreement = best or (A.new_zeros(0, A.shape[1]), A.new_zeros(0))
    return Groups(rows=rows, agreement=agreement, tried=tuple(tried))


def matched(rows: Rows, others: Float[Tensor, "n_others n_latents"]) -> Float[Tensor, " n"]:
    """Cosine of each row with a row of its own of the others, the best pairing; 0 without one."""
    from scipy.optimize import linear_sum_assignment

    unit = [each / each.norm(dim=1, keepdim=True).clamp(min=1e-30) for each in (rows, others)]
    cosines = unit[0] @ unit[1].T
    i, j = linear_sum_assignment(-cosines.numpy())
    found = torch.zeros(len(rows), dtype=cosines.dtype)
    found[i] = cosines[i, j]
    return found


def _found_again(
    scaled: Passages, H: Rows, halves: list[Bool[Tensor, " n_passages"]], *, seed: int
) -> Float[Tensor, " n"]:
    n = len(H)
    of_halves = torch.stack([matched(H, _fit(scaled[own], n)[1]) for own in halves])
    start = matched(H, _fit(scaled, n, n_random=N_STARTS, seed=seed)[1])
    return torch.minimum(start, of_halves.quantile(0.25, dim=0))


def _halves(documents: Int[Tensor, " n_passages"], *, seed: int) -> Iterator[Tensor]:
    different, generator = documents.unique(), torch.Generator().manual_seed(seed)
    for _ in range(N_SPLITS):
        order = different[torch.randperm(len(different), generator=generator)]
        own = torch.isin(documents, order[: len(order) // 2])
        yield own
        yield ~own


def _scaled(A: Passages) -> Passages:
    A = A.double().clamp(min=0)
    lengths = A.norm(dim=1, keepdim=True)
    usual = lengths.square().sum() / lengths.sum().clamp(min=1e-30)
    return A / (lengths + USUAL * usual).clamp(min=1e-30)


def _fit(A: Passages, n: int, *, n_random: int = 0, seed: int = 0) -> tuple[Tensor, Rows]:
    """W and H, rows of H of length 1: from `nndsvda`, or the best of random starts."""
    # It takes a second to import.
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    inits = ["random"] * n_random or ["nndsvda"]
    found = []
    for i, init in enumerate(inits):
        size: Any = min(n, *A.shape)  # its annotation knows of names alone
        model = NMF(size, init=init, max_iter=300, random_state=seed + i)
        with warnings.catch_warnings():
            # A fit that is still moving is one that is not found again.
            warnings.simplefilter("ignore", ConvergenceWarning)
            W = model.fit_transform(A.numpy())
        found.append((model.reconstruction_err_, W, model.components_))
    _, W, H = min(found, key=lambda each: each[0])
    W, H = torch.from_numpy(W), torch.from_numpy(H)
    lengths = H.norm(dim=1).clamp(min=1e-30)
    return W * lengths, H / lengths[:, None]


def _weights(A: Passages, H: Rows) -> Float[Tensor, "n_passages n"]:
    """W of other passages, with H as it is."""
    # scipy's `nnls` ends the process where there is no row.
    if not len(H) or not A.numel():
        return torch.zeros(len(A), len(H), dtype=torch.float64)
    from sklearn.decomposition import non_negative_factorization

    H, size = H.double(), cast("Any", len(H))
    W, _, _ = non_negative_factorization(
        _scaled(A).numpy(), H=H.numpy(), n_components=size, update_H=False, max_iter=1000
    )
    return torch.from_numpy(W)


def _parts(
    A: Passages, W: Float[Tensor, "n_passages n"], H: Rows
) -> Float[Tensor, "n n_passages n_latents"]:
    each = W.T[:, :, None] * H[:, None, :]
    total = each.sum(dim=0)
    even = torch.full_like(each, 1 / max(1, len(H)))
    return A * torch.where(total > 0, each / total.clamp(min=1e-30), even)
