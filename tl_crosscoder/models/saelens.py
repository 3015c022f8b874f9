"""A pair as one TransformerLens model, so that SAELens can harvest and evaluate it.

Contract: the hook point `hook_sites` carries [batch, pos, d_in], the sites side by side, of a pair
or of any list of sites; an edit there changes the logits: those of the last site's model,
continued from its part. Limit: no weights of its own; the base has no part in the logits.

One model of a pair as SAELens takes it, with the other models' streams beside it.

Contract: a crosscoder needs the streams of all sites to encode one. `activations_with(x)` gives
them for an activation of the own site: of a `SiteView`, those of its last
forward pass; of a `HookedSite`, the site's model as it stands, those of the pass that runs. For
SAELens's evaluator and `SiteSAE`, see `analysis.saelens_evals`. Limit: no weights of their own;
every forward pass runs all models to their hooks.
"""

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule

from tl_crosscoder.models.forward import RunningIds
from tl_crosscoder.models.hooked import stop_layer
from tl_crosscoder.models.pair import ModelPair


@dataclass(frozen=True, kw_only=True)
class PairViewConfig:
    """What callers read from `model.cfg`."""

    model_name: str
    d_model: int
    """Width at `hook_sites`: all sites together."""
    d_vocab: int
    n_ctx: int
    device: torch.device
    default_prepend_bos: bool = True


class HookedView(HookedRootModule, ABC):
    """Abstract: models of a pair run to their hooks; one goes on from what passed a hook point.

    Subclasses say what passes `HOOK_NAME`, and which model goes on from it.
    """

    HOOK_NAME: ClassVar[str]

    def __init__(self, pair: ModelPair, *, model_name: str, d_model: int):
        super().__init__()
        self.pair = pair
        self.tokenizer = pair.tokenizer
        self.cfg = PairViewConfig(
            model_name=model_name,
            d_model=d_model,
            d_vocab=pair.d_vocab,
            n_ctx=pair.n_ctx,
            device=pair.device,
        )
        self.add_module(self.HOOK_NAME, HookPoint())
        self.setup()

    @abstractmethod
    def stream(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """What passes the hook point."""

    @abstractmethod
    def continued(
        self, tokens: Int[Tensor, "batch pos"], stream: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits that follow from what passed it."""

    def to_tokens(
        self,
        text: str | list[str],
        *,
        prepend_bos: bool = True,
        truncate: bool = True,
        move_to_device: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Right-padded ids. Without `truncate` they may be longer than `n_ctx`."""
        n_max = self.cfg.n_ctx if truncate else None
        texts = [text] if isinstance(text, str) else text
        ids = [self.pair.encode(each, prepend_bos=prepend_bos)[:n_max] for each in texts]
        tokens, _ = self.pair.pad(ids)
        return tokens if move_to_device else tokens.cpu()

    def forward(
        self,
        input: str | list[str] | Int[Tensor, "batch pos"],
        return_type: str | None = "logits",
        *,
        loss_per_token: bool = False,
        prepend_bos: bool = True,
        stop_at_layer: int | None = None,
        stop_at_hook: bool = False,
    ) -> Any:
        """Logits [batch, pos, d_vocab], the loss in nats, or both.

        `prepend_bos` concerns text only. `stop_at_hook` returns what passed the hook point instead.
        """
        if stop_at_layer is not None or return_type not in ("logits", "loss", "both", None):
            raise ValueError(
                f"a view of a pair takes no stop_at_layer (here {stop_at_layer!r}), and "
                f"return_type {return_type!r} must be 'logits', 'loss', 'both' or None. Stop at "
                f"{self.HOOK_NAME!r} with stop_at_hook=True."
            )
        tokens = (
            input if isinstance(input, Tensor) else self.to_tokens(input, prepend_bos=prepend_bos)
        )
        stream = self.get_submodule(self.HOOK_NAME)(self.stream(tokens))
        if stop_at_hook or return_type is None:
            return stream if stop_at_hook else None
        logits = self.continued(tokens, stream)
        if return_type == "logits":
            return logits
        loss = next_token_loss(logits, tokens)
        loss = loss if loss_per_token else loss.mean()
        return loss if return_type == "loss" else (logits, loss)

    def run_with_cache(self, *args: Any, names_filter: Any = None, **kwargs: Any) -> Any:
        """(output, cache). Asked for the hook point alone, it stops there and returns it twice."""
        names = [names_filter] if isinstance(names_filter, str) else names_filter
        if names == [self.HOOK_NAME]:
            kwargs = {"stop_at_hook": True, **kwargs}
        return super().run_with_cache(*args, names_filter=names_filter, **kwargs)


class PairView(HookedView):
    """All sites side by side at `hook_sites`; the last site's model goes on from its part."""

    HOOK_NAME = "hook_sites"

    def __init__(self, pair: ModelPair):
        names = " | ".join(site.label for site in pair.model_sites)
        super().__init__(pair, model_name=names, d_model=pair.d_in)

    def stream(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_in"]:
        """Activations of all sites."""
        return self.pair.activations(tokens).flatten(start_dim=2)

    def continued(
        self, tokens: Int[Tensor, "batch pos"], stream: Float[Tensor, "batch pos d_in"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of the last site's model."""
        last = self.pair.model_sites[-1]
        return self.pair.run_with_patch(tokens, stream[..., -last.d_model :], site=last.name)


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos_less_one"]:
    """Cross-entropy in nats of each token but the first."""
    predictions = logits[:, :-1].float().flatten(end_dim=1)
    targets = tokens[:, 1:].to(logits.device)
    loss = torch.nn.functional.cross_entropy(predictions, targets.flatten(), reduction="none")
    return loss.view_as(targets)


class SiteView(HookedView):
    """The stream of one site at `hook_side`; that site's model goes on from it.

    Raises ValueError for an unknown site.
    """

    HOOK_NAME = "hook_side"

    def __init__(self, pair: ModelPair, site: str):
        position = pair.site_index(site)
        own = pair.model_sites[position]
        super().__init__(pair, model_name=own.label, d_model=own.d_model)
        self.position, self.site, self.hook_name = position, own, self.HOOK_NAME
        self.acts: tuple[Float[Tensor, "batch pos _"], ...] = ()
        """Activations of all sites in the forward pass that ran last; none before the first."""

    def stream(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The site's stream; those of all sites are kept."""
        self.acts = tuple(self.pair.site_activations(tokens, range(len(self.pair.model_sites))))
        return self.acts[self.position]

    def continued(
        self, tokens: Int[Tensor, "batch pos"], stream: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of the site's model."""
        return self.pair.run_with_patch(tokens, stream, site=self.site.name)

    def activations_with(
        self, x: Float[Tensor, "batch pos _"]
    ) -> tuple[Float[Tensor, "batch pos _"], ...]:
        """Activations of all sites in the forward pass that ran last, before any edit.

        Raises ValueError unless `x` is the site's stream of that pass, bit for bit.
        """
        if not self.acts or not torch.equal(self.acts[self.position].to(x), x):
            raise ValueError(
                f"x of shape {list(x.shape)} is not the stream of site {self.site.name!r} in the "
                "last forward pass of its view, so the other sites' streams at these tokens are "
                "not known. Run the view on the tokens first, or give all sites to "
                "crosscoder.encode."
            )
        return self.acts


class HookedSite:
    """The model of a site, watched so that the other sites' streams of each pass can be known.

    Its ids are caught at the embedding, and the other models run on them when an SAE at the hook
    asks. The model itself is left as it is. It is watched for as long as this object lives.

    Raises:
        ValueError: an unknown site, a hook outside the blocks, or another site of the same model,
            which would run inside its own forward pass.
    """

    def __init__(self, pair: ModelPair, site: str):
        self.pair, self.position = pair, pair.site_index(site)
        self.site = pair.model_sites[self.position]
        self.hook_name = self.site.hook_name
        model, stop = pair.models[self.position], stop_layer(self.hook_name)
        shared = [
            other.name
            for other, its in zip(pair.model_sites, pair.models, strict=True)
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
                "model once more for its other sites, or use SiteView."
            )
        self.ids = RunningIds(model, tokenizer=pair.tokenizer, layer=stop - 1)
        weakref.finalize(self, self.ids.stop)

    def activations_with(
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
        others = [i for i in range(len(self.pair.model_sites)) if i != self.position]
        found = zip(others, self.pair.site_activations(ids, others), strict=True)
        acts = {i: stream.to(own) for i, stream in found} | {self.position: own}
        return tuple(acts[i] for i in range(len(self.pair.model_sites)))
