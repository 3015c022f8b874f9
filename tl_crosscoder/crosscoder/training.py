"""`CrosscoderTraining`: the crosscoder while it learns, and its one loss.

    loss = mean_tokens sum_m ||x^m - x̂^m||^2 + sum of penalties + AuxK

SAELens's `SAETrainer` and the trainer of this package both call `training_forward_pass`. Inputs
are activations in the space of training (each site scaled), `[batch, n_sites, d_model]` or
`[batch, d_in]`. Limit: the `threshold` buffer is in units of f_j n_j until it is folded at save.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
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
    AuxK,
    CrosscoderConfig,
    CrosscoderTrainingConfig,
    Reconstruction,
)
from tl_crosscoder.crosscoder.crosscoder import Crosscoder, SiteViews, split_sites
from tl_crosscoder.crosscoder.geometry import geometric_median
from tl_crosscoder.crosscoder.sparsity import BatchTopK, calibrate_threshold, smallest_kept
from tl_crosscoder.pair import Site


def reconstruction_loss(
    errors: Float[Tensor, "batch d_in"], sites: tuple[Site, ...], *, reduction: Reconstruction
) -> Float[Tensor, ""]:
    """Mean over tokens of the summed error of the sites.

    `sum` is sum_m ||e^m||^2 (Lindsey et al. 2024), `mean` divides each site by its width, and
    `norm` is sum_m ||e^m||.
    """
    per_site = split_sites(errors, sites)
    if reduction == "sum":
        return errors.pow(2).sum(dim=-1).mean()
    if reduction == "mean":
        return torch.stack([e.pow(2).mean(dim=-1) for e in per_site]).sum(dim=0).mean()
    return torch.stack([e.norm(dim=-1) for e in per_site]).sum(dim=0).mean()


def auxk_loss(
    *,
    residual: Float[Tensor, "batch d_in"],
    pre: Float[Tensor, "batch d_sae"],
    norms: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    is_dead: Bool[Tensor, " d_sae"],
    auxk: AuxK,
) -> Float[Tensor, ""]:
    """Squared error of the residual as the dead latents reconstruct it, over its variance.

    The dead with the k_aux largest weighted codes of a token take part; the decoder bias does
    not, since it is in the residual already. Source: Gao et al. 2024, appendix A.2.
    """
    dead = is_dead.nonzero().squeeze(-1)
    if len(dead) == 0:
        return residual.new_zeros(())
    residual = residual.detach()
    codes = pre[:, dead].relu()
    k = min(auxk.k or residual.shape[-1] // 2, len(dead))
    if k < len(dead):
        top = (codes.detach() * norms.detach()[dead]).topk(k, dim=-1).indices
        codes = codes * torch.zeros_like(codes).scatter_(-1, top, 1.0)
    error = (residual - codes @ W_dec[dead]).pow(2).sum(dim=-1).mean()
    variance = (residual - residual.mean(dim=0)).pow(2).sum(dim=-1).mean()
    return auxk.weight * error / variance.clamp(min=1e-12)


class CrosscoderTraining(SiteViews, TrainingSAE[CrosscoderTrainingConfig]):
    """A crosscoder in training: selection over the batch, penalties, AuxK, running threshold.

    In `train()` mode `encode` selects over the batch as the loss does; in `eval()` mode it
    thresholds, so that the latents of a token do not depend on its neighbours.
    """

    cfg: CrosscoderTrainingConfig  # type: ignore[assignment]
    b_enc: nn.Parameter
    threshold: Tensor

    def initialize_weights(self) -> None:
        """One draw for all sites of a width; the encoder is the decoder transposed.

        Source: Minder et al. 2025 (crosscoder training, initialisation).
        """
        norm = self.cfg.decoder_init_norm
        norm = self.cfg.sparsity.decoder_init_norm if norm is None else norm
        draws: dict[int, Tensor] = {}
        for width in (s.d_model for s in self.cfg.sites):
            if width not in draws:
                rows = torch.randn(self.cfg.d_sae, width, dtype=self.dtype, device=self.device)
                draws[width] = norm * rows / rows.norm(dim=-1, keepdim=True)
        decoder = torch.cat([draws[s.d_model] for s in self.cfg.sites], dim=-1)
        zeros = {"dtype": self.dtype, "device": self.device}
        self.W_dec = nn.Parameter(decoder)
        self.W_enc = nn.Parameter(decoder.T.clone())
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, **zeros))
        self.b_dec = nn.Parameter(torch.zeros(self.cfg.d_in, **zeros))
        self.register_buffer("threshold", torch.zeros(self.cfg.d_sae, **zeros))

    @torch.no_grad()
    def initialize_b_dec_(self, activations: Tensor) -> None:
        """Set the decoder bias to the geometric median of a first batch, site by site."""
        medians = [geometric_median(x) for x in split_sites(self.flatten(activations), self.sites)]
        self.b_dec.copy_(torch.cat(medians))

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """Weights of the penalties, with their warm-up, as SAELens schedules them."""
        return dict(self.cfg.sparsity.coefficients())

    def encode_with_hidden_pre(
        self, x: Tensor
    ) -> tuple[Float[Tensor, "... d_sae"], Float[Tensor, "... d_sae"]]:
        """Codes and pre-activations; see the class for what `train()` and `eval()` change."""
        sae_in = self.process_sae_in(self.flatten(x))
        pre = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
        norms = self.get_W_dec_norm()
        if self.training:
            flat = pre.reshape(-1, pre.shape[-1])
            codes = self.cfg.sparsity.codes(flat, norms).view_as(pre)
        else:
            codes = pre.relu() * (pre * norms > self.threshold)
        return self.hook_sae_acts_post(codes), pre

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The loss of one batch, with its parts; updates the running threshold."""
        x = self.flatten(step_input.sae_in).flatten(0, -2)
        codes, pre = self.encode_with_hidden_pre(x)
        out = self.decode(codes)
        errors = x - out
        losses = {
            "reconstruction": reconstruction_loss(
                errors, self.sites, reduction=self.cfg.reconstruction
            )
        }
        norms = self.get_W_dec_norm()
        for name, penalty in self.cfg.sparsity.penalties(codes, norms).items():
            losses[name] = step_input.coefficients[name] * penalty
        losses |= self.calculate_aux_loss(step_input, codes, pre, out)
        if isinstance(self.cfg.sparsity, BatchTopK):
            self._update_threshold_(codes, norms)
        return TrainStepOutput(
            sae_in=x,
            sae_out=out,
            feature_acts=codes,
            hidden_pre=pre,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
        )

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """AuxK where the sparsity selects and latents are dead; nothing otherwise."""
        del feature_acts
        is_dead, auxk = step_input.dead_neuron_mask, self.cfg.auxk
        if auxk is None or is_dead is None or not isinstance(self.cfg.sparsity, BatchTopK):
            return {}
        x = self.flatten(step_input.sae_in).flatten(0, -2)
        loss = auxk_loss(
            residual=x - sae_out,
            pre=hidden_pre,
            norms=self.get_W_dec_norm(),
            W_dec=self.W_dec,
            is_dead=is_dead,
            auxk=auxk,
        )
        return {"auxk": loss}

    @torch.no_grad()
    def _update_threshold_(self, codes: Tensor, norms: Tensor) -> None:
        """Running mean of the smallest kept f_j n_j, from its first observation on."""
        smallest = smallest_kept(codes.detach(), norms.detach())
        momentum = cast("BatchTopK", self.cfg.sparsity).threshold_momentum
        started = self.threshold.any()
        updated = torch.where(started, torch.lerp(smallest, self.threshold, momentum), smallest)
        # No branch on values: that would wait for the GPU at every step.
        self.threshold.copy_(torch.where(smallest.isfinite(), updated, self.threshold))

    @torch.no_grad()
    def calibrate_threshold_(self, batches: Iterable[Tensor]) -> None:
        """Set the threshold so that these held-out batches keep k latents a token.

        Does nothing for L1, whose codes are all the positive ones.
        """
        if not isinstance(self.cfg.sparsity, BatchTopK):
            return
        norms = self.get_W_dec_norm()
        flat = (self.process_sae_in(self.flatten(x)) for x in batches)
        weighted = ((x @ self.W_enc + self.b_enc).relu() * norms for x in flat)
        self.threshold.fill_(calibrate_threshold(weighted, k=self.cfg.sparsity.k))

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

    @torch.no_grad()
    def to_inference(self) -> Crosscoder:
        """The dictionary as it is now, in float32 (bf16 would round thresholds).

        It lives in the space of training: `fold_site_scales_` takes it to raw activations.
        """
        state = self.state_dict()
        self.process_state_dict_for_saving_inference(state)
        fields = self.cfg.get_inference_sae_cfg_dict() | {"dtype": "float32"}
        crosscoder = Crosscoder(CrosscoderConfig.from_dict(fields))
        crosscoder.load_state_dict({n: t.detach().float() for n, t in state.items()})
        return crosscoder


if ARCHITECTURE not in SAE_TRAINING_CLASS_REGISTRY:
    register_sae_training_class(ARCHITECTURE, CrosscoderTraining, CrosscoderTrainingConfig)
else:  # a notebook that reloads this module
    SAE_TRAINING_CLASS_REGISTRY[ARCHITECTURE] = (CrosscoderTraining, CrosscoderTrainingConfig)
