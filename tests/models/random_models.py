"""Random pairs and dictionaries of a fixed seed."""

from collections.abc import Sequence
from pathlib import Path

import torch
from models.tiny_pairs import HOOK, hooked_transformer, save_tokenizer
from transformers import AutoTokenizer

from tl_crosscoder import Crosscoder, ModelPair, Site
from tl_crosscoder.crosscoder.config import CrosscoderConfig


def hooked_pair(folder: Path, names: tuple[str, str]) -> ModelPair:
    """Two `HookedTransformer`s, whose tokenizer is saved into a folder."""
    save_tokenizer(folder, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    both = (hooked_transformer(tokenizer, seed) for seed in (1, 2))
    return ModelPair(*both, hook_name=HOOK, model_names=names)


def random_crosscoder(
    sites: Sequence[Site], d_sae: int, *, scale: float = 1.0, **changes
) -> Crosscoder:
    """Weights of a standard deviation, thresholds above 0, so that a share of latents is active."""
    d_in = sum(site.d_model for site in sites)
    made = Crosscoder(CrosscoderConfig(d_in=d_in, d_sae=d_sae, sites=tuple(sites), **changes))
    generator = torch.Generator().manual_seed(0)
    weights = {
        n: scale * torch.randn(t.shape, generator=generator) for n, t in made.state_dict().items()
    }
    made.load_state_dict(weights | {"threshold": weights["threshold"].abs()})
    return made
