"""`ModelHookpointAcausalCrosscoder` of crosscode (formerly model-diffing), relu or jumprelu.

Contract: sites are every hook point of the first model, then of the second, and so on; scales that
were folded in (`is_folded`) are read as those of the sites. Limit: a selection over a token or a
batch has no threshold and is refused.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.hub.convert_files import ForeignFiles
from tl_crosscoder.hub.convert_foreign import Foreign, check_tensors, unrepresentable

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
