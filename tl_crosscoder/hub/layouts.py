"""The layout of ckkissane's and Neel Nanda's crosscoder-model-diff-replication.

Contract: W_enc [n_models, d, F], W_dec [F, n_models, d]; relu; no bias is taken off the input.
Limit: their training scales activations by numbers that stay outside the file: see `convert`.

`ModelHookpointAcausalCrosscoder` of crosscode (formerly model-diffing), relu or jumprelu.

Contract: sites are every hook point of the first model, then of the second, and so on; scales that
were folded in (`is_folded`) are read as those of the sites. Limit: a selection over a token or a
batch has no threshold and is refused.

`CrossCoder` and `BatchTopKCrossCoder` of dictionary_learning (Minder et al. 2025).

Contract: their inputs are (x - mean) s, their outputs x / (s + 1e-8) + mean where a mean is stored,
and f_j n_j > theta is our pre_j > theta / n_j, with n_j by `code_normalization`. Limit: one
threshold for all latents, which a BatchTopK file must hold.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.hub.foreign import Foreign, ForeignFiles, check_tensors, unrepresentable

VARIANTS = ("activation", "activation_fn", "k", "topk", "top_k", "pre_bias", "apply_b_dec_to_input")
"""Fields of forks of the ckkissane layout whose forward pass is another one."""


def read_ckkissane(files: ForeignFiles) -> Foreign:
    """Read it. Raises ValueError for forks whose forward pass is another one."""
    check_tensors(files, {"W_enc", "W_dec", "b_enc", "b_dec"}, optional=set())
    tensors, config = files.tensors, files.config
    set_ = [n for n in VARIANTS if config.get(n) not in (None, False, "relu")]
    if set_:
        said = {n: config[n] for n in set_}
        raise unrepresentable(
            files, f"{said} in its config", "relu of all sites, and no input bias"
        )
    W_enc, W_dec = tensors["W_enc"].double(), tensors["W_dec"].double()
    if W_enc.ndim != 3 or W_dec.shape != (W_enc.shape[2], *W_enc.shape[:2]):
        raise unrepresentable(
            files,
            f"W_enc of shape {list(W_enc.shape)} with W_dec of {list(W_dec.shape)}",
            "[n_models, d_in, dict_size] with [dict_size, n_models, d_in]",
        )
    named = {"base": config.get("model_name"), "hook_name": config.get("hook_point")}
    return Foreign(
        library="ckkissane",
        W_enc=W_enc,
        W_dec=W_dec.transpose(0, 1),
        b_enc=tensors["b_enc"].double(),
        b_dec=tensors["b_dec"].double(),
        threshold=torch.zeros(W_enc.shape[2]).double(),
        scales=(1.0,) * len(W_enc),
        names={k: str(v) for k, v in named.items() if v},
    )


SELECTIONS = ("TopkActivation", "BatchTopkActivation", "GroupMaxActivation")


def read_crosscode(files: ForeignFiles) -> Foreign:
    """Read it. Raises ValueError for other activations and for transcoders."""
    folded = {"is_folded", *(f"folded_scaling_factors_{n}" for n in ("in_Xi", "out_Xo"))}
    optional = {"b_enc_L", "_b_dec_XoDo", "_activation_fn.log_threshold_L", *folded}
    check_tensors(files, {"_W_enc_XiDiL", "_W_dec_LXoDo"}, optional=optional)
    tensors = files.tensors
    W_enc, W_dec = tensors["_W_enc_XiDiL"].double(), tensors["_W_dec_LXoDo"].double()
    *sites, d_model, d_sae = W_enc.shape
    if W_dec.shape != (d_sae, *sites, d_model):
        raise unrepresentable(
            files,
            f"an encoder of sites {list(sites)} x {d_model} with a decoder of "
            f"{list(W_dec.shape[1:])} (a transcoder)",
            "a decoder of the same sites",
        )
    is_folded = "is_folded" in tensors and bool(tensors["is_folded"])
    n_sites = math.prod(sites)
    scales = _folded_scales(files, n_sites) if is_folded else (1.0,) * n_sites
    b_dec = tensors.get("_b_dec_XoDo", torch.zeros(n_sites, d_model)).double()
    return Foreign(
        library="crosscode",
        W_enc=W_enc.reshape(n_sites, d_model, d_sae),
        W_dec=W_dec.reshape(d_sae, n_sites, d_model).transpose(0, 1),
        b_enc=tensors.get("b_enc_L", torch.zeros(d_sae)).double(),
        b_dec=b_dec.reshape(n_sites, d_model),
        threshold=_crosscode_threshold(files, d_sae),
        scales=scales,
        facts={"dimensions": list(sites), "is_folded": is_folded},
    )


def _folded_scales(files: ForeignFiles, n_sites: int) -> tuple[float, ...]:
    read, written = (
        files.tensors[f"folded_scaling_factors_{name}"].flatten() for name in ("in_Xi", "out_Xo")
    )
    if len(read) != n_sites or not torch.equal(read, written):
        raise unrepresentable(
            files, "folded scales that differ between input and output", "one a site"
        )
    return tuple(read.double().tolist())


def _crosscode_threshold(files: ForeignFiles, d_sae: int) -> Float[Tensor, " d_sae"]:
    named = (files.config.get("activation_fn") or {}).get("classname")
    log_threshold = files.tensors.get("_activation_fn.log_threshold_L")
    if named == "ReLUActivation" and log_threshold is None:
        return torch.zeros(d_sae).double()
    if named == "AnthropicSTEJumpReLUActivation" and log_threshold is not None:
        return log_threshold.double().exp()
    why = " (it selects over a token or a batch, with no threshold)" if named in SELECTIONS else ""
    raise unrepresentable(
        files,
        f"activation_fn {named!r}{why}",
        "ReLUActivation, or AnthropicSTEJumpReLUActivation with its thresholds, named in "
        "model_cfg.yaml beside the weights",
    )


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
