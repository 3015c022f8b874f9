"""Crosscoder model diffing in one file: dense, slow, and written to be read.

A crosscoder is one sparse dictionary over the activations of several sites, a site being one hook
of one model. Site 0 is the base, the last one is fine-tuned. Activations are a list with one
`[batch, d_model]` tensor a site, and so are the weights of the sites.

    u_j  = sum_m <W_enc^m[:, j], x^m> + b_enc_j     pre-activation of latent j
    f_j  = u_j where the latent is kept, else 0     its code
    x̂^m  = sum_j f_j d_j^m + b_dec^m                reconstruction of site m, d_j^m = W_dec^m[j]
    n_j  = sum_m ||d_j^m||                          weight of the latent wherever latents compete

Whatever the package computes fast, its tests compare with this. Nothing here is imported from it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Weights:
    """Parameters of a crosscoder."""

    W_enc: list[Tensor]  # [d_model, d_sae] for each site
    b_enc: Tensor  # [d_sae]
    W_dec: list[Tensor]  # [d_sae, d_model] for each site
    b_dec: list[Tensor]  # [d_model] for each site


def pre_activations(w: Weights, x: list[Tensor]) -> Tensor:
    """u, `[batch, d_sae]`."""
    return w.b_enc + sum(x_m @ W for x_m, W in zip(x, w.W_enc, strict=True))


def decoder_norms(w: Weights) -> Tensor:
    """n, `[d_sae]`; kept above 0, since the saved dictionary is divided by it."""
    return sum(W.norm(dim=-1) for W in w.W_dec).clamp(min=1e-8)


def decode(w: Weights, codes: Tensor) -> list[Tensor]:
    """x̂ of each site."""
    return [codes @ W + b for W, b in zip(w.W_dec, w.b_dec, strict=True)]


# ---- Which latents are active -------------------------------------------------------------------


def largest(values: Tensor, n: int) -> Tensor:
    """1 at the n largest positive values, 0 elsewhere; of equal ones the first in reading order."""
    flat = values.flatten().tolist()
    ranked = sorted((i for i, v in enumerate(flat) if v > 0), key=lambda i: (-flat[i], i))
    mask = torch.zeros(len(flat), dtype=values.dtype)
    mask[ranked[:n]] = 1
    return mask.view(values.shape)


def batch_topk(weighted: Tensor, k: float) -> Tensor:
    """The k * batch largest of a whole batch stay (Bussmann et al. 2024)."""
    return largest(weighted, round(k * len(weighted)))


def topk(weighted: Tensor, k: float) -> Tensor:
    """The k largest of each token stay (Gao et al. 2024)."""
    return torch.stack([largest(row, round(k)) for row in weighted])


Group = tuple[Sequence[int], float]
"""Latents that compete with one another, and their k. Dual-K has two groups."""


def selected_codes(
    u: Tensor, n: Tensor, groups: Sequence[Group], rule: Callable[[Tensor, float], Tensor]
) -> Tensor:
    """f, `[batch, d_sae]`: latents compete by f_j n_j, and the value is f_j itself.

    No gradient passes through the choice.
    """
    positive = u.relu()
    weighted = (positive * n).detach()
    mask = torch.zeros_like(weighted)
    for latents, k in groups:
        mask[:, list(latents)] = rule(weighted[:, list(latents)], k)
    return positive * mask


def threshold(weighted: Tensor, k: float) -> float:
    """The threshold of inference: f_j n_j is above it k times a token, on held-out tokens.

    Midway between the last value kept and the first one that is not, and never below 0.
    """
    values = sorted(weighted.flatten().tolist(), reverse=True)
    n = round(k * len(weighted))
    return max(0.0, (values[n - 1] + values[n]) / 2)


def jumprelu(u: Tensor, theta: Tensor, *, bandwidth: float, ste_to_input: bool) -> Tensor:
    """u 1[u > theta]; near theta d/dtheta is -theta / bandwidth, and d/du maybe the opposite."""
    slope = (theta / bandwidth * ((u - theta).abs() < bandwidth / 2)).detach()
    codes = u * (u > theta) - slope * (theta - theta.detach())
    return codes + slope * (u - u.detach()) if ste_to_input else codes


# ---- The loss -----------------------------------------------------------------------------------


def errors(w: Weights, x: list[Tensor], codes: Tensor) -> list[Tensor]:
    """e^m = x^m - x̂^m of each site."""
    return [x_m - x_hat for x_m, x_hat in zip(x, decode(w, codes), strict=True)]


def reconstruction_loss(e: list[Tensor], reduction: str = "sum") -> Tensor:
    """Mean over tokens of sum_m ||e^m||^2; or of its mean over dimensions, or of sum_m ||e^m||."""
    each = {
        "sum": lambda e_m: (e_m**2).sum(dim=-1),
        "mean": lambda e_m: (e_m**2).mean(dim=-1),
        "norm": lambda e_m: e_m.norm(dim=-1),
    }[reduction]
    return sum(each(e_m) for e_m in e).mean()


def prefix_errors(w: Weights, x: list[Tensor], codes: Tensor, n: int) -> list[Tensor]:
    """Errors where the first n latents alone decode: matryoshka (Bussmann et al. 2025)."""
    return errors(w, x, codes * (torch.arange(codes.shape[1]) < n))


def delta_loss(
    w: Weights, x: list[Tensor], codes: Tensor, latents: Sequence[int], *, with_bias: bool = False
) -> Tensor:
    """Mean of ||(x^1 - x^0) - sum_{j in latents} f_j (d_j^1 - d_j^0)||^2 (Kassem et al. 2026)."""
    left = x[-1] - x[0]
    for j in latents:
        left = left - codes[:, j, None] * (w.W_dec[-1][j] - w.W_dec[0][j])
    if with_bias:
        left = left - (w.b_dec[-1] - w.b_dec[0])
    return (left**2).sum(dim=-1).mean()


def auxk_loss(w: Weights, e: list[Tensor], codes: Tensor) -> Tensor:
    """Dead latents reconstruct the residual (Gao et al. 2024, A.2); `codes` are 0 for all others.

    Squared error over the variance of the residual; the residual is a constant here.
    """
    residual = torch.cat(e, dim=-1).detach()
    error = residual - codes @ torch.cat(w.W_dec, dim=-1)
    variance = ((residual - residual.mean(dim=0)) ** 2).sum(dim=-1).mean()
    return (error**2).sum(dim=-1).mean() / variance.clamp(min=1e-12)


def batchtopk_loss(w: Weights, x: list[Tensor], k: float) -> Tensor:
    """A BatchTopK crosscoder (Minder et al. 2025), without AuxK."""
    every = range(len(w.b_enc))
    codes = selected_codes(pre_activations(w, x), decoder_norms(w), [(every, k)], batch_topk)
    return reconstruction_loss(errors(w, x, codes))


def delta_crosscoder_loss(
    w: Weights, x: list[Tensor], shared: Group, delta: Group, weight: float
) -> Tensor:
    """A Delta-Crosscoder (Kassem et al. 2026): Dual-K, and delta latents explain x^1 - x^0."""
    codes = selected_codes(pre_activations(w, x), decoder_norms(w), [shared, delta], batch_topk)
    return reconstruction_loss(errors(w, x, codes)) + weight * delta_loss(w, x, codes, delta[0])


# ---- What was learned ---------------------------------------------------------------------------


def latent_scaling(w: Weights, x: list[Tensor], codes: Tensor, j: int, d: Tensor, m: int) -> dict:
    """Least-squares beta of f_j d in four targets of site m (Minder et al. 2025, section 3)."""
    own, x_hat = torch.outer(codes[:, j], w.W_dec[m][j]), decode(w, codes)[m]
    targets = {
        "error": x[m] - x_hat + own,
        "reconstruction": x_hat,
        "activation": x[m],
        "activation_no_bias": x[m] - w.b_dec[m],
    }
    regressor = torch.outer(codes[:, j], d)  # argmin over beta of ||target - beta regressor||^2
    return {n: (t * regressor).sum() / (regressor**2).sum() for n, t in targets.items()}


def patched(w: Weights, x: list[Tensor], codes: Tensor, latents: Sequence[int]) -> Tensor:
    """h_S = x^0 + sum_{j in S} f_j (d_j^1 - d_j^0), on which the fine-tuned model is run."""
    own = list(latents)
    return x[0] + codes[:, own] @ (w.W_dec[-1][own] - w.W_dec[0][own])


def ablated(w: Weights, x: list[Tensor], codes: Tensor, latents: Sequence[int]) -> Tensor:
    """x^1 without what the latents add to the difference; of all latents and errors it is x^0."""
    own = list(latents)
    return x[-1] - codes[:, own] @ (w.W_dec[-1][own] - w.W_dec[0][own])
