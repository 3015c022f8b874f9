"""One model of a pair as a TransformerLens model, with the other models' streams beside it.

Contract: the hook point `hook_side` carries `[batch, pos, d_model]` of one site; an edit there
changes the logits, which are those of that site's model. `streams` are those of all sites in the
forward pass that ran last, before any edit: a crosscoder needs them to encode one side. For
SAELens's evaluator, see `analysis.saelens_evals`. Limit: no weights of its own; every forward pass
runs all models to their hooks.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.compared_models import ComparedModels
from tl_crosscoder.pair_view import HookedView


class SideView(HookedView):
    """The stream of one site at `hook_side`; that site's model goes on from it.

    Raises ValueError for an unknown site.
    """

    HOOK_NAME = "hook_side"

    def __init__(self, pair: ComparedModels, site: str):
        position = pair.site_index(site)
        own = pair.sites[position]
        super().__init__(pair, model_name=own.label, d_model=own.d_model)
        self.position, self.site = position, own
        self.streams: tuple[Float[Tensor, "batch pos _"], ...] = ()
        """Of all sites, in the forward pass that ran last; none before the first."""

    def stream(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The site's stream; those of all sites are kept."""
        self.streams = tuple(self.pair.site_activations(tokens, range(self.pair.n_sites)))
        return self.streams[self.position]

    def continued(
        self, tokens: Int[Tensor, "batch pos"], stream: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of the site's model."""
        return self.pair.run_with_patch(tokens, stream, site=self.site.name)

    def is_last_stream(self, x: Float[Tensor, "batch pos _"]) -> bool:
        """Whether this is the site's stream of the forward pass that ran last, bit for bit."""
        return bool(self.streams) and torch.equal(self.streams[self.position].to(x), x)
