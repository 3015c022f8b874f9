"""Small dictionaries and activations with known features, for the tests of this folder."""

import torch
from torch import Tensor

from tl_crosscoder import BatchTopK, CrosscoderTraining, CrosscoderTrainingConfig, Site
from tl_crosscoder.crosscoder.sparsity import Sparsity

D_MODEL, D_SAE = 12, 32


def sites(*widths: int) -> tuple[Site, ...]:
    names = ("base", "finetuned", "third")
    return tuple(
        Site(name=n, d_model=w, hook_name="blocks.1.hook_resid_post", model_name=f"tiny-{n}")
        for n, w in zip(names, widths, strict=False)
    )


def new_training(
    *widths: int, sparsity: Sparsity | None = None, d_sae: int = D_SAE, seed: int = 0, **fields
) -> CrosscoderTraining:
    widths = widths or (D_MODEL, D_MODEL)
    cfg = CrosscoderTrainingConfig(
        d_in=sum(widths),
        d_sae=d_sae,
        sites=sites(*widths),
        sparsity=sparsity or BatchTopK(k=4),
        **fields,
    )
    torch.manual_seed(seed)
    return CrosscoderTraining(cfg)


def randomised(training: CrosscoderTraining, seed: int = 1) -> CrosscoderTraining:
    """Weights as after training: sites, rows and biases all different."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in training.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return training


def planted(n: int, *, seed: int = 0, d_model: int = D_MODEL) -> Tensor:
    """Activations `[n, 2, d_model]`: shared features plus one that only site 1 has."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(16, d_model, generator=torch.Generator().manual_seed(99))
    codes = torch.rand(n, 16, generator=generator) * (torch.rand(n, 16, generator=generator) < 0.2)
    base = codes.clone()
    base[:, 0] = 0
    return torch.stack([base @ directions, codes @ directions], dim=1) + 0.5
