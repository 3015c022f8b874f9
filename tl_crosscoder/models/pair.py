"""A base model and a fine-tuned one, each with one hook point: the subject of most comparisons.

Contract: `pair.activations(tokens)` is [batch, pos, n_sites, d_model] with the base at site 0;
text, patching and generation are those of `ComparedModels`. Limit: two sites of one width, and
models with one vocabulary; `ModelSites` takes any list of sites.
"""

from pathlib import Path
from typing import Any

import torch

from tl_crosscoder.models import checks as pair_checks
from tl_crosscoder.models import loading
from tl_crosscoder.models.hooked import HookedModel
from tl_crosscoder.models.site import Site
from tl_crosscoder.models.sites import ComparedModels


class ModelPair(ComparedModels):
    """Two models that differ in their weights only, and the hook point where they are compared.

    Takes loaded models of either TransformerLens kind, even one of each; `from_pretrained` loads
    them. Puts both in eval mode. Raises ValueError where they cannot be compared: another
    tokenizer, width, dtype, weight processing, or a hook that does not exist.
    """

    def __init__(
        self,
        base: HookedModel,
        finetuned: HookedModel,
        *,
        hook_name: str | tuple[str, str],
        tokenizer: Any = None,
        site_names: tuple[str, str] = ("base", "finetuned"),
        model_names: tuple[str, str] | None = None,
        revisions: tuple[str | None, str | None] = (None, None),
        adapter: str | None = None,
    ):
        models = base, finetuned
        hook_names = (hook_name, hook_name) if isinstance(hook_name, str) else hook_name
        model_names = model_names or (_model_name(base), _model_name(finetuned))
        sites = tuple(
            Site(
                name=site_names[i],
                hook_name=hook_names[i],
                model_name=model_names[i],
                revision=revisions[i],
                adapter=adapter if i == 1 else None,
                base_revision=revisions[0] if i == 1 and adapter else None,
            )
            for i in range(2)
        )
        labels = [f"{site.name} model {site.model_name!r}" for site in sites]
        pair_checks.check_vocabulary(models, labels)
        super().__init__(models, sites, tokenizer=tokenizer)
        widths = [site.d_model for site in self.sites]
        advice = "Choose hooks of one width, or compare them with ModelSites."
        pair_checks.check_equal(widths, "width at the hook", labels, advice)

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        finetuned: str | Path | None = None,
        *,
        hook_name: str | tuple[str, str],
        adapter: str | Path | None = None,
        tokenizer: Any = None,
        device: str = "cpu",
        dtype: str | torch.dtype = "float32",
        merge_adapter: bool | None = None,
        revision: str | None = None,
        finetuned_revision: str | None = None,
    ) -> "ModelPair":
        """Load both models from hub names or local folders, weights raw.

        Give exactly one of `finetuned` and `adapter`: PEFT, on a second copy of the base. It is
        merged into float weights and attached to quantised ones, unless `merge_adapter` says which;
        activations are the same up to float error. `device` is one for both or one for each
        ("cuda:0,cuda:1"); `dtype` "nf4" is 4-bit weights (bitsandbytes), computed in bfloat16.
        `revision` is of the base, `finetuned_revision` of the fine-tuned model or the adapter.
        Raises FileNotFoundError or ValueError where something cannot be found or does not fit.
        """
        if (finetuned is None) == (adapter is None):
            raise ValueError(
                f"give exactly one of finetuned ({finetuned!r}) and adapter ({adapter!r}): the "
                "fine-tuned model, or the PEFT adapter that makes it from the base."
            )
        how = loading.options_of_each(
            [None, adapter],
            device=device,
            dtype=dtype,
            merge_adapter=merge_adapter,
            tokenizer=tokenizer,
        )
        first = loading.load(base, how[0], revision=revision)
        if adapter is not None:
            revisions = {"revision": revision, "adapter_revision": finetuned_revision}
            second = loading.load_adapted(base, adapter, how[1], **revisions)
        else:
            assert finetuned is not None
            second = loading.load(finetuned, how[1], revision=finetuned_revision)
        return cls(
            first,
            second,
            hook_name=hook_name,
            tokenizer=tokenizer,
            model_names=(str(base), str(finetuned or base)),
            revisions=(revision, finetuned_revision),
            adapter=None if adapter is None else str(adapter),
        )


def _model_name(model: HookedModel) -> str:
    return str(getattr(model.cfg, "model_name", None) or "custom")
