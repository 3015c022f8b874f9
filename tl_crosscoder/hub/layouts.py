"""Layouts of other libraries' crosscoders: their tensors and config as weights for raw activations.

Each reader gives `Foreign`, normalisation folded in, codes at the library's own scale, and refuses
by name what cannot be represented. Limit: sites of one width.

- ckkissane (crosscoder-model-diff-replication): W_enc [n_models, d, F], W_dec [F, n_models, d];
  relu; no bias is subtracted from the input; scales of the training are not in the file.
- crosscode (formerly model-diffing), `ModelHookpointAcausalCrosscoder`: relu or jumprelu; sites are
  every hook point of the first model, then of the second; folded scales are those of the sites.
- dictionary_learning (Minder et al. 2025): inputs are (x - mean) s, outputs x / (s + 1e-8) + mean
  where a mean is stored, and f_j n_j > theta is our pre_j > theta / n_j, one theta for all latents.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class ForeignFiles:
    """Files of another library's dictionary, as they are."""

    name: str
    """What to call it elsewhere: the name on the hub, or that of the local folder or file."""
    path: Path
    """Path of the weights."""
    tensors: dict[str, Tensor]
    """Float tensors in float64."""
    config: dict[str, Any]
    """Content of the config beside them; empty where there is none."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Foreign:
    """Weights for raw activations, float64, and what the files record besides."""

    library: str
    W_enc: Float[Tensor, "n_sites d_model d_sae"]
    W_dec: Float[Tensor, "n_sites d_sae d_model"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, "n_sites d_model"]
    threshold: Float[Tensor, " d_sae"]
    scales: tuple[float, ...]
    """Factors of each site's activations in training; folded in already."""
    names: dict[str, str] = field(default_factory=dict)
    """`base` and `hook_name`, where the files have them."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Plain values to be recorded."""


def _check_tensors(files: ForeignFiles, needed: set[str], *, optional: set[str]) -> None:
    """Refuse a file with a tensor too few, or with others: they are of another forward pass."""
    missing = sorted(needed - set(files.tensors))
    if missing:
        raise ValueError(
            f"{files.path} lacks the tensors {missing}: the file is not whole, or of another "
            "variant of the layout. Save model.state_dict() again."
        )
    whole = {"k", "code_normalization_id", "is_folded", "target_rms"}
    if odd := [n for n, t in files.tensors.items() if n not in whole and not t.is_floating_point()]:
        kinds = {name: str(files.tensors[name].dtype) for name in odd}
        raise ValueError(
            f"{files.path} holds {kinds}: weights must be floating-point numbers. It is damaged, "
            "or of something else. Save model.state_dict() again."
        )
    more = sorted(set(files.tensors) - needed - optional)
    if more:
        raise _unrepresentable(files, f"the tensors {more}", f"only {sorted(needed | optional)}")


def _unrepresentable(files: ForeignFiles, what: str, known: str) -> ValueError:
    """An error that names what is in the files, and what is understood instead."""
    return ValueError(
        f"{files.path} has {what}, which a crosscoder here cannot represent or which is another "
        f"variant of the layout; it takes {known}. Export it again without that, or build the "
        "weights yourself with Crosscoder(CrosscoderConfig(...)).load_state_dict(...)."
    )


_VARIANTS = (
    "activation",
    "activation_fn",
    "k",
    "topk",
    "top_k",
    "pre_bias",
    "apply_b_dec_to_input",
)
"""Fields of forks of the ckkissane layout whose forward pass is another one."""


def _read_ckkissane(files: ForeignFiles) -> Foreign:
    """Raises ValueError for forks whose forward pass is another one."""
    _check_tensors(files, {"W_enc", "W_dec", "b_enc", "b_dec"}, optional=set())
    tensors, config = files.tensors, files.config
    found = {n: config[n] for n in _VARIANTS if config.get(n) not in (None, False, "relu")}
    if found:
        known = "relu of all sites, and no input bias"
        raise _unrepresentable(files, f"{found} in its config", known)
    W_enc, W_dec = tensors["W_enc"], tensors["W_dec"]
    if W_enc.ndim != 3 or W_dec.shape != (W_enc.shape[2], *W_enc.shape[:2]):
        raise _unrepresentable(
            files,
            f"W_enc of shape {list(W_enc.shape)} with W_dec of {list(W_dec.shape)}",
            "[n_models, d_in, dict_size] with [dict_size, n_models, d_in]",
        )
    named = {"base": config.get("model_name"), "hook_name": config.get("hook_point")}
    return Foreign(
        library="ckkissane",
        W_enc=W_enc,
        W_dec=rearrange(W_dec, "d_sae n_sites d_model -> n_sites d_sae d_model"),
        b_enc=tensors["b_enc"],
        b_dec=tensors["b_dec"],
        threshold=torch.zeros_like(tensors["b_enc"]),
        scales=(1.0,) * len(W_enc),
        names={k: str(v) for k, v in named.items() if v},
    )


_FOLDED = ("folded_scaling_factors_in_Xi", "folded_scaling_factors_out_Xo")


def _read_crosscode(files: ForeignFiles) -> Foreign:
    """Raises ValueError for other activations and for transcoders."""
    optional = {"b_enc_L", "_b_dec_XoDo", "_activation_fn.log_threshold_L", "is_folded", *_FOLDED}
    _check_tensors(files, {"_W_enc_XiDiL", "_W_dec_LXoDo"}, optional=optional)
    tensors = files.tensors
    W_enc, W_dec = tensors["_W_enc_XiDiL"], tensors["_W_dec_LXoDo"]
    *sites, d_model, d_sae = W_enc.shape
    if W_dec.shape != (d_sae, *sites, d_model):
        raise _unrepresentable(
            files,
            f"an encoder of sites {list(sites)} x {d_model} with a decoder of "
            f"{list(W_dec.shape[1:])} (a transcoder)",
            "a decoder of the same sites",
        )
    n_sites, scales = math.prod(sites), torch.ones(math.prod(sites))
    is_folded = "is_folded" in tensors and bool(tensors["is_folded"])
    if is_folded:
        scales, written = (tensors[name].flatten() for name in _FOLDED)
        if len(scales) != n_sites or not torch.equal(scales, written):
            what = "folded scales that differ between input and output"
            raise _unrepresentable(files, what, "one a site")
    return Foreign(
        library="crosscode",
        W_enc=rearrange(W_enc, "... d_model d_sae -> (...) d_model d_sae"),
        W_dec=rearrange(W_dec, "d_sae ... d_model -> (...) d_sae d_model"),
        b_enc=tensors.get("b_enc_L", torch.zeros(d_sae)),
        b_dec=tensors.get("_b_dec_XoDo", torch.zeros(n_sites, d_model)).reshape(n_sites, d_model),
        threshold=_crosscode_threshold(files, d_sae),
        scales=tuple(scales.tolist()),
        facts={"dimensions": list(sites), "is_folded": is_folded},
    )


def _crosscode_threshold(files: ForeignFiles, d_sae: int) -> Float[Tensor, " d_sae"]:
    named = (files.config.get("activation_fn") or {}).get("classname")
    log_threshold = files.tensors.get("_activation_fn.log_threshold_L")
    if named == "ReLUActivation" and log_threshold is None:
        return torch.zeros(d_sae)
    if named == "AnthropicSTEJumpReLUActivation" and log_threshold is not None:
        return log_threshold.exp()
    raise _unrepresentable(
        files,
        f"activation_fn {named!r} (one that selects over a token or a batch has no threshold)",
        "ReLUActivation, or AnthropicSTEJumpReLUActivation with its thresholds, named in "
        "model_cfg.yaml beside the weights",
    )


_NORMALISATION = ("activation_mean", "activation_std", "activation_global_scale")
# Names of their enum in the order of its values, which start at 1.
_CODE_NORMALIZATIONS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")
_CLASSES = ("CrossCoder", "BatchTopKCrossCoder")
_HUB_FIELDS = {
    "activation_dim", "dict_size", "num_layers", "same_init_for_all_layers", "norm_init_scale",
    "init_with_transpose", "encoder_layers", "latent_processor", "num_decoder_layers", "k",
    "code_normalization", "code_normalization_alpha_sae", "code_normalization_alpha_cc",
    "activation_mean", "activation_std", "target_rms", "dict_class",
}  # fmt: skip
"""Fields that dictionary_learning writes for the hub: arguments of its constructor."""


def _read_dictionary_learning(files: ForeignFiles) -> Foreign:
    """Either class, from the hub's layout or from a trainer's folder.

    Raises ValueError for what our forward pass cannot do.
    """
    tensors, config = files.tensors, files.config.get("trainer", files.config)
    _check_dictionary_learning(files, config)
    weight, W_dec = tensors["encoder.weight"], tensors["decoder.weight"]
    n_sites, d_sae, d_model = W_dec.shape
    layers = [*(config.get("encoder_layers") or range(len(weight)))]
    if len(weight) != len(layers) or max(layers) >= n_sites:
        raise ValueError(
            f"{files.path} encodes the layers {layers} with {len(weight)} matrices and decodes "
            f"{n_sites}: a crosscoder decodes the sites that it may encode."
        )
    scale, mean = _normalisation(tensors, n_sites, d_model)
    W_enc = torch.zeros(n_sites, d_model, d_sae, dtype=torch.float64)
    W_enc[layers] = weight
    W_enc *= scale[:, None, None]
    # They add 1e-8 where they undo the scale, and do nothing where there is none.
    undone = torch.where(scale == 1, scale, scale + 1e-8)[:, None]
    kind = _code_normalization(files, config)
    by_tensors = _CLASSES["threshold" in tensors]
    return Foreign(
        library="dictionary_learning",
        W_enc=W_enc,
        W_dec=W_dec / undone[:, None],
        b_enc=tensors["encoder.bias"] - einsum(mean, W_enc, "site d, site d d_sae -> d_sae"),
        b_dec=tensors["decoder.bias"] / undone + mean,
        threshold=_batchtopk_threshold(files, config, _code_norms(W_dec, kind, config)),
        scales=tuple(scale.tolist()),
        facts={
            "class": config.get("dict_class") or by_tensors,
            "k": int(tensors["k"]) if "k" in tensors else None,
            "code_normalization": kind,
        },
    )


def _check_dictionary_learning(files: ForeignFiles, config: Mapping[str, Any]) -> None:
    needed = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
    optional = {"k", "threshold", "code_normalization_id", "target_rms", *_NORMALISATION}
    _check_tensors(files, needed, optional=optional)
    if config.get("dict_class") not in (None, *_CLASSES):
        raise _unrepresentable(files, f"dict_class {config['dict_class']!r}", f"one of {_CLASSES}")
    if config.get("latent_processor"):
        raise _unrepresentable(files, f"latent_processor {config['latent_processor']!r}", "none")
    # Another constructor means another forward pass; the trainer's record holds much besides.
    more = set(config) - _HUB_FIELDS if config is files.config else set()
    if more:
        raise _unrepresentable(files, f"the fields {sorted(more)}", f"only {sorted(_HUB_FIELDS)}")
    weight = files.tensors["encoder.weight"]
    if weight.ndim != 3 or files.tensors["decoder.weight"].ndim != 3:
        raise ValueError(
            f"{files.path} holds encoder.weight of shape {list(weight.shape)}, which is not of "
            "several layers: this is not a crosscoder. Load an SAE with sae_lens."
        )


def _code_normalization(files: ForeignFiles, config: Mapping[str, Any]) -> str:
    """The kind, by default CROSSCODER: so their loader takes files older than the choice."""
    number = files.tensors.get("code_normalization_id")
    stored = None if number is None else _CODE_NORMALIZATIONS[int(number) - 1]
    kind = str(config.get("code_normalization") or stored or _CODE_NORMALIZATIONS[0]).upper()
    if stored not in (None, kind):
        raise ValueError(
            f"{files.path} has code_normalization {kind} in its config and {stored} in its "
            "tensors: correct the config."
        )
    if kind not in _CODE_NORMALIZATIONS[:-1]:
        raise _unrepresentable(
            files,
            f"code_normalization {kind} (DECOUPLED gives each layer codes of its own)",
            f"one of {_CODE_NORMALIZATIONS[:-1]}",
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
    stored = [n for n in _NORMALISATION if n in tensors]
    if not stored or tensors.get("activation_mean", torch.tensor(torch.nan)).isnan().any():
        return torch.ones(n_sites).double(), torch.zeros(n_sites, d_model).double()
    if len(stored) < 3:
        raise ValueError(
            f"the weights hold {stored} of {_NORMALISATION}: without all three the scale of the "
            "input is unknown. Save the file again with the library that made it."
        )
    return tensors["activation_global_scale"], tensors["activation_mean"]


def _batchtopk_threshold(
    files: ForeignFiles, config: Mapping[str, Any], norms: Float[Tensor, " d_sae"]
) -> Float[Tensor, " d_sae"]:
    threshold = files.tensors.get("threshold")
    if threshold is None and config.get("dict_class") != "BatchTopKCrossCoder":
        return torch.zeros_like(norms)
    if threshold is None or threshold.numel() != 1 or not float(threshold) >= 0:
        found = "there is none" if threshold is None else f"the stored one is {threshold.tolist()}"
        raise ValueError(
            f"{files.path} is a BatchTopK crosscoder without one threshold of 0 or more for "
            f"inference ({found} in the file), so that a token's latents would depend on its "
            "batch. Train it on until the threshold is set, or measure one and store it as "
            "`threshold`."
        )
    # A latent with no decoder is never active: its scaled code is 0.
    most = torch.finfo(torch.float32).max
    return torch.where(norms > 0, threshold / norms, most).clamp(max=most)


LAYOUTS: dict[str, tuple[set[str], Callable[[ForeignFiles], Foreign]]] = {
    "dictionary_learning": ({"encoder.weight", "decoder.weight"}, _read_dictionary_learning),
    "ckkissane": ({"W_enc", "W_dec"}, _read_ckkissane),
    "crosscode": ({"_W_enc_XiDiL", "_W_dec_LXoDo"}, _read_crosscode),
}
"""Tensors that tell a layout, and its reader."""
