"""One model of a pair as SAELens takes it, with the other models' streams beside it.

Contract: a crosscoder needs the streams of all sites to encode one. `streams_with(x)` gives them
for a stream of the own site: of a `SideView`, a TransformerLens model of its own, those of its last
forward pass; of a `ModelSide`, the site's model as it stands, those of the pass that runs. For
SAELens's evaluator and `SideSAE`, see `analysis.saelens_evals`. Limit: no weights of their own;
every forward pass runs all models to their hooks.
"""

import weakref

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.compared_models import ComparedModels
from tl_crosscoder.hooked_model import stop_layer
from tl_crosscoder.pair_view import HookedView
from tl_crosscoder.running_ids import RunningIds


class SideView(HookedView):
    """The stream of one site at `hook_side`; that site's model goes on from it.

    Raises ValueError for an unknown site.
    """

    HOOK_NAME = "hook_side"

    def __init__(self, pair: ComparedModels, site: str):
        position = pair.site_index(site)
        own = pair.sites[position]
        super().__init__(pair, model_name=own.label, d_model=own.d_model)
        self.position, self.site, self.hook_name = position, own, self.HOOK_NAME
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

    def streams_with(
        self, x: Float[Tensor, "batch pos _"]
    ) -> tuple[Float[Tensor, "batch pos _"], ...]:
        """Those of the forward pass that ran last, before any edit.

        Raises ValueError unless `x` is the site's stream of that pass, bit for bit.
        """
        if not self.streams or not torch.equal(self.streams[self.position].to(x), x):
            raise ValueError(
                f"x of shape {list(x.shape)} is not the stream of site {self.site.name!r} in the "
                "last forward pass of its view, so the other sites' streams at these tokens are "
                "not known. Run the view on the tokens first, or give all sites to "
                "crosscoder.encode."
            )
        return self.streams


class ModelSide:
    """The model of a site, watched so that the other sites' streams of each pass can be known.

    Its ids are caught at the embedding, and the other models run on them when an SAE at the hook
    asks. The model itself is left as it is. It is watched for as long as this object lives.

    Raises:
        ValueError: an unknown site, a hook outside the blocks, or another site of the same model,
            which would run inside its own forward pass.
    """

    def __init__(self, pair: ComparedModels, site: str):
        self.pair, self.position = pair, pair.site_index(site)
        self.site = pair.sites[self.position]
        self.hook_name = self.site.hook_name
        model, stop = pair.models[self.position], stop_layer(self.hook_name)
        shared = [
            other.name
            for other, its in zip(pair.sites, pair.models, strict=True)
            if its is model and other.name != site
        ]
        if stop is None or shared:
            what = (
                f"its hook {self.hook_name!r} is outside the blocks"
                if stop is None
                else f"{shared} are sites of the same loaded model"
            )
            raise ValueError(
                f"site {site!r} cannot be watched: {what}. Take a hook in a block, and load the "
                "model once more for its other sites, or use SideView."
            )
        self.ids = RunningIds(model, tokenizer=pair.tokenizer, layer=stop - 1)
        weakref.finalize(self, self.ids.stop)

    def streams_with(
        self, x: Float[Tensor, "batch pos *heads"]
    ) -> tuple[Float[Tensor, "batch pos _"], ...]:
        """The own stream as given, and the others' at the ids of the pass that runs.

        Raises ValueError outside of a forward pass, and for a pass that does not begin with all of
        its ids: from embeddings, from a filled key-value cache, or with padding on the left.
        """
        own = x.flatten(start_dim=2)
        if not self.ids.is_known:
            raise ValueError(
                f"a stream of shape {list(x.shape)} was to be encoded outside of a forward pass of "
                f"its model, so the other sites' streams are not known. Attach the SAE at "
                f"{self.hook_name!r} and run the model, or give all sites to crosscoder.encode."
            )
        ids = self.ids.of(*own.shape[:2])
        others = [i for i in range(self.pair.n_sites) if i != self.position]
        found = zip(others, self.pair.site_activations(ids, others), strict=True)
        streams = {i: stream.to(own) for i, stream in found} | {self.position: own}
        return tuple(streams[i] for i in range(self.pair.n_sites))
