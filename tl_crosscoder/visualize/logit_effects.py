"""What latents of a run say to the next token's logits, whatever its sites.

Contract: `logit_effect` of two models and of a difference, and the same of a single site; tokens
are called as `token_names` does, so that parts of characters can be told apart. Limit: hooks on the
residual stream.
"""

from collections.abc import Sequence
from dataclasses import replace

from tl_crosscoder.analysis.lens import LogitEffects, direction_logits, logit_effect
from tl_crosscoder.run_folder import RunFolder
from tl_crosscoder.site_difference import SiteDifference
from tl_crosscoder.visualize.token_names import token_namer


def effects_on_logits(run: RunFolder, latents: Sequence[int], *, n: int) -> LogitEffects:
    """The n tokens that each latent promotes most, and the n that it suppresses most.

    Raises ValueError for a hook off the residual stream, and for sites of unequal width.
    """
    found, name = _effects(run, list(latents), n), token_namer(run.models.tokenizer)
    rows = tuple(replace(row, token=name(row.token_id)) for row in found.rows)
    return replace(found, rows=rows)


def _effects(run: RunFolder, latents: list[int], n: int) -> LogitEffects:
    models, crosscoder = run.models, run.crosscoder
    if len(crosscoder.sites) > 1 or isinstance(models, SiteDifference):
        return logit_effect(models, crosscoder, latents, n=n)
    (site,) = [site.name for site in models.sites]
    found = direction_logits(models, crosscoder.decoder(0).detach()[latents], site=site, n=n)
    rows = tuple(replace(row, latent=latents[row.latent]) for row in found.rows)
    return replace(found, rows=rows)
