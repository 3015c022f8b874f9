"""Codes of a text as delphi caches them, for its explainers and scorers.

    latents/HOOK/0_204.safetensors ... config.json        tokenizer/

Files are what `LatentDataset("OUTPUT/latents", sampler_cfg, constructor_cfg)` of eai-delphi 0.1.3
reads (`delphi/latents/loader.py`, written there by `LatentCache.save_splits` and `save_config`):
`locations [n, 3]` (context, position, latent from the first of the file), `activations [n]`,
`tokens [contexts, pos]`. Codes are float32, where delphi's own are rounded to float16. Source:
Paulo et al. 2024 (arXiv 2410.13928). Limits: the context size has to be a multiple of its
`example_ctx_len` (32); it leaves out latents with fewer than its `min_examples` contexts (200).
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tl_crosscoder import files
from tl_crosscoder.analysis.firing import ActiveTokens
from tl_crosscoder.data.tokens import TokenizedText

N_SPLITS = 5
"""Files with about as many latents each, as delphi's own."""


def write_delphi(
    folder: Path,
    active: ActiveTokens,
    text: TokenizedText,
    *,
    hookpoint: str,
    tokenizer: Any,
    tokenizer_name: str,
    dataset: str = "",
) -> Path:
    """Write the cache of one dictionary, and the tokenizer that its tokens are of.

    Args:
        folder: to write into.
        active: all active tokens of the text.
        text: the same text.
        hookpoint: what delphi calls the dictionary.
        tokenizer: of the models; saved beside the cache.
        tokenizer_name: what delphi loads where it is given no tokenizer: a name on the hub, or the
            folder `tokenizer` where it will be.
        dataset: what the text is, for the record.
    """
    own, n_splits = folder / "latents" / hookpoint, min(N_SPLITS, active.d_sae)
    bounds = torch.linspace(0, active.d_sae, n_splits + 1).long().tolist()
    tokens, size = text.tokens.long(), text.context_size
    contexts, positions = active.positions // size, active.positions % size
    for first, end in pairwise(bounds):
        chosen = (active.latents >= first) & (active.latents < end)
        places = contexts[chosen], positions[chosen], active.latents[chosen] - first
        locations = torch.stack(places, dim=1)
        # Its loader takes both; as in delphi, the smaller where numbers allow.
        is_small = locations.numel() == 0 or int(locations.max()) < 2**16
        tensors = {
            "locations": locations.to(torch.uint16 if is_small else torch.uint32),
            "activations": active.values[chosen],
            "tokens": tokens,
        }
        files.write_tensors(own / f"{first}_{end - 1}.safetensors", tensors)
    # Fields of its `CacheConfig`, and the tokenizer's name.
    config = {
        "dataset_repo": dataset,
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "",
        "batch_size": 1,
        "cache_ctx_len": size,
        "n_tokens": tokens.numel(),
        "n_splits": n_splits,
        "model_name": tokenizer_name,
    }
    files.write_json(own / "config.json", config)
    tokenizer.save_pretrained(folder / "tokenizer")
    return own
