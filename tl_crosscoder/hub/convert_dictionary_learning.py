"""`CrossCoder` and `BatchTopKCrossCoder` of dictionary_learning (Minder et al. 2025).

Contract: their inputs are (x - mean) s, their outputs x / (s + 1e-8) + mean where a mean is stored,
and f_j n_j > theta is our pre_j > theta / n_j, with n_j by `code_normalization`. Limit: one
threshold for all latents, which a BatchTopK file must hold.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.hub.convert_files import ForeignFiles
from tl_crosscoder.hub.convert_foreign import Foreign, check_tensors, unrepresentable

NORMALISATION = ("activation_mean", "activation_std", "activation_global_scale", "target_rms")
# Names of their enum in the order of its values, which start at 1.
CODE_NORMALIZATIONS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")
HUB_FIELDS = {
    "activation_dim", "dict_size", "num_layers", "same_init_for_all_layers", "norm_init_scale",
    "init_with_transpose", "encoder_layers", "latent_processor", "num_decoder_layers", "k",
    "code_normalization", "code_normalization_alpha_sae", "code_normalization_alpha_cc",
    "activation_mean", "activation_std", "target_rms", "dict_class",
}  # fmt: skip
"""Of the config that dictionary_learning writes for the hub: arguments of its constructor."""


def read_dictionary_learning(files: ForeignFiles) -> Foreign:
    """Read either class, from the hub's layout or from a trainer's folder.

    Raises ValueError for what our forward pass cannot do.
    """
    tensors = dict(files.tensors)
    config = files.config.get("trainer", files.config)
    _check_dictionary_learning(files, config)
    weight, W_dec = tensors["encoder.weight"].double(), tensors["decoder.weight"].double()
    if weight.ndim != 3 or W_dec.ndim != 3:
        raise ValueError(
            f"{files.path} holds encoder.weight of shape {list(weight.shape)}, which is not of "
            "several layers: this is no crosscoder. Load an SAE with sae_lens."
        )
    n_sites, d_sae, d_model = W_dec.shape
    layers = config.get("encoder_layers") or range(len(weight))
    W_enc = torch.zeros(n_sites, d_model, d_sae, dtype=torch.float64)
    if len(weight) != len(layers) or max(layers) >= n_sites:
        raise ValueError(
            f"{files.path} encodes the layers {list(layers)} with {len(weight)} matrices and "
            f"decodes {n_sites}: a crosscoder decodes the sites that it may encode."
        )
    W_enc[list(layers)] = weight
    scale, mean = _normalisation(tensors, n_sites, d_model)
    raw = W_enc * scale[:, None, None]
    kind = _code_normalization(files, config)
    return Foreign(
        library="dictionary_learning",
        W_enc=raw,
        W_dec=W_dec / _divisor(scale)[:, None, None],
        b_enc=tensors["encoder.bias"].double() - torch.einsum("md,mdf->f", mean, raw),
        b_dec=tensors["decoder.bias"].double() / _divisor(scale)[:, None] + mean,
        threshold=_batchtopk_threshold(files, _code_norms(W_dec, kind, config)),
        scales=tuple(scale.tolist()),
        facts={
            "class": config.get("dict_class") or _class_by_tensors(tensors),
            "k": int(tensors["k"]) if "k" in tensors else None,
            "code_normalization": kind,
        },
    )


def _class_by_tensors(tensors: Mapping[str, Tensor]) -> str:
    return "BatchTopKCrossCoder" if "threshold" in tensors else "CrossCoder"


def _check_dictionary_learning(files: ForeignFiles, config: Mapping[str, Any]) -> None:
    needed = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
    optional = {"k", "threshold", "code_normalization_id", *NORMALISATION}
    check_tensors(files, needed, optional=optional)
    known = ("CrossCoder", "BatchTopKCrossCoder")
    if config.get("dict_class") not in (None, *known):
        raise unrepresentable(files, f"dict_class {config['dict_class']!r}", f"one of {known}")
    if config.get("latent_processor"):
        raise unrepresentable(files, f"latent_processor {config['latent_processor']!r}", "none")
    # Another constructor means another forward pass; the trainer's record holds much besides.
    more = set(config) - HUB_FIELDS if config is files.config else set()
    if more:
        raise unrepresentable(files, f"the fields {sorted(more)}", f"only {sorted(HUB_FIELDS)}")
    if config.get("dict_class") == known[1] and "threshold" not in files.tensors:
        raise _no_threshold(files, "there is none in the file")


def _code_normalization(files: ForeignFiles, config: Mapping[str, Any]) -> str:
    """CROSSCODER where nothing is said: so their loader takes files older than the choice."""
    said = config.get("code_normalization")
    number = files.tensors.get("code_normalization_id")
    stored = None if number is None else CODE_NORMALIZATIONS[int(number) - 1]
    kind = str(said or stored or CODE_NORMALIZATIONS[0]).upper()
    if stored not in (None, kind):
        raise ValueError(
            f"{files.path} says code_normalization {kind} in its config and {stored} in its "
            "tensors: correct the config."
        )
    if kind not in CODE_NORMALIZATIONS[:-1]:
        raise unrepresentable(
            files,
            f"code_normalization {kind} (DECOUPLED gives each layer codes of its own)",
            f"one of {CODE_NORMALIZATIONS[:-1]}",
        )
    return kind


def _code_norms(
    W_dec: Float[Tensor, "n_sites d_sae d_model"], kind: str, config: Mapping[str, Any]
) -> Float[Tensor, " d_sae"]:
    """n_j in the space of training."""
    summed, joint = W_dec.norm(dim=-1).sum(dim=0), W_dec.norm(dim=(0, 2))
    if kind == "MIXED":
        alpha_joint = config.get("code_normalization_alpha_sae", 1.0)
        return alpha_joint * joint + config.get("code_normalization_alpha_cc", 0.1) * summed
    return {"CROSSCODER": summed, "SAE": joint, "NONE": torch.ones_like(summed)}[kind]


def _normalisation(
    tensors: Mapping[str, Tensor], n_sites: int, d_model: int
) -> tuple[Float[Tensor, " n_sites"], Float[Tensor, "n_sites d_model"]]:
    """(scale, mean) of each site; 1 and 0 where the stored mean is NaN, or the file is older."""
    none = torch.ones(n_sites).double(), torch.zeros(n_sites, d_model).double()
    stored = [n for n in NORMALISATION[:3] if n in tensors]
    if not stored or tensors.get("activation_mean", torch.tensor(torch.nan)).isnan().any():
        return none
    if len(stored) < 3:
        raise ValueError(
            f"the weights hold {stored} of {NORMALISATION[:3]}: without all three the scale of the "
            "input is unknown. Save the file again with the library that made it."
        )
    return tensors["activation_global_scale"].double(), tensors["activation_mean"].double()


def _divisor(scale: Float[Tensor, " n_sites"]) -> Float[Tensor, " n_sites"]:
    """They add 1e-8 where they undo the scale, and do nothing where there is none."""
    return torch.where(scale == 1, scale, scale + 1e-8)


def _batchtopk_threshold(
    files: ForeignFiles, norms: Float[Tensor, " d_sae"]
) -> Float[Tensor, " d_sae"]:
    threshold = files.tensors.get("threshold")
    if threshold is None:
        return torch.zeros_like(norms)
    if threshold.numel() != 1 or not float(threshold) >= 0:
        raise _no_threshold(files, f"the stored one is {threshold.tolist()}")
    # A latent with no decoder is never active: its scaled code is 0.
    most = torch.finfo(torch.float32).max
    return torch.where(norms > 0, threshold.double() / norms, most).clamp(max=most)


def _no_threshold(files: ForeignFiles, what: str) -> ValueError:
    return ValueError(
        f"{files.path} is a BatchTopK crosscoder without one threshold of 0 or more for "
        f"inference ({what}), so that a token's latents would depend on its batch. Train it on "
        "until the threshold is set, or measure one and store it as `threshold`."
    )
