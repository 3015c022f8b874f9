"""The `README.md` of an export: what it is, exact or how far not, and how SAELens loads it.

Contract: Markdown from sites and numbers; names stand in code spans. Limit: the code in it runs in
the folder of the export.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tl_crosscoder.hub.card import code, number
from tl_crosscoder.site import Site

HEAD = """---
library_name: saelens
tags: [crosscoder, model-diffing, sparse-autoencoder]
---

# {title}

{what}

| | site | model | hook point | width |
|---|---|---|---|---|
{sites}

"""
LOAD = """```python
import torch
from sae_lens import SAE

sae = SAE.load_from_disk(".")
{use}
```

Activations are raw: scales of the training are folded in.
"""
SIDE_BY_SIDE = "x = torch.cat([{streams}], dim=-1)  # [..., {d_in}], of the same tokens"


def concat_card(sites: Sequence[Site], d_sae: int) -> str:
    """Of all sites in and all out."""
    what = (
        f"A crosscoder of {d_sae:,} latents as a plain SAELens `JumpReLUSAE` over the activations "
        "of its sites side by side. **Exact**: codes and reconstructions are those of the "
        "crosscoder."
    )
    use = [
        _side_by_side(sites),
        f"codes = sae.encode(x)  # [..., {d_sae}]",
        f"parts = sae.decode(codes).split({[s.d_model for s in sites]}, dim=-1)  # one a site",
    ]
    return _card("Crosscoder over all its sites", what, sites, use)


def transcoder_card(sites: Sequence[Site], at: int, d_sae: int) -> str:
    """Of all sites in and one out."""
    what = (
        f"A crosscoder of {d_sae:,} latents as a SAELens `JumpReLUTranscoder`: from the "
        f"activations of all its sites side by side to those of {code(sites[at].name)} alone. "
        "**Exact**: codes and reconstruction are those of the crosscoder."
    )
    use = [
        _side_by_side(sites),
        f"codes = sae.encode(x)  # [..., {d_sae}]",
        f"x_hat = sae.decode(codes)  # [..., {sites[at].d_model}], of site {at}",
    ]
    return _card("Crosscoder to one of its sites", what, sites, use)


def side_card(
    sites: Sequence[Site], at: int, d_sae: int, *, quality: Mapping[str, Any], n_fitted: int
) -> str:
    """Of one site in and out, with what was measured (the fields of `SideQuality`)."""
    site = sites[at]
    what = (
        f"**Approximate.** A crosscoder of {d_sae:,} latents as a SAELens `JumpReLUSAE` of "
        f"{code(site.label)} alone, at {code(site.hook_name)}. The crosscoder reads all its sites; "
        "here the others are estimated from this one, affinely (ridge regression on "
        f"{n_fitted:,} tokens), and the estimate is folded into the encoder. The decoder is the "
        "crosscoder's."
    )
    use = [f"codes = sae.encode(x)  # x: [..., {site.d_model}], of site {at} alone"]
    rows = [
        ("fraction of variance unexplained", number(quality["fvu"], ".4f"),
         number(quality["fvu_of_crosscoder"], ".4f")),
        ("active latents a token (L0)", number(quality["l0"], ".2f"),
         number(quality["l0_of_crosscoder"], ".2f")),
    ]  # fmt: skip
    overlap = [(n, number(quality[n], ".3f")) for n in ("precision", "recall", "jaccard")]
    fve = ", ".join(f"{code(n)} {number(v, '.4f')}" for n, v in quality["estimate_fve"].items())
    measured = [
        f"## How near it comes, on {quality['n_tokens']:,} other tokens",
        "",
        "| | this SAE | the crosscoder |",
        "|---|---|---|",
        *(f"| {name} | {ours} | {exact} |" for name, ours, exact in rows),
        "",
        "Active (token, latent) pairs against the crosscoder's: "
        + ", ".join(f"{name} {value}" for name, value in overlap)
        + f". The estimate explains of the variance of the other sites: {fve}.",
        "",
        "With `HookedSAETransformer` or `SAETransformerBridge`: "
        "`model.run_with_cache_with_saes(tokens, saes=[sae])`.",
        "",
    ]
    return _card("One model's side of a crosscoder", what, sites, use) + "\n" + "\n".join(measured)


def _side_by_side(sites: Sequence[Site]) -> str:
    streams = ", ".join(f"x_{i}" for i in range(len(sites)))
    return SIDE_BY_SIDE.format(streams=streams, d_in=sum(s.d_model for s in sites))


def _card(title: str, what: str, sites: Sequence[Site], use: Sequence[str]) -> str:
    rows = (
        f"| x_{i} | {code(s.name)} | {_model(s)} | {code(s.hook_name)} | {s.d_model} |"
        for i, s in enumerate(sites)
    )
    head = HEAD.format(title=title, what=what, sites="\n".join(rows))
    return head + LOAD.format(use="\n".join(use))


def _model(site: Site) -> str:
    adapter = "" if site.adapter is None else f" with adapter {code(site.adapter)}"
    at = "" if site.revision is None else f" at revision {code(site.revision)}"
    minus = "" if site.minus is None else f", minus {_model(site.minus)}"
    return f"{code(site.model_name)}{adapter}{at}{minus}"
