"""`ShownSite`: the one model that a dashboard is of, with the latents' directions in it.

Contract: other tools know one model and one hook point; of a crosscoder they are shown one site,
the fine-tuned one unless another is named. Limit: the hook has to be in a block, since these tools
number dictionaries by layer.
"""

import re
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.crosscoder.checks import check_source
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.models.hooked import HookedModel
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.site import Site, site_index


@dataclass(frozen=True, kw_only=True, eq=False)
class ShownSite:
    """A site with its model."""

    site: Site
    model: HookedModel
    tokenizer: Any
    decoder: Float[Tensor, "d_sae d_model"]
    """What each latent writes there, per unit of code."""
    n_vocab: int
    """Ids that are tokens: a model may have more logits."""
    layer: int
    hook_point: str
    """The hook's name in its block, such as `hook_resid_post`."""

    @classmethod
    def of(
        cls,
        models: ModelPair,
        crosscoder: Crosscoder,
        site: str | None = None,
    ) -> "ShownSite":
        """Choose a site by name; None is the one that stands for the fine-tuned model.

        Of a diff-SAE it is the fine-tuned model, with the directions of the difference.

        Raises:
            ValueError: an unknown site, models of another dictionary, or a hook in no block or
                off the residual stream.
        """
        check_source(models, crosscoder)
        position = 0 if models.compared is None else models.compared[1]
        if models.is_difference:
            at = 0 if site is None else site_index(models.sites, site)
        else:
            at = position = position if site is None else site_index(models.sites, site)
        own = models.sites[at]
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", own.hook_name)
        if found is None:
            raise ValueError(
                f"the hook {own.hook_name!r} is in no block, and dashboards are numbered by layer: "
                "hand off a dictionary of a hook such as 'blocks.0.hook_resid_post'."
            )
        model = models.models[position]
        if own.d_model != model.cfg.d_model:
            raise ValueError(
                f"site {own.name!r} is {own.d_model} wide and not on the residual stream of "
                f"{model.cfg.d_model}, so that its latents have no logits to show. Name another "
                f"site (--site) of {[(s.name, s.d_model) for s in models.sites]}, or hand off a "
                "dictionary of a hook such as 'blocks.0.hook_resid_post'."
            )
        return cls(
            site=own,
            model=model,
            tokenizer=models.tokenizer,
            decoder=crosscoder.decoder(at).detach(),
            n_vocab=min(models.d_vocab, len(models.tokenizer)),
            layer=int(found.group(1)),
            hook_point=found.group(2),
        )

    @property
    def slug(self) -> str:
        """The model's name in letters, digits, `-` and `_`, which is what Neuronpedia takes."""
        return re.sub(r"[^a-z0-9_-]+", "-", self.site.label.rstrip("/").split("/")[-1].lower())
