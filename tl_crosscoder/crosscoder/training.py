"""`CrosscoderTraining`: the crosscoder while it learns, and its one loss.

The trainer of this package calls `step_loss`; SAELens's `SAETrainer` gets the same loss through
`training_forward_pass`. Inputs are activations in the space of training (each site scaled),
`[batch, n_sites, d_model]` or `[batch, d_in]`. Limit: the `threshold` buffer is in units of f_j n_j
until it is folded at save.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class
from sae_lens.saes.sae import (
    TrainCoefficientConfig,
    TrainingSAE,
    TrainStepInput,
    TrainStepOutput,
)
from torch import Tensor, nn

from tl_crosscoder.crosscoder.config import (
    ARCHITECTURE,
    CrosscoderConfig,
    CrosscoderTrainingConfig,
    check_memory,
)
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.loss import Objective, auxk_codes, site_difference
from tl_crosscoder.crosscoder.partition import project_decoder_, project_encoder_
from tl_crosscoder.crosscoder.site_views import SiteViews, split_sites
from tl_crosscoder.crosscoder.sparse.codes import Codes
from tl_crosscoder.crosscoder.sparse.step import (
    Request,
    SparseStep,
    Step,
    dense_codes,
    dense_pre,
    dense_step,
)

_LAST_STEP = 2**62
N_SCALING_ROWS = 1024
"""Rows of a first batch on which the scale of the first reconstruction is measured."""
MIN_SCALE = 0.01
"""Smallest factor of the codes, so that a batch that nothing fits leaves weights to learn with."""


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """The loss of one batch and what it was made of."""

    loss: Float[Tensor, ""]
    losses: dict[str, Float[Tensor, ""]]
    """The terms, weighted as they are added."""
    x: Float[Tensor, "batch d_in"]
    x_hat: Float[Tensor, "batch d_in"]
    codes: Codes


class CrosscoderTraining(SiteViews, TrainingSAE[CrosscoderTrainingConfig]):
    """A crosscoder in training: selection over the batch, penalties, AuxK, running threshold.

    In `train()` mode `encode` selects over the batch as the loss does; in `eval()` mode it
    thresholds, so that the latents of a token do not depend on its neighbours.
    """

    cfg: CrosscoderTrainingConfig  # type: ignore[assignment]
    b_enc: nn.Parameter
    threshold: Tensor
    mean_squared_difference: Tensor

    def initialize_weights(self) -> None:
        """One draw for all sites of a width; the encoder is the decoder transposed.

        Source: Minder et al. 2025 (crosscoder training, initialisation).
        """
        check_memory(self.cfg, is_training=True)
        cfg, kind = self.cfg, {"dtype": self.dtype, "device": self.device}
        decoder = self._drawn_decoder()
        self.W_enc = nn.Parameter(decoder.T.clone())  # in memory still a row a latent
        self.W_dec = nn.Parameter(decoder)
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, **kind))
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in, **kind))
        self.register_buffer("threshold", torch.zeros(cfg.d_sae, **kind))
        for name, start in cfg.sparsity.parameters().items():
            self.register_parameter(name, nn.Parameter(torch.full((cfg.d_sae,), start, **kind)))
        if cfg.delta_loss is not None and cfg.delta_loss.scale == "relative":
            self.register_buffer("mean_squared_difference", torch.zeros((), **kind))
        self._objective = Objective(cfg, batch_mean=self.batch_mean)
        self._terms = torch.compile(self._objective.terms) if cfg.compile else self._objective.terms
        self._sparse_step = SparseStep()
        self._obey_partitions()

    def _drawn_decoder(self) -> Float[Tensor, "d_sae d_in"]:
        return drawn_decoder(self.cfg, dtype=self.dtype, device=self.device)

    def batch_mean(self, values: Float[Tensor, "batch *rest"]) -> Float[Tensor, "*rest"]:
        """Mean over a batch, of which other processes may have parts."""
        return values.mean(dim=0)

    def _summed(self, step: Step) -> Step:
        """What all latents decode to; these are all where one process holds them."""
        return step

    def _obey_partitions(self) -> None:
        """Keep weights and gradients within the rules of the partitions; see `partition`."""
        rules = self.cfg.placed_partitions()
        if not rules:
            return
        for parameter, project in ((self.W_enc, project_encoder_), (self.W_dec, project_decoder_)):
            project(parameter.data, rules, self.sites)
            parameter.register_post_accumulate_grad_hook(
                lambda p, project=project: project(p.grad, rules, self.sites)
            )

    @torch.no_grad()
    def initialize_from_(self, activations: Tensor) -> float:
        """Fit the weights that were drawn to a first batch; returns the factor of the codes.

        The decoder bias becomes the geometric median, site by site. With `encoder_init` of
        `least_squares`, pre-activations become those of activations minus that bias, and encoder
        and decoder are scaled alike, both together by the root of the least-squares factor a of
        the first reconstruction. Without it k correlated rows add up to several times the
        activation, and a hundred steps are spent on undoing that; with the whole of a, latents
        that are not chosen at first fall behind and die. Rows are never made longer. The factor is
        1 for `transposed`.

        Args:
            activations: `[batch, n_sites, d_model]` or `[batch, d_in]`, in the space of training.
        """
        x = self.flatten(activations)
        medians = [geometric_median(own) for own in split_sites(x, self.sites)]
        self.b_dec.copy_(torch.cat(medians))
        if self.cfg.encoder_init == "transposed":
            return 1.0
        bias = 0.0 if self.cfg.apply_b_dec_to_input else self.b_dec @ self.W_enc
        self.b_enc.sub_(bias)
        request = self._request(x[:N_SCALING_ROWS], is_dead=None, step=0)
        done = self._summed(dense_step(request, dense_pre(request)))
        decoded = torch.stack(done.decoded).sum(dim=0)
        centred = x[:N_SCALING_ROWS] - self.b_dec
        factor = (decoded * centred).sum() / decoded.square().sum().clamp(min=1e-12)
        factor = factor.clamp(min=MIN_SCALE, max=1.0).sqrt().item()
        for weights in (self.W_enc, self.b_enc, self.W_dec):
            weights.mul_(factor**0.5)
        return factor

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """Weights of the penalties, with their warm-up, as SAELens schedules them."""
        return dict(self.cfg.sparsity.coefficients())

    def process_sae_in(self, sae_in: Tensor) -> Float[Tensor, "... d_in"]:
        """SAELens's, without a gradient for the input where no bias is subtracted from it."""
        if self.cfg.apply_b_dec_to_input:
            return super().process_sae_in(sae_in)
        sae_in = self.hook_sae_input(self.reshape_fn_in(sae_in.to(self.dtype)))
        return self.run_time_activation_norm_fn_in(sae_in)

    def encode_with_hidden_pre(
        self, x: Tensor
    ) -> tuple[Float[Tensor, "... d_sae"], Float[Tensor, "... d_sae"]]:
        """Codes and pre-activations; see the class for what `train()` and `eval()` change."""
        x = self.flatten(x)
        rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
        r = self._request(rows, is_dead=None, step=_LAST_STEP)
        pre = self.hook_sae_acts_pre(dense_pre(r))
        if self.training:
            codes = dense_codes(r, pre)
        else:
            codes = dense_codes(replace(r, groups=[]), pre) * (pre * r.norms > self.threshold)
        shape = (*x.shape[:-1], self.cfg.d_sae)
        return self.hook_sae_acts_post(codes.view(shape)), pre.view(shape)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """`step_loss` for SAELens's trainer, which wants the codes of all latents.

        `hidden_pre` is given where codes are above zero.
        """
        output = self.step_loss(
            step_input.sae_in,
            coefficients=step_input.coefficients,
            is_dead=step_input.dead_neuron_mask,
            step=step_input.n_training_steps,
        )
        codes = output.codes.to_dense()
        return TrainStepOutput(
            sae_in=output.x,
            sae_out=output.x_hat,
            feature_acts=codes,
            hidden_pre=codes,
            loss=output.loss,
            losses=output.losses,
        )

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """The terms beside the reconstruction, as SAELens names them; `step_loss` has them all."""
        del feature_acts, hidden_pre, sae_out
        losses = self.training_forward_pass(step_input).losses
        return {name: loss for name, loss in losses.items() if name != "reconstruction"}

    def step_loss(
        self,
        x: Tensor,
        *,
        coefficients: Mapping[str, float] | None = None,
        is_dead: Bool[Tensor, " d_sae"] | None = None,
        step: int = 0,
    ) -> StepLoss:
        """The loss of one batch, with its terms; updates the running threshold.

        Args:
            x: `[batch, n_sites, d_model]` or `[batch, d_in]`, in the space of training.
            coefficients: weights of the penalties; by default those of the sparsity.
            is_dead: latents that AuxK helps.
            step: of the run, from 0, for k annealing.
        """
        x = self.flatten(x).flatten(0, -2)
        if not len(x):
            raise ValueError("the batch has no tokens: its loss would be the mean of nothing.")
        request = self._request(x, is_dead=is_dead, step=step)
        done = self._sparse_step(request) if self._takes_the_sparse_step() else None
        if done is None:
            done = dense_step(request, self.hook_sae_acts_pre(dense_pre(request)))
        done = self._summed(done)
        out = torch.stack(done.decoded).sum(dim=0) if len(done.decoded) > 1 else done.decoded[0]
        x_hat = self.hook_sae_recons(out + self.b_dec)
        losses = self._terms(x, x_hat, done, self.b_dec, self._mean_squared_difference_(x))
        losses |= self._objective.penalties(done.codes, request.norms, coefficients)
        with torch.no_grad():
            groups = self.cfg.selection_groups()
            self.cfg.sparsity.observe_(self.threshold, done.codes, request.norms, groups)
        total = torch.stack(list(losses.values())).sum()
        return StepLoss(loss=total, losses=losses, x=x, x_hat=x_hat, codes=done.codes)

    def auxk_fve(self, output: StepLoss) -> Float[Tensor, ""] | None:
        """Share of the residual's variance that dead latents explain in a step.

        NaN where no latent was dead, None without AuxK.
        """
        has_auxk = "auxk" in output.losses
        return self._objective.auxk_fve(output.x, output.losses) if has_auxk else None

    def _request(self, x: Tensor, *, is_dead: Tensor | None, step: int) -> Request:
        sparsity, auxk = self.cfg.sparsity, self._objective.auxk
        block = torch.zeros(0, dtype=torch.int64, device=x.device)
        if auxk is not None and is_dead is not None:
            block = is_dead.nonzero().squeeze(-1)
        factor = sparsity.k_factor(step)
        groups = self.cfg.selection_groups()
        return Request(
            x=self.process_sae_in(x),
            W_enc=self.W_enc,
            b_enc=self.b_enc,
            W_dec=self.W_dec,
            norms=self.get_W_dec_norm(),
            sparsity=sparsity,
            groups=[(own, min(k * factor, own.stop - own.start)) for own, k in groups],
            threshold=sparsity.learned_threshold(self._learned()),
            compute_dtype=None if self.cfg.compute_dtype is None else torch.bfloat16,
            bounds=self._objective.bounds,
            block=block,
            block_codes=partial(auxk_codes, k=self._k_aux),
        )

    @property
    def _k_aux(self) -> int:
        """Dead latents that help a token."""
        auxk = self._objective.auxk
        return (auxk.k if auxk else None) or max(1, self.cfg.d_in // 2)

    def _learned(self) -> dict[str, Tensor]:
        """Parameters of the sparsity, by name."""
        return {name: self.get_parameter(name) for name in self.cfg.sparsity.parameters()}

    def _takes_the_sparse_step(self) -> bool:
        """Not where the dense step was requested, or where someone's hook wants all codes."""
        hooks = (self.hook_sae_acts_pre, self.hook_sae_acts_post)
        return (
            self.cfg.kernels == "auto"
            and self.W_enc.device.type in ("cpu", "cuda")
            and not any(h.has_hooks() for h in hooks)
        )

    @torch.no_grad()
    def _mean_squared_difference_(self, x: Tensor) -> Tensor | None:
        """Running mean of ||x^1 - x^0||^2, begun with its first observation; None if unused."""
        if self.cfg.delta_loss is None or self.cfg.delta_loss.scale == "absolute":
            return None
        now = self.batch_mean(site_difference(x, self.sites).pow(2).sum(dim=-1))
        mean = self.mean_squared_difference
        mean.copy_(torch.where(mean > 0, torch.lerp(now, mean, 0.99), now))
        return mean.clamp(min=1e-12).clone()

    @torch.no_grad()
    def calibrate_threshold_(self, batches: Iterable[Tensor]) -> None:
        """Set the threshold so that these held-out batches keep k latents a token.

        Partitions with a k of their own get their own threshold. Does nothing for sparsities that
        select nothing: codes of L1 are all the positive ones, JumpReLU learns its thresholds.
        """
        groups, norms = self.cfg.selection_groups(), self.get_W_dec_norm()
        xs = (self.process_sae_in(self.flatten(batch)) for batch in batches)
        weighted = (torch.addmm(self.b_enc, x, self.W_enc).relu() * norms for x in xs)
        self.cfg.sparsity.calibrate_(self.threshold, weighted, groups)

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """SAELens's one scale for all sites; the threshold, in normalised space, stays."""
        self.fold_site_scales_([scaling_factor] * self.n_sites)
        self.cfg.normalize_activations = "none"

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Contiguous tensors: safetensors refuses the encoder, whose memory is transposed."""
        for name, tensor in state_dict.items():
            state_dict[name] = tensor.contiguous()

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Fold n_j into the encoder, so that the threshold applies to pre-activations."""
        self.process_state_dict_for_saving(state_dict)
        norms = self.get_W_dec_norm().detach()
        state_dict["W_enc"] = state_dict["W_enc"] * norms
        state_dict["b_enc"] = state_dict["b_enc"] * norms
        state_dict["W_dec"] = state_dict["W_dec"] / norms[:, None]
        learned = self.cfg.sparsity.learned_threshold(
            {name: state_dict.pop(name) for name in self._learned()}
        )
        if learned is not None:
            state_dict["threshold"] = learned * norms
        state_dict.pop("mean_squared_difference", None)

    @torch.no_grad()
    def to_inference(self) -> Crosscoder:
        """The dictionary as it is now, in float32 (bf16 would round thresholds).

        It works in the space of training: `fold_site_scales_` moves it to raw activations.
        """
        state = self.state_dict()
        self.process_state_dict_for_saving_inference(state)
        fields = self.cfg.get_inference_sae_cfg_dict() | {"dtype": "float32"}
        crosscoder = Crosscoder(CrosscoderConfig.from_dict(fields))
        crosscoder.load_state_dict({n: t.detach().float() for n, t in state.items()})
        return crosscoder


DRAWN = 4096
"""Rows that are drawn at a time, so that a part of a large decoder never takes the room of all."""


def drawn_decoder(
    cfg: CrosscoderTrainingConfig,
    latents: Int[Tensor, " n"] | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, "n d_in"]:
    """The first decoder from torch's generator: all rows, or some latents', which are the same."""
    norm = cfg.decoder_init_norm
    norm = cfg.sparsity.decoder_init_norm if norm is None else norm
    own = torch.arange(cfg.d_sae) if latents is None else latents.cpu()
    draws: dict[int, Tensor] = {}
    for width in (s.d_model for s in cfg.sites):
        if width not in draws:
            parts = []
            for start in range(0, cfg.d_sae, DRAWN):
                n = min(DRAWN, cfg.d_sae - start)
                rows = torch.randn(n, width, dtype=dtype, device=device)
                parts.append(rows[own[(own >= start) & (own < start + n)] - start])
            rows = torch.cat(parts)
            draws[width] = norm * rows / rows.norm(dim=-1, keepdim=True)
    return torch.cat([draws[s.d_model] for s in cfg.sites], dim=-1)


@torch.no_grad()
def geometric_median(
    points: Float[Tensor, "batch d_model"], *, n_iterations: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, " d_model"]:
    """The point with the smallest sum of distances to `points` (Weiszfeld's iteration).

    Unlike the mean it is not moved by the few tokens of enormous norm. Stops when a step is
    below `tolerance` of the median's own norm, or after `n_iterations`.
    """
    median = points.mean(dim=0)
    for _ in range(n_iterations):
        weights = 1 / (points - median).norm(dim=-1).clamp(min=1e-8)
        moved = (weights[:, None] * points).sum(dim=0) / weights.sum()
        step = (moved - median).norm()
        median = moved
        if step <= tolerance * median.norm():
            break
    return median


if ARCHITECTURE not in SAE_TRAINING_CLASS_REGISTRY:
    register_sae_training_class(ARCHITECTURE, CrosscoderTraining, CrosscoderTrainingConfig)
else:  # a notebook that reloads this module
    SAE_TRAINING_CLASS_REGISTRY[ARCHITECTURE] = (CrosscoderTraining, CrosscoderTrainingConfig)
