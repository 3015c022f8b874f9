"""The layout of ckkissane's and Neel Nanda's crosscoder-model-diff-replication.

Contract: W_enc [n_models, d, F], W_dec [F, n_models, d]; relu; no bias is taken off the input.
Limit: their training scales activations by numbers that stay outside the file: see `convert`.
"""

import torch

from tl_crosscoder.hub.convert_files import ForeignFiles
from tl_crosscoder.hub.convert_foreign import Foreign, check_tensors, unrepresentable

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
