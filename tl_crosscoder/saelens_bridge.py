"""A loaded bridge to which SAELens attaches SAEs, without a second copy of its weights.

    model = sae_bridge(pair.model("finetuned"))
    model.run_with_cache_with_saes(tokens, saes=[sae])

Contract: weights and hook points are shared, and the bridge that was given keeps all its hook
names; of a `SAETransformerBridge` only canonical ones are known, and not the `hook_resid_post` of
most dictionaries. Limit: while an SAE is attached, the bridge that was given has it too.
"""

from typing import Any

from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from transformer_lens.hook_points import HookPoint

from tl_crosscoder.hooked_model import HookedModel


class SAEBridge(SAETransformerBridge):
    """A `SAETransformerBridge` whose hook points can be found again after an SAE was there."""

    def _reset_sae(self, act_name: str, prev_wrapper: Any = None) -> None:
        name = self._resolve_hook_name(act_name)
        name = self._transcoder_output_hooks.get(act_name, name)
        super()._reset_sae(act_name, prev_wrapper)
        # sae-lens 6.54 on transformer-lens 3.9 leaves the new hook point without the first part of
        # its name, and then run_with_hooks and hooks() pass over it without a word.
        hook_point = self._hook_registry.get(name)
        if isinstance(hook_point, HookPoint):
            hook_point.name = name


def sae_bridge(model: HookedModel) -> SAEBridge:
    """The same bridge for SAELens, made as `SAETransformerBridge.boot_transformers` makes one.

    Raises ValueError for a model that is no bridge.
    """
    if not hasattr(model, "_hook_registry"):
        raise ValueError(
            f"{type(model).__name__} is no TransformerBridge. Load a HookedTransformer as "
            "sae_lens.HookedSAETransformer: it keeps its hook names."
        )
    # Not copy.copy, by which the config would be bound to the copy.
    made = object.__new__(SAEBridge)
    made.__dict__.update(vars(model), _acts_to_saes={}, _transcoder_output_hooks={})
    return made
