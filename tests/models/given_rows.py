"""A source of activations of which every number is chosen."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tl_crosscoder.models.site import Site
from tl_crosscoder.models.source import ActivationSource, Contexts


class GivenRows(ActivationSource):
    """Up to three sites, from activations `[contexts, pos, n_sites, d_model]`."""

    tokenizer, weight_processing = None, "raw"
    device, n_ctx = torch.device("cpu"), 16

    def __init__(self, x: Tensor):
        self.x = x
        self.model_sites = tuple(
            Site(name=name, d_model=x.shape[-1], hook_name="h", model_name=f"the {name}")
            for name in ("base", "finetuned", "third")[: x.shape[2]]
        )
        self._compare(None)

    def site_rows(
        self, contexts: Contexts, sites: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        own = self.x[contexts.context_ids, : contexts.tokens.shape[1]][contexts.mask].to(dtype)
        return [own[:, i] for i in sites]
