"""One model of a pair as SAELens takes it, with the other models' streams beside it.

Contract: a crosscoder needs the streams of all sites to encode one. `streams_with(x)` gives them
for a stream of the own site: of a `SideView`, a TransformerLens model of its own, those of its last
forward pass; of a `ModelSide`, the site's model as it stands, those of the pass that runs. For
SAELens's evaluator and `SideSAE`, see `analysis.saelens_evals`. Limit: no weights of their own;
every forward pass runs all models to their hooks.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.compared_models import ComparedModels
from tl_crosscoder.hooked_model import stop_layer
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
        self.pass_ = RunningPass(model, layer=stop - 1, tokenizer=pair.tokenizer)
        weakref.finalize(self, self.pass_.stop_watching)

    def streams_with(
        self, x: Float[Tensor, "batch pos *heads"]
    ) -> tuple[Float[Tensor, "batch pos _"], ...]:
        """The own stream as given, and the others' at the ids of the pass that runs.

        Raises ValueError outside of a forward pass, and for a pass that does not begin with all of
        its ids: from embeddings, from a filled key-value cache, or with padding on the left.
        """
        own = x.flatten(start_dim=2)
        ids = self.pass_.ids_of(own)
        others = [i for i in range(self.pair.n_sites) if i != self.position]
        found = zip(others, self.pair.site_activations(ids, others), strict=True)
        streams = {i: stream.to(own) for i, stream in found} | {self.position: own}
        return tuple(streams[i] for i in range(self.pair.n_sites))


class RunningPass:
    """The ids of the forward pass that runs in a model, seen from a hook in one of its layers."""

    def __init__(self, model: Any, *, layer: int, tokenizer: Any):
        self.tokenizer = tokenizer
        self.embedded: Tensor | None = None
        self.known: Tensor | None = None
        self.before: Tensor | None = None
        """Ids of the pass before, of which this one may be the continuation."""
        self.n_cached = 0
        self.is_in_layer = False
        self._handles = [
            model.embed.register_forward_pre_hook(self._embedding),
            model.blocks[0].register_forward_pre_hook(self._beginning, with_kwargs=True),
            model.blocks[layer].register_forward_pre_hook(self._entering),
            model.blocks[layer].register_forward_hook(self._leaving, always_call=True),
        ]

    def stop_watching(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def ids_of(self, stream: Float[Tensor, "batch pos d_model"]) -> Int[Tensor, "batch pos"]:
        """Ids of the tokens of a stream in the layer; ValueError where they are not all known."""
        batch, n_pos = stream.shape[:2]
        ids, before = self.embedded, self.before
        # HookedTransformer generates without cache from embeddings that it keeps, so that only the
        # prompt and then each new token pass the embedding.
        if ids is not None and before is not None and ids.shape == (batch, 1) and n_pos > 1:
            ids = torch.cat([before, ids], dim=1) if len(before) == batch else None
        if not self.is_in_layer or ids is None or ids.shape != (batch, n_pos):
            raise ValueError(
                f"a stream of shape {list(stream.shape)} was to be encoded "
                + ("in" if self.is_in_layer else "outside of")
                + " a forward pass of its model, but not with all of its token ids, so the other "
                "sites' streams are not known. Run the model on ids, or give all sites to "
                "crosscoder.encode."
            )
        if self.n_cached:
            raise ValueError(
                f"this pass goes on from a key-value cache of {self.n_cached} positions, but the "
                "other models need the whole text. Generate with use_past_kv_cache=False."
            )
        pad = self.tokenizer.pad_token_id
        starts = ids[:, 0] == (-1 if pad is None else pad)
        if starts.any() and not starts.all():
            raise ValueError(
                f"{int(starts.sum())} of {len(ids)} rows begin with padding, but the other models "
                "run on the ids without a mask. Pad on the right."
            )
        self.known = ids
        return ids

    def _embedding(self, module: Any, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        self.embedded, self.before, self.known = args[0], self.known, None

    def _beginning(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        self.n_cached = n_cached([*args, *kwargs.values()])

    def _entering(self, module: Any, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        self.is_in_layer = True

    def _leaving(self, module: Any, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        # Forgotten, so that a pass that skips the embedding is not taken for this one.
        self.is_in_layer, self.embedded = False, None


def n_cached(values: Sequence[Any]) -> int:
    """Positions in a key-value cache, by what either kind of model hands its blocks."""
    for value in values:
        if hasattr(value, "get_seq_length"):
            return int(value.get_seq_length())
        if hasattr(value, "past_keys"):
            return int(value.past_keys.shape[1])
    return 0
