"""Run a model on from other activations at its hook, several variants at a time.

Contract: `continued` gives the logits `[variants, batch, pos, d_vocab]` of a model in which the
activation at one hook is replaced by each of `[variants, batch, pos, d_model]`, `Continuation`
those where each variant has a hook of its own. At the ends of blocks variants join the batch of the
layers above, so that no layer runs for a variant that begins after it, and those below all hooks
run in the first call alone. Limit: elsewhere the whole model runs once a variant. Gradients flow
where the caller lets them.

`activation_gradients`: how a number made of these logits changes with each of the variants.

Contract: inside `differentiable(model)`, which no `no_grad` or `inference_mode` around it reaches,
and in which no weight gets a gradient. Limit: the layers above the hook have to pass gradients on.

`RunningIds`: the token ids of the forward pass that runs in a model, caught at its embedding.

Contract: a hook of the model that needs other models on the same text asks `of(batch, n_pos)` for
the ids `[batch, pos]` of its stream, all of them, or gets a ValueError. Limit: no filled key-value
cache, no passes from embeddings, unpadded or right-padded ids.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.models.hooked import (
    Hook,
    HookedModel,
    device_of,
    replacing_hook,
    stop_layer,
)


def continued(
    model: HookedModel,
    hook_name: str,
    tokens: Int[Tensor, "batch pos"],
    *,
    variants: Float[Tensor, "variants batch pos d_model"],
) -> Float[Tensor, "variants batch pos d_vocab"]:
    """Logits of a model that goes on from each variant, on its device."""
    return Continuation(model, tokens)([(hook_name, variant) for variant in variants])


class Continuation:
    """A model that goes on from activations at its hooks, always on the same tokens.

    Args:
        model: of either kind.
        tokens: ids that are not padded, or padded on the right.
    """

    def __init__(self, model: HookedModel, tokens: Int[Tensor, "batch pos"]):
        self.model = model
        self.tokens = tokens.to(device_of(model))
        self._output: Any = None
        """What a block gave in the first call, of no tokens."""

    def __call__(
        self, places: Sequence[tuple[str, Float[Tensor, "batch pos d_model"]]]
    ) -> Float[Tensor, "n batch pos d_vocab"]:
        """Logits that follow from each of some activations, one at a time, at their hooks."""
        if not all(ends_a_block(name) for name, _ in places):
            return continued_apart(self.model, self.tokens, places=places)
        order = sorted(range(len(places)), key=lambda i: stop_layer(places[i][0]) or 0)
        logits = self._joined([places[i] for i in order])
        return logits if order == sorted(order) else logits[torch.tensor(order).argsort()]

    def _joined(
        self, places: Sequence[tuple[str, Float[Tensor, "batch pos d_model"]]]
    ) -> Float[Tensor, "n batch pos d_vocab"]:
        """The lowest first: each hook adds its rows to the batch."""
        by_hook: dict[str, list[Tensor]] = {}
        for name, activation in places:
            by_hook.setdefault(name, []).append(activation)
        first, (batch, n_pos) = places[0][0], self.tokens.shape
        rows, layer = torch.cat(by_hook[first]), stop_layer(first) or 0

        def joining(name: str) -> Hook:
            own = rows if name == first else torch.cat(by_hook[name])

            def join(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
                new = own.to(activation)
                return new if name == first else torch.cat([activation, new])

            return name, join

        below = self._observed(layer) if self._output is None else self._skipped(rows, layer)
        with _wider_blocks(self.model, from_layer=layer, batch=batch), below:
            logits = _logits(self.model, self.tokens, [joining(name) for name in by_hook])
        return logits.view(len(places), batch, n_pos, -1)

    @contextmanager
    def _observed(self, layer: int) -> Iterator[None]:
        """While open, the form of what the block of the hook gives is kept."""

        def keep(module: Any, args: Any, output: Any) -> None:  # noqa: ARG001
            parts = output if isinstance(output, tuple) else (output,)
            self._output = type(output), parts[0].detach()[:0], parts[1:]

        blocks: Any = self.model.blocks  # type: ignore[attr-defined]
        handle = blocks[layer - 1].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _skipped(self, rows: Float[Tensor, "rows pos d_model"], layer: int) -> Iterator[None]:
        """While open, the blocks up to the hook do nothing but give these rows."""
        kind, like, rest = self._output
        output = (rows.to(like), *rest) if kind is tuple else rows.to(like)
        blocks: Any = self.model.blocks  # type: ignore[attr-defined]
        # Past `__setattr__`, which a bridge passes on to the model inside it.
        below = [vars(block) for block in list(blocks)[:layer]]
        try:
            for own in below:
                own["forward"] = lambda *_, **__: output
            yield
        finally:
            for own in below:
                own.pop("forward", None)


def continued_apart(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    *,
    places: Sequence[tuple[str, Float[Tensor, "batch pos d_model"]]],
) -> Float[Tensor, "n batch pos d_vocab"]:
    """`Continuation` with a whole forward pass for each, at any hook."""
    hooks = [replacing_hook(name, lambda _, new=activation: new) for name, activation in places]
    return torch.stack([_logits(model, tokens, [hook]) for hook in hooks])


def _logits(model: HookedModel, tokens: Int[Tensor, "batch pos"], hooks: list[Hook]) -> Tensor:
    return model.run_with_hooks(
        tokens.to(device_of(model)), fwd_hooks=hooks, return_type="logits", padding_side="right"
    )


def ends_a_block(hook_name: str) -> bool:
    """Whether nothing but this activation goes on to the layers above."""
    return hook_name.startswith("blocks.") and hook_name.split(".", 2)[2] in (
        "hook_resid_post",
        "hook_out",
    )


@contextmanager
def differentiable(model: HookedModel) -> Iterator[None]:
    """While open, gradients are taken, and of activations alone: no weight of the model gets one.

    Raises:
        ValueError: the model was loaded under `torch.inference_mode`.
    """
    weights = [*model.parameters()]
    if any(weight.is_inference() for weight in weights):
        raise ValueError(
            "the model was loaded under torch.inference_mode, so no gradient passes its weights. "
            "Load it outside, under torch.no_grad() if need be."
        )
    trained = [weight for weight in weights if weight.requires_grad]
    with torch.inference_mode(False), torch.enable_grad():
        try:
            for weight in trained:
                weight.requires_grad_(False)
            yield
        finally:
            for weight in trained:
                weight.requires_grad_(True)


def activation_gradients(
    model: HookedModel,
    hook_name: str,
    tokens: Int[Tensor, "batch pos"],
    *,
    variants: Float[Tensor, "variants batch pos d_model"],
    value: Callable[[Float[Tensor, "variants batch pos d_vocab"]], Float[Tensor, ""]],
) -> Float[Tensor, "variants batch pos d_model"]:
    """How `value`, a function of the logits, changes with the variants; in their dtype.

    Raises:
        ValueError: no gradient reaches the hook, or it is not finite.
    """
    points = variants.detach().requires_grad_()
    logits = continued(model, hook_name, tokens, variants=points)
    if not logits.requires_grad:
        raise ValueError(
            f"no gradient passes the layers above {hook_name!r} of this model, so nothing can be "
            "attributed to its latents. Models in bfloat16, float32 and 4 bits (nf4) pass it; "
            "others are ranked by what latents explain (order 'score') and tested by patching."
        )
    (found,) = torch.autograd.grad(value(logits), points)
    if not bool(found.isfinite().all()):
        raise ValueError(
            f"the gradient at {hook_name!r} holds NaN or infinity: the numbers of "
            f"{str(logits.dtype).removeprefix('torch.')} are too small for it. Load the models in "
            "bfloat16 or float32."
        )
    return found


@contextmanager
def _wider_blocks(model: HookedModel, *, from_layer: int, batch: int) -> Iterator[None]:
    """While open, what the blocks above get beside the activation is repeated to be as many rows.

    A bridge hands its blocks the attention mask of the whole batch, `[batch, 1, pos, pos]`.
    """

    def widen(value: Any, n: int) -> Any:
        if isinstance(value, tuple):
            return tuple(widen(v, n) for v in value)
        if isinstance(value, Tensor) and value.ndim > 1 and len(value) == batch:
            return value.repeat(n, *[1] * (value.ndim - 1))
        return value

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG001
        n = len(args[0] if args else kwargs["hidden_states"]) // batch
        # GPT-2 hands its mask on by position, Llama by name.
        wide = (*args[:1], *(widen(v, n) for v in args[1:]))
        return wide, {k: v if k == "hidden_states" else widen(v, n) for k, v in kwargs.items()}

    blocks: Any = model.blocks  # type: ignore[attr-defined]
    handles = [
        block.register_forward_pre_hook(before, with_kwargs=True)
        for block in list(blocks)[from_layer:]
        if batch > 1
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class RunningIds:
    """Watches a model until `stop`.

    Args:
        model: a TransformerLens model of either kind.
        tokenizer: of the ids, for its padding.
        layer: ids are known while this block runs; None keeps them until they are asked for.
    """

    def __init__(self, model: Any, *, tokenizer: Any, layer: int | None = None):
        self.tokenizer = tokenizer
        self.is_paused = False
        """Passes do not count."""
        self.is_known = layer is None
        """Whether the block that was given runs."""
        self._embedded: Tensor | None = None
        self._asked: Tensor | None = None
        self._before: Tensor | None = None
        self._n_cached = 0
        self._forgets = layer is None
        self._handles = [
            model.embed.register_forward_pre_hook(self._embedding),
            model.blocks[0].register_forward_pre_hook(self._beginning, with_kwargs=True),
        ]
        if layer is not None:
            block = model.blocks[layer]
            self._handles.append(block.register_forward_pre_hook(self._entering))
            self._handles.append(block.register_forward_hook(self._leaving, always_call=True))

    def stop(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For the other models' passes, of which one may be of this model at another site."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def of(self, batch: int, n_pos: int) -> Int[Tensor, "batch pos"]:
        """Ids of a stream of this shape. Raises ValueError where they are not all known."""
        ids, before = self._embedded, self._before
        # HookedTransformer generates without cache from embeddings that it keeps, so that only the
        # prompt and then each new token pass the embedding.
        if ids is not None and before is not None and ids.shape == (batch, 1) and n_pos > 1:
            ids = torch.cat([before, ids], dim=1) if len(before) == batch else None
        if ids is None or ids.shape != (batch, n_pos):
            raise ValueError(
                f"the ids of the {batch} x {n_pos} tokens at the hook are not known, and other "
                "models have to run on them. Run the model on token ids, not on embeddings."
            )
        self.check_cache()
        self._check_padding(ids)
        self._asked = ids
        if self._forgets:  # so that a pass that skips the embedding is not taken for this one
            self._embedded = None
        return ids

    def check_cache(self) -> None:
        """Raise ValueError in a pass that goes on from a filled key-value cache."""
        if self._n_cached and not self.is_paused:
            raise ValueError(
                f"this pass goes on from a key-value cache of {self._n_cached} positions, but "
                "other models have to run on the whole text. Generate with "
                "use_past_kv_cache=False."
            )

    def _check_padding(self, ids: Int[Tensor, "batch pos"]) -> None:
        pad = self.tokenizer.pad_token_id
        starts = ids[:, 0] == (-1 if pad is None else pad)
        if starts.any() and not starts.all():
            raise ValueError(
                f"{int(starts.sum())} of {len(ids)} rows begin with padding, but other models have "
                "to run on the ids without a mask. Pad on the right."
            )

    def _embedding(self, module: Any, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        if not self.is_paused:
            self._embedded, self._before, self._asked = args[0], self._asked, None
            self._n_cached = 0  # not yet known in this pass

    def _beginning(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        if not self.is_paused:
            self._n_cached = _n_cached([*args, *kwargs.values()])

    def _entering(self, module: Any, args: tuple[Any, ...]) -> None:  # noqa: ARG002
        self.is_known = True

    def _leaving(self, module: Any, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        self.is_known, self._embedded = False, None


def _n_cached(values: list[Any]) -> int:
    """Positions in a key-value cache, by what either kind of model hands its blocks."""
    for value in values:
        if hasattr(value, "get_seq_length"):
            return int(value.get_seq_length())
        if hasattr(value, "past_keys"):
            return int(value.past_keys.shape[1])
    return 0
