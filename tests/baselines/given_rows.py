"""A source of activations of which every number is chosen."""

import torch
from torch import Tensor

from tl_crosscoder.models.site import Site
from tl_crosscoder.models.source import Contexts


class GivenRows:
    """Two sites, from activations `[contexts, pos, 2, d_model]`."""

    tokenizer, weight_processing, cache_id = None, "raw", None
    device, n_sites = torch.device("cpu"), 2

    def __init__(self, x: Tensor):
        self.x, self.d_model, self.n_ctx = x, x.shape[-1], x.shape[1]
        self.sites = tuple(
            Site(name=name, d_model=self.d_model, hook_name="h", model_name=f"the {name}")
            for name in ("base", "finetuned")
        )

    def rows(self, contexts: Contexts, *, dtype: torch.dtype = torch.float32) -> Tensor:
        own = self.x[contexts.context_ids, : contexts.tokens.shape[1]]
        return own[contexts.mask].to(dtype)
