"""One model of a pair as a TransformerLens model, with the other models' streams beside it.

Contract: the hook point `hook_side` carries `[batch, pos, d_model]` of one site; an edit there
changes the logits, which are those of that site's model. `streams` are those of all sites in the
forward pass that ran last, before any edit: a crosscoder needs them to encode one side. For
SAELens's evaluator, see `analysis.saelens_evals`. Limit: no weights of its own; every forward pass
runs all models to their hooks.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule

from tl_crosscoder.compared_models import ComparedModels
from tl_crosscoder.pair_view import PairViewConfig, next_token_loss

HOOK_NAME = "hook_side"


class SideView(HookedRootModule):
    """All models run to their hooks; that of one site goes on from what passed `hook_side`.

    Raises ValueError for an unknown site.
    """

    def __init__(self, pair: ComparedModels, site: str):
        super().__init__()
        self.pair = pair
        self.position = pair.site_index(site)
        """Of the site, among the pair's."""
        self.site = pair.sites[self.position]
        self.streams: tuple[Float[Tensor, "batch pos _"], ...] = ()
        """Of all sites, in the forward pass that ran last; none before the first."""
        self.tokenizer = pair.tokenizer
        self.to_tokens = pair.as_hooked_model().to_tokens
        self.cfg = PairViewConfig(
            model_name=self.site.label,
            d_model=self.site.d_model,
            d_vocab=pair.d_vocab,
            n_ctx=pair.n_ctx,
            device=pair.device,
        )
        self.hook_side = HookPoint()
        self.setup()

    def forward(
        self,
        input: str | list[str] | Int[Tensor, "batch pos"],
        return_type: str | None = "logits",
        *,
        loss_per_token: bool = False,
        prepend_bos: bool = True,
        stop_at_layer: int | None = None,
        stop_at_side: bool = False,
    ) -> Any:
        """Logits [batch, pos, d_vocab] of the site's model, its loss in nats, or both.

        `prepend_bos` concerns text only. `stop_at_side` returns what passed `hook_side` instead.
        """
        if stop_at_layer is not None or return_type not in ("logits", "loss", "both", None):
            raise ValueError(
                f"a side of a pair takes no stop_at_layer (here {stop_at_layer!r}), and "
                f"return_type {return_type!r} must be 'logits', 'loss', 'both' or None. Stop at "
                "the hook with stop_at_side=True."
            )
        tokens = (
            input if isinstance(input, Tensor) else self.to_tokens(input, prepend_bos=prepend_bos)
        )
        self.streams = tuple(self.pair.site_activations(tokens, range(self.pair.n_sites)))
        side = self.hook_side(self.streams[self.position])
        if stop_at_side or return_type is None:
            return side if stop_at_side else None
        logits = self.pair.run_with_patch(tokens, side, site=self.site.name)
        if return_type == "logits":
            return logits
        loss = next_token_loss(logits, tokens)
        loss = loss if loss_per_token else loss.mean()
        return loss if return_type == "loss" else (logits, loss)

    def run_with_cache(self, *args: Any, names_filter: Any = None, **kwargs: Any) -> Any:
        """(output, cache). Asked for `hook_side` by name, it stops there and returns it twice."""
        names = [names_filter] if isinstance(names_filter, str) else names_filter
        if names == [HOOK_NAME]:
            kwargs = {"stop_at_side": True, **kwargs}
        return super().run_with_cache(*args, names_filter=names_filter, **kwargs)

    def is_last_stream(self, x: Float[Tensor, "batch pos _"]) -> bool:
        """Whether this is the site's stream of the forward pass that ran last, bit for bit."""
        return bool(self.streams) and torch.equal(self.streams[self.position].to(x), x)
