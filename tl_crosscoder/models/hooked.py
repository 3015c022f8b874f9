"""One TransformerLens model, of either kind, through what both kinds share.

Contract: `run_to_hooks` gives the activation at hooks as [batch, pos, d_model], heads flattened;
`generate_ids` gives continuations as lists of ids; neither leaves a hook behind.
Limit: decoder-only models on right-padded or unpadded tokens.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Hook = tuple[str | Callable[[str], bool], Callable[..., Any]]
"""A forward hook: (name, function of the activation and the hook point)."""


@runtime_checkable
class HookedModel(Protocol):
    """What `HookedTransformer` and `TransformerBridge` share: all that is asked of a model here."""

    @property
    def cfg(self) -> Any:
        """Read: `d_vocab`, `n_ctx`, `normalization_type`, `eos_token_id`, `model_name`."""

    @property
    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer, or None."""

    @property
    def hook_dict(self) -> dict[str, Any]:
        """Hook points by name, aliases included."""
        ...

    @property
    def W_E(self) -> Any:
        """Token embedding [d_vocab, d_model]."""

    def hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Context manager that adds `fwd_hooks` and takes them off again."""

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass with `fwd_hooks`, up to `stop_at_layer`."""

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass and the activations that `names_filter` selects."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue prompts."""

    def parameters(self) -> Any:
        """Iterate over the weights."""

    def eval(self) -> Any:
        """Switch dropout off."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass: logits."""


@dataclass(frozen=True, kw_only=True)
class WeightProcessing:
    """Which rewrites of its weights a model carries: they move activations to other coordinates."""

    is_folded: bool
    """Layer norms are folded into the matrices after them."""
    is_centred: bool
    """Matrices that write to the residual stream have mean zero over d_model."""

    @property
    def name(self) -> str:
        """`raw` or `processed`, the word recorded with a dictionary."""
        return "processed" if self.is_folded or self.is_centred else "raw"


@torch.no_grad()
def weight_processing(model: HookedModel) -> WeightProcessing:
    """Find out whether layer norms were folded and writing weights centred.

    `HookedTransformer` says by its norm type that norms were folded, the bridge by a flag. Neither
    says that weights were centred, so that is measured on the embedding: |mean over d_model| / RMS
    is 1e-8 once centred (2e-4 in bfloat16) and 0.1 in raw models of width 32 to 64, falling as
    1/sqrt(d_model).
    """
    is_folded = str(getattr(model.cfg, "normalization_type", None)).endswith("Pre")
    is_folded = is_folded or bool(getattr(model, "_weights_processed", False))
    W_E = model.W_E[:512].float()
    offset = W_E.mean(dim=-1).abs().mean() / W_E.square().mean().sqrt().clamp_min(1e-12)
    return WeightProcessing(is_folded=is_folded, is_centred=bool(offset < 1e-3))


def device_of(model: HookedModel) -> torch.device:
    """Where the weights are; `cfg.device` goes stale after `.to()`."""
    return next(iter(model.parameters())).device


def stop_layer(hook_name: str) -> int | None:
    """First layer that need not run for a hook to fire; None for hooks outside the blocks."""
    found = re.match(r"blocks\.(\d+)\.", hook_name)
    return None if found is None else int(found.group(1)) + 1


def last_stop_layer(hook_names: Sequence[str]) -> int | None:
    """First layer that no hook needs; None where one of them is outside the blocks."""
    stops = [stop_layer(name) for name in hook_names]
    known = [stop for stop in stops if stop is not None]
    return max(known) if len(known) == len(stops) else None


def check_hook(model: HookedModel, hook_name: str, label: str) -> None:
    """Raise ValueError if there is no such hook: a bridge silently ignores unknown names."""
    if hook_name in model.hook_dict:
        return
    near = difflib.get_close_matches(hook_name, model.hook_dict, n=3, cutoff=0.5)
    nearest = f"; nearest: {', '.join(map(repr, near))}" if near else ""
    raise ValueError(
        f"hook {hook_name!r} is not in the {label}{nearest}. List them with model.hook_dict."
    )


def check_tokens(tokens: Int[Tensor, "batch pos"], *, d_vocab: int, n_ctx: int) -> None:
    """Raise ValueError for what is no batch of ids that a model knows and has room for."""
    if tokens.ndim != 2 or tokens.numel() == 0 or tokens.is_floating_point():
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)} and {tokens.dtype} are not ids [batch, pos]; "
            "make them with pair.to_tokens(text), of at least one token."
        )
    if tokens.shape[1] > n_ctx:
        raise ValueError(
            f"{tokens.shape[1]} tokens a row are more than the models' context of {n_ctx}; split "
            f"the text, or cut it with to_tokens(..., max_tokens={n_ctx})."
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= d_vocab:
        raise ValueError(
            f"token ids run from {low} to {high}, but the models know 0 to {d_vocab - 1}: were "
            "they made with another tokenizer? Use pair.to_tokens(text)."
        )


@torch.no_grad()
def hook_widths(model: HookedModel, labels: Mapping[str, str]) -> dict[str, int]:
    """Width of the activation at each hook, heads flattened, measured on two tokens in one pass.

    Args:
        model: of either kind.
        labels: what messages call the model, by the name of the hook.

    Raises:
        ValueError: a hook is switched off, never fires, or is not one vector a token.
    """
    tokens = torch.zeros((1, 2), dtype=torch.long, device=device_of(model))
    try:
        found = run_to_hooks(model, [*labels], tokens)
    except (AssertionError, ValueError) as error:
        if len(labels) > 1:  # which of them it is
            each = (hook_widths(model, {name: label}) for name, label in labels.items())
            return {name: width for own in each for name, width in own.items()}
        ((hook_name, label),) = labels.items()
        raise ValueError(
            f"hook {hook_name!r} of the {label} gives nothing to compare: {error} Choose a hook "
            "with one vector a token, such as 'blocks.0.hook_resid_post'."
        ) from error
    return {name: x.shape[-1] for name, x in zip(labels, found, strict=True)}


def run_to_hooks(
    model: HookedModel, hook_names: Sequence[str], tokens: Int[Tensor, "batch pos"]
) -> list[Float[Tensor, "batch pos d_model"]]:
    """Run a model once, just far enough for these hooks to fire; what passed at each of them.

    Raises ValueError if a hook did not fire exactly once, or gave no vector for each token.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in hook_names}

    def keeping(name: str) -> Hook:
        # By the name asked for: a bridge calls a hook by its canonical name.
        return name, lambda activation, hook: seen[name].append(activation)  # noqa: ARG005

    model.run_with_hooks(
        tokens.to(device_of(model)),
        fwd_hooks=[keeping(name) for name in seen],
        stop_at_layer=last_stop_layer(hook_names),
        return_type=None,
        # Where the tokenizer pads left, HookedTransformer would mask leading tokens that look like
        # padding; the bridge would not.
        padding_side="right",
    )
    return [_one_vector_a_token(seen[name], tokens) for name in hook_names]


def _one_vector_a_token(
    seen: list[Tensor], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_model"]:
    if len(seen) != 1:
        raise ValueError(f"it fired {len(seen)} times in one forward pass.")
    if seen[0].ndim < 3 or seen[0].shape[:2] != tokens.shape:
        raise ValueError(
            f"its shape is {tuple(seen[0].shape)} for tokens of shape {tuple(tokens.shape)}."
        )
    return seen[0].flatten(start_dim=2)


def replacing_hook(
    hook_name: str, replace: Callable[[Float[Tensor, "batch pos d_model"]], Tensor]
) -> Hook:
    """A hook that puts `replace(activation)` in an activation's place.

    Raises ValueError, in the forward pass, if the new activation has another shape.
    """

    def hook_fn(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        flat = activation.flatten(start_dim=2)
        new = replace(flat)
        if new.shape != flat.shape:
            raise ValueError(
                f"the patch at {hook_name!r} has shape {tuple(new.shape)} where the activation has "
                f"{tuple(flat.shape)}. Where lengths vary, as in generation, give a function."
            )
        return new.to(activation).reshape(activation.shape)

    return hook_name, hook_fn


@torch.no_grad()
def generate_ids(
    model: HookedModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop_ids: Sequence[int],
    fwd_hooks: Sequence[Hook] = (),
    use_past_kv_cache: bool = True,
    with_stop: bool = False,
) -> list[list[int]]:
    """Continuations, without the prompt and cut before the first stop id, or with it after it.

    Prompts of one length run as a batch, so that nothing is ever padded and a hook sees real tokens
    only. `temperature` 0 is greedy; else sampling is seeded and leaves the global generator alone.
    """
    device = device_of(model)
    lengths = sorted({len(prompt) for prompt in prompts})
    out: list[list[int]] = [[] for _ in prompts]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for length in lengths:
            rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
            with model.hooks(fwd_hooks=list(fwd_hooks)):
                tokens = model.generate(
                    torch.tensor([prompts[row] for row in rows], device=device),
                    max_new_tokens=max_new_tokens,
                    do_sample=temperature > 0,
                    temperature=temperature or 1.0,
                    stop_at_eos=bool(stop_ids),
                    eos_token_id=list(stop_ids) or None,
                    use_past_kv_cache=use_past_kv_cache,
                    return_type="tokens",
                    verbose=False,
                    # HookedTransformer masks what looks like padding on this side: a final
                    # end-of-text token on the right, or a first BOS on the left unless it is named.
                    padding_side="left",
                    prepend_bos=True,
                )
            for row, ids in zip(rows, tokens[:, length:].tolist(), strict=True):
                n = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
                out[row] = ids[: n + with_stop]
    return out


def stop_ids_of(models: Sequence[HookedModel], tokenizer: Any) -> list[int]:
    """Ids that end a text: those of the tokenizer and of every model's config.

    Chat models end a turn with an id of their config that the tokenizer may not name. Taking all of
    them makes base and fine-tuned model stop alike.
    """
    declared = [getattr(model.cfg, "eos_token_id", None) for model in models]
    found: set[int] = set()
    for ids in [*declared, tokenizer.eos_token_id]:
        found.update([ids] if isinstance(ids, int) else ids or [])
    return sorted(found)
