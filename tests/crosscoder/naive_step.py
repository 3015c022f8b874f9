"""The loss of every member once more: float64, formulas as written, loops where latents compete.

Independent of the package's code: of it, only the fields of the config are read. A parameter that
a rule takes away does not exist here: a tied part has one decoder row a latent, and a site that a
part does not read or write has no weights for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tl_crosscoder import L1, BatchTopK, CrosscoderTrainingConfig, JumpReLU, TopK
from tl_crosscoder.crosscoder.partition import Partition


@dataclass
class NaiveWeights:
    """Leaves; `enc[part][site]` is `[d_model, n]` and `dec[part][site]` is `[n, d_model]`."""

    enc: list[list[Tensor | None]]
    dec: list[list[Tensor | None]]
    b_enc: Tensor
    b_dec: list[Tensor]
    log_threshold: Tensor

    def leaves(self) -> list[Tensor]:
        """Each parameter once."""
        found = [w for table in (*self.enc, *self.dec) for w in table if w is not None]
        found += [self.b_enc, *self.b_dec, self.log_threshold]
        return list({id(w): w for w in found}.values())


@dataclass
class NaiveBatch:
    """One batch, encoded, and everything that the terms of the loss are made of."""

    cfg: CrosscoderTrainingConfig
    x: Sequence[Tensor]
    pre: Tensor
    norms: Tensor
    codes: Tensor
    decoders: list[Tensor]
    b_dec: list[Tensor]

    def errors(self, latents: Sequence[int]) -> list[Tensor]:
        """Of each site, where only these latents decode."""
        own = list(latents)
        sites = zip(self.x, self.decoders, self.b_dec, strict=True)
        return [x - self.codes[:, own] @ W[own] - b for x, W, b in sites]


def the_parts(cfg: CrosscoderTrainingConfig) -> list[Partition]:
    return list(cfg.partitions) or [Partition(name="all", share=1.0)]


def part_latents(cfg: CrosscoderTrainingConfig) -> list[range]:
    """The latents of each part."""
    total, edges = 0.0, [0]
    for part in the_parts(cfg):
        total += part.share
        edges.append(round(total * cfg.d_sae))
    return [range(a, b) for a, b in pairwise(edges)]


def site_matrices(
    cfg: CrosscoderTrainingConfig, weights: NaiveWeights
) -> tuple[list[Tensor], list[Tensor]]:
    """Encoder `[d_model, d_sae]` and decoder `[d_sae, d_model]` of each site."""
    sizes = [len(latents) for latents in part_latents(cfg)]
    encoders, decoders = [], []
    for m, site in enumerate(cfg.sites):
        own = [
            torch.zeros(site.d_model, n, dtype=torch.float64) if rows[m] is None else rows[m]
            for rows, n in zip(weights.enc, sizes, strict=True)
        ]
        encoders.append(torch.cat(own, dim=1))
        own = [
            torch.zeros(n, site.d_model, dtype=torch.float64) if rows[m] is None else rows[m]
            for rows, n in zip(weights.dec, sizes, strict=True)
        ]
        decoders.append(torch.cat(own, dim=0))
    return encoders, decoders


def largest_places(values: Mapping[tuple[int, int], float], n: int) -> list[tuple[int, int]]:
    """Where the n largest positive ones are; of equal ones the first in reading order."""
    positive = sorted((-value, place) for place, value in values.items() if value > 0)
    return [place for _, place in positive[:n]]


def budgets(cfg: CrosscoderTrainingConfig, step: int) -> list[tuple[list[int], float]]:
    """Latents that compete with one another, with their k at this step."""
    pooled: list[int] = []
    found = []
    for part, latents in zip(the_parts(cfg), part_latents(cfg), strict=True):
        if part.k is None:
            pooled += latents
        else:
            found.append((list(latents), part.k))
    found += [(pooled, cfg.sparsity.k)] if pooled else []
    share = annealed_share(cfg, step)
    return [(latents, min(k * share, len(latents))) for latents, k in found]


def annealed_share(cfg: CrosscoderTrainingConfig, step: int) -> float:
    sparsity = cfg.sparsity
    if not isinstance(sparsity, BatchTopK) or sparsity.k_initial is None:
        return 1.0
    left = max(0.0, 1 - step / sparsity.k_anneal_steps)
    return (sparsity.k + (sparsity.k_initial - sparsity.k) * left) / sparsity.k


def selected(cfg: CrosscoderTrainingConfig, weighted: Tensor, step: int) -> Tensor:
    """1 where a latent stays, `[batch, d_sae]`."""
    mask, tokens = torch.zeros_like(weighted), range(len(weighted))
    values = weighted.tolist()
    for latents, k in budgets(cfg, step):
        rounds = [[i] for i in tokens] if isinstance(cfg.sparsity, TopK) else [list(tokens)]
        for own in rounds:
            competing = {(i, j): values[i][j] for i in own for j in latents}
            for place in largest_places(competing, round(k * len(own))):
                mask[place] = 1.0
    return mask


def jumprelu_codes(sparsity: JumpReLU, pre: Tensor, threshold: Tensor) -> Tensor:
    """u 1[u > theta]; near theta, d/dtheta = -theta / bandwidth, and d/du the opposite."""
    is_near = (pre - threshold).abs() < sparsity.bandwidth / 2
    slope = (threshold / sparsity.bandwidth * is_near).detach()
    codes = pre * (pre > threshold) - slope * (threshold - threshold.detach())
    return codes + slope * (pre - pre.detach()) if sparsity.ste_to_input else codes


def multiplied(cfg: CrosscoderTrainingConfig, values: Tensor) -> Tensor:
    """Rounded where the config asks for it, with a gradient as if it were not."""
    if cfg.compute_dtype is None:
        return values
    return values + (values.bfloat16().double() - values).detach()


def encoded(
    cfg: CrosscoderTrainingConfig, weights: NaiveWeights, x: Sequence[Tensor], step: int
) -> NaiveBatch:
    encoders, decoders = site_matrices(cfg, weights)
    pre = weights.b_enc
    for x_m, W, b in zip(x, encoders, weights.b_dec, strict=True):
        pre = pre + multiplied(cfg, x_m - b * cfg.apply_b_dec_to_input) @ multiplied(cfg, W)
    # The package divides by n_j when it folds, so it keeps n_j above 0.
    norms = sum(W.norm(dim=-1) for W in decoders).clamp(min=1e-8)
    decoders = [multiplied(cfg, W) for W in decoders]
    codes = pre * (pre > 0)
    if isinstance(cfg.sparsity, JumpReLU):
        codes = jumprelu_codes(cfg.sparsity, pre, weights.log_threshold.exp())
    elif not isinstance(cfg.sparsity, L1):
        codes = codes * selected(cfg, (codes * norms).detach(), step)
    return NaiveBatch(
        cfg=cfg, x=x, pre=pre, norms=norms, codes=codes, decoders=decoders, b_dec=weights.b_dec
    )


def reduced(errors: Sequence[Tensor], reduction: str) -> Tensor:
    """Mean over tokens of the sites' errors."""
    each = {
        "sum": lambda e: (e**2).sum(dim=-1),
        "mean": lambda e: (e**2).mean(dim=-1),
        "norm": lambda e: e.norm(dim=-1),
    }[reduction]
    return sum(each(e) for e in errors).mean()


def auxk_loss(batch: NaiveBatch, dead: Sequence[int]) -> Tensor:
    """The dead latents' own top k of each token, on what is left over."""
    cfg, n = batch.cfg, len(batch.pre)
    residual = torch.cat(batch.errors(range(cfg.d_sae)), dim=-1).detach()
    k = cfg.auxk.k or max(1, cfg.d_in // 2)
    values = (batch.pre * batch.norms).detach().tolist()
    mask = torch.zeros_like(batch.pre)
    for i in range(n):
        for place in largest_places({(i, j): values[i][j] for j in dead}, k):
            mask[place] = 1.0
    error = residual - (batch.pre * mask) @ torch.cat(batch.decoders, dim=-1)
    variance = ((residual - residual.mean(dim=0)) ** 2).sum() / n
    return cfg.auxk.weight * (error**2).sum() / n / variance.clamp(min=1e-12)


def delta_loss(batch: NaiveBatch, mean_squared_difference: float | None) -> Tensor:
    """|| (x^1 - x^0) - sum_j f_j (d_j^1 - d_j^0) ||^2, or that over the mean of ||x^1 - x^0||^2."""
    cfg, term = batch.cfg, batch.cfg.delta_loss
    difference = batch.x[-1] - batch.x[0]
    left = difference
    for part, latents in zip(the_parts(cfg), part_latents(cfg), strict=True):
        for j in latents if term.partition in (part.name, None) else ():
            left = left - batch.codes[:, j, None] * (batch.decoders[-1][j] - batch.decoders[0][j])
    if term.with_bias:
        left = left - (batch.b_dec[-1] - batch.b_dec[0])
    loss = term.weight * (left**2).sum(dim=-1).mean()
    if term.scale == "absolute":
        return loss
    now = (difference**2).sum(dim=-1).mean().item()
    before = now if mean_squared_difference is None else mean_squared_difference
    return loss / max(1e-12, 0.99 * before + 0.01 * now)


def penalties(batch: NaiveBatch, coefficients: Mapping[str, float]) -> dict[str, Tensor]:
    cfg, sparsity = batch.cfg, batch.cfg.sparsity
    scale = torch.ones_like(batch.norms)
    for part, latents in zip(the_parts(cfg), part_latents(cfg), strict=True):
        scale[list(latents)] = part.penalty_scale
    if isinstance(sparsity, L1):
        each = batch.codes * batch.norms * scale
        return {"l1": coefficients.get("l1", sparsity.coefficient) * each.sum(dim=-1).mean()}
    if isinstance(sparsity, JumpReLU):
        each = torch.tanh(sparsity.tanh_scale * batch.codes * batch.norms) * scale
        return {"tanh": coefficients.get("tanh", sparsity.coefficient) * each.sum(dim=-1).mean()}
    return {}


def naive_losses(
    cfg: CrosscoderTrainingConfig,
    weights: NaiveWeights,
    x: Sequence[Tensor],
    *,
    dead: Sequence[int] = (),
    step: int = 0,
    coefficients: Mapping[str, float] | None = None,
    mean_squared_difference: float | None = None,
) -> dict[str, Tensor]:
    """The terms of the loss; `x` is one `[batch, d_model]` a site.

    Args:
        mean_squared_difference: the running mean of ||x^1 - x^0||^2 before this batch, if any.
    """
    batch = encoded(cfg, weights, x, step)
    losses = {"reconstruction": reduced(batch.errors(range(cfg.d_sae)), cfg.reconstruction)}
    if cfg.matryoshka:
        prefixes = [range(max(1, round(share * cfg.d_sae))) for share in cfg.matryoshka]
        losses["matryoshka"] = sum(reduced(batch.errors(p), cfg.reconstruction) for p in prefixes)
    if cfg.delta_loss is not None:
        losses["delta"] = delta_loss(batch, mean_squared_difference)
    if cfg.auxk is not None and not isinstance(cfg.sparsity, L1):
        losses["auxk"] = auxk_loss(batch, dead) if dead else torch.zeros(()).double()
    return losses | penalties(batch, coefficients or {})
