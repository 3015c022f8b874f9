"""A frozen SAE of the base model, read on both models: which of its latents the fine-tune moves.

    movement of latent j = mean over tokens of |f_j(x^1) - f_j(x^0)| ||d_j||

Contract: any SAE that SAELens loads, of the base's hook; decoder rows by falling movement. No
training on the pair. Limit: what the base has no latent for is in none of them.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.data.harvest import harvest_rows
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.site import site_parts
from tl_crosscoder.models.source import ActivationSource


@torch.no_grad()
def sae_directions(
    source: ActivationSource, path: str | Path, text: TokenizedText, *, n: int, batch_size: int = 32
) -> Float[Tensor, "n d_model"]:
    """Decoder rows of the latents that the fine-tune moves most.

    Args:
        source: a pair, more sites, or a cache.
        path: folder of the SAE, as SAELens saves it.
        text: whose tokens that count are taken.
        n: how many rows.
        batch_size: contexts a forward pass.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: an SAE of another width, or no token that counts.
    """
    folder = files.user_path(path)
    if not (folder / files.CFG_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no SAE of SAELens's layout ({files.CFG_NAME}).")
    source = source.side_by_side()
    base, finetuned = source.check_one_width()
    sae = SAE.load_from_disk(folder, device=str(source.device))
    d_model = source.sites[base].d_model
    if sae.cfg.d_in != d_model:
        raise ValueError(
            f"the SAE in {folder} reads {sae.cfg.d_in} numbers, but the activation at "
            f"{source.sites[base].hook_name!r} is {d_model} wide. Give one of this hook."
        )
    moved = torch.zeros(sae.cfg.d_sae, dtype=torch.float64, device=source.device)
    for rows in harvest_rows(source, text, batch_size=batch_size):
        parts = site_parts(rows, source.sites)
        moved += (sae.encode(parts[finetuned]) - sae.encode(parts[base])).abs().double().sum(dim=0)
    movement = moved * sae.W_dec.double().norm(dim=1)
    order = movement.argsort(descending=True, stable=True)
    return sae.W_dec[order[movement[order] > 0][:n]].float().cpu()
