"""The terms of the training loss, each a pure function of errors, activations and decoded sums.

    loss = reconstruction + matryoshka prefixes + delta + AuxK + penalties

Activations, reconstructions and errors are flat, `[batch, d_in]`. `Objective` chooses the terms of
a config. Limit: it holds no state; the running mean that a relative delta loss divides by is
handed in.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.config.presets import Reconstruction
from tl_crosscoder.crosscoder.config import CrosscoderTrainingConfig, DeltaLoss
from tl_crosscoder.crosscoder.site_views import split_sites
from tl_crosscoder.crosscoder.sparse.codes import Codes
from tl_crosscoder.crosscoder.sparse.step import Step
from tl_crosscoder.models.site import Site, subtracted_sites


def reconstruction_loss(
    x: Float[Tensor, "batch d_in"],
    x_hat: Float[Tensor, "batch d_in"],
    sites: tuple[Site, ...],
    *,
    reduction: Reconstruction,
) -> Float[Tensor, ""]:
    """Mean over tokens of the summed error of the sites.

    `sum` is sum_m ||e^m||^2 (Lindsey et al. 2024), `mean` divides each site by its width, and
    `norm` is sum_m ||e^m||.
    """
    if reduction == "sum":
        return torch.nn.functional.mse_loss(x_hat, x, reduction="sum") / len(x)
    per_site = split_sites(x - x_hat, sites)
    if reduction == "mean":
        return torch.stack([e.pow(2).mean(dim=-1) for e in per_site]).sum(dim=0).mean()
    return torch.stack([e.norm(dim=-1) for e in per_site]).sum(dim=0).mean()


def site_difference(
    flat: Float[Tensor, "*batch d_in"], sites: tuple[Site, ...]
) -> Float[Tensor, "*batch d_model"]:
    """The fine-tuned site minus the base site; `subtracted_sites` chooses the two."""
    compared = subtracted_sites(sites)
    assert compared is not None, "the config refuses sites that cannot be subtracted"
    base, finetuned = compared
    per_site = split_sites(flat, sites)
    return per_site[finetuned] - per_site[base]


def delta_loss(
    x: Float[Tensor, "batch d_in"],
    explained: Float[Tensor, "batch d_in"],
    sites: tuple[Site, ...],
) -> Float[Tensor, ""]:
    """Mean over tokens of ||(x^1 - x^0) - (y^1 - y^0)||^2, y being what some latents decode to.

    Source: Kassem et al. 2026, equation of L_delta; the reduction is [open] there.
    """
    return site_difference(x - explained, sites).pow(2).sum(dim=-1).mean()


def auxk_codes(
    pre: Float[Tensor, "batch n_dead"], norms: Float[Tensor, " n_dead"], *, k: int
) -> Float[Tensor, "batch n_dead"]:
    """For each token the codes of the dead latents with the k largest f_j n_j, 0 elsewhere."""
    codes = pre.relu()
    if k >= pre.shape[1]:
        return codes
    top = (codes.detach() * norms.detach()).topk(k, dim=-1).indices
    return codes * torch.zeros_like(codes).scatter_(-1, top, 1.0)


BatchMean = Callable[[Float[Tensor, "batch *rest"]], Float[Tensor, "*rest"]]
"""Mean over a batch, of which other processes may hold parts."""


def own_mean(values: Float[Tensor, "batch *rest"]) -> Float[Tensor, "*rest"]:
    """Mean over a batch that is here."""
    return values.mean(dim=0)


def auxk_loss(
    residual: Float[Tensor, "batch d_in"],
    decoded: Float[Tensor, "batch d_in"],
    *,
    batch_mean: BatchMean = own_mean,
) -> Float[Tensor, ""]:
    """Squared error of the residual as the dead latents reconstruct it, over its variance.

    The decoder bias takes no part, since it is in the residual already. The variance is that of the
    whole batch (`batch_mean`), the error that of the tokens that are here. Source: Gao et al. 2024,
    appendix A.2.
    """
    residual = residual.detach()
    error = (residual - decoded).pow(2).sum(dim=-1).mean()
    variance = batch_mean((residual - batch_mean(residual)).pow(2).sum(dim=-1))
    return error / variance.clamp(min=1e-12)


class Objective:
    """The terms that a config requests, and where latents are decoded apart for them."""

    def __init__(self, cfg: CrosscoderTrainingConfig, *, batch_mean: BatchMean = own_mean) -> None:
        self.cfg, self._batch_mean = cfg, batch_mean
        self.auxk = cfg.auxk if cfg.sparsity.has_auxk else None
        delta = cfg.delta_loss
        self.delta = delta if delta is not None and delta.weight > 0 else None
        self.prefixes = [max(1, round(s * cfg.d_sae)) for s in cfg.matryoshka]
        partitions = cfg.placed_partitions()
        self._explaining = slice(0, cfg.d_sae)
        if self.delta is not None and self.delta.partition is not None:
            self._explaining = next(own for p, own in partitions if p.name == self.delta.partition)
        edges = {*self.prefixes, self._explaining.start, self._explaining.stop}
        self.bounds = tuple(sorted(edges - {0, cfg.d_sae}))
        """First latent of each range that is decoded apart, but of the first range."""
        self._penalty_scales = [(own, p.penalty_scale) for p, own in partitions]

    def terms(
        self,
        x: Float[Tensor, "batch d_in"],
        x_hat: Float[Tensor, "batch d_in"],
        done: Step,
        b_dec: Float[Tensor, " d_in"],
        mean_squared_difference: Float[Tensor, ""] | None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Every term but the penalties, weighted as they are added."""
        reduction, sites = self.cfg.reconstruction, self.cfg.sites
        terms = {"reconstruction": reconstruction_loss(x, x_hat, sites, reduction=reduction)}
        if self.prefixes:
            stops = [*self.bounds, self.cfg.d_sae]
            nested = torch.stack(done.decoded).cumsum(dim=0) + b_dec
            losses = [
                reconstruction_loss(x, nested[stops.index(n)], sites, reduction=reduction)
                for n in self.prefixes
            ]
            terms["matryoshka"] = torch.stack(losses).sum()
        if self.delta is not None:
            explained = self._explained(x_hat, done, b_dec, self.delta)
            loss = self.delta.weight * delta_loss(x, explained, sites)
            relative = mean_squared_difference is not None
            terms["delta"] = loss / mean_squared_difference if relative else loss
        if self.auxk is not None:
            decoded = done.block_decoded
            none = x.new_zeros(())
            unit = none if decoded is None else self.auxk.weight * self._loss_of_the_mean(x)
            terms["auxk"] = (
                none
                if decoded is None
                else unit * auxk_loss(x - x_hat, decoded, batch_mean=self._batch_mean)
            )
        return terms

    @torch.no_grad()
    def auxk_fve(
        self, x: Float[Tensor, "batch d_in"], losses: Mapping[str, Float[Tensor, ""]]
    ) -> Float[Tensor, ""]:
        """Share of the residual's variance that the dead latents explain; NaN without any."""
        assert self.auxk is not None
        unit, loss = self.auxk.weight * self._loss_of_the_mean(x), losses["auxk"].detach()
        return torch.where(loss > 0, 1 - loss / unit, torch.nan)

    def _loss_of_the_mean(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
        """Reconstruction loss of the batch's mean, which Gao et al. 2024 divide theirs by.

        AuxK is multiplied by it instead, so that its weight means what it means there. Without it
        the gradient of a dead latent is hundreds of times smaller than what it had while it was
        alive, which is what Adam divides by for a thousand steps.
        """
        mean = self._batch_mean(x).expand_as(x)
        own = reconstruction_loss(x, mean, self.cfg.sites, reduction=self.cfg.reconstruction)
        return self._batch_mean(own[None])

    def _explained(
        self, x_hat: Tensor, done: Step, b_dec: Tensor, delta: DeltaLoss
    ) -> Float[Tensor, "batch d_in"]:
        """What the latents that must explain the difference decode to."""
        if delta.partition is None:
            return x_hat if delta.with_bias else x_hat - b_dec
        within = self._explaining
        ranges = zip(done.decoded, [0, *self.bounds], strict=True)
        own = [decoded for decoded, a in ranges if within.start <= a < within.stop]
        explained = torch.stack(own).sum(dim=0)
        return explained + b_dec if delta.with_bias else explained

    def penalties(
        self,
        codes: Codes,
        norms: Float[Tensor, " d_sae"],
        coefficients: Mapping[str, float] | None,
    ) -> dict[str, Float[Tensor, ""]]:
        """The penalties of the sparsity, mean over tokens, with these weights or its own."""
        sparsity, scale = self.cfg.sparsity, None
        if any(factor != 1.0 for _, factor in self._penalty_scales):
            scale = torch.empty_like(norms)
            for latents, factor in self._penalty_scales:
                scale[latents] = factor
        weights = {name: c.value for name, c in sparsity.coefficients().items()}
        return {
            name: (coefficients or weights)[name]
            * sparsity.penalty(codes, norms, scale)
            / codes.batch
            for name in weights
        }
