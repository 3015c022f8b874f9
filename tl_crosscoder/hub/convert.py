"""Crosscoders of other libraries as a `Crosscoder`: from a folder, a weights file or the hub.

    convert("ckkissane/crosscoder-gemma-2-2b-model-diff/blocks.14.hook_resid_pre",
            base="google/gemma-2-2b", finetuned="google/gemma-2-2b-it", scales=(0.27590, 0.24423))

Contract: on raw activations the codes are those of the other library's `encode`, at its scale;
`fold_W_dec_norm()` makes them ours, f_j n_j. Layouts: dictionary_learning, ckkissane, crosscode,
told apart by their tensors. Limit: files do not say whether the models' weights were processed.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAEMetadata

from tl_crosscoder.config.models import ModelsConfig
from tl_crosscoder.crosscoder.config import CrosscoderConfig
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.hub.foreign import Foreign, ForeignFiles, read_files
from tl_crosscoder.hub.layouts import read_ckkissane, read_crosscode, read_dictionary_learning
from tl_crosscoder.models.site import Site
from tl_crosscoder.run.sources import sites_of


def convert(
    source: str | Path,
    *,
    base: str | None = None,
    finetuned: str | None = None,
    adapter: str | None = None,
    hook_name: str | None = None,
    sites: Sequence[Site] | None = None,
    scales: Sequence[float] | None = None,
    revision: str | None = None,
) -> Crosscoder:
    """Read another library's crosscoder.

    Args:
        source: folder, weights file, or on the hub owner/name with a folder or file after it.
        base: base model, where the files do not name it.
        finetuned: fine-tuned model; several with commas between.
        adapter: PEFT adapter on the base, instead of `finetuned`.
        hook_name: hook point, where the files do not name it; several with commas between.
        sites: all of these at once, for revisions and other lists of sites.
        scales: by which training multiplied the activations of each site, where the files neither
            say nor have it folded in: ckkissane's are printed by their notebook alone. None is 1.
        revision: of the dictionary on the hub.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another layout, something that cannot be represented, or models that are not
            named or are too few or too many.
    """
    files = read_files(source, revision=revision)
    foreign = _read(files)
    names: dict[str, Any] = dict(foreign.names)
    given = {"base": base, "finetuned": finetuned, "adapter": adapter, "hook_name": hook_name}
    names |= {name: value for name, value in given.items() if value is not None}
    own = tuple(sites) if sites is not None else _named_sites(foreign, names)
    crosscoder = _assembled(foreign, _placed(foreign, own), files.name)
    if scales is not None:
        _check_scales(foreign, scales)
        crosscoder.fold_site_scales_(scales)
    bad = [n for n, t in crosscoder.state_dict().items() if not t.isfinite().all()]
    if bad:
        raise ValueError(f"{files.path} holds NaN or infinity in {bad}: use another checkpoint.")
    return crosscoder


def _read(files: ForeignFiles) -> Foreign:
    """By the layout that the names of the tensors tell."""
    names = set(files.tensors)
    if {"encoder.weight", "decoder.weight"} <= names:
        return read_dictionary_learning(files)
    if {"W_enc", "W_dec"} <= names:
        return read_ckkissane(files)
    if {"_W_enc_XiDiL", "_W_dec_LXoDo"} <= names:
        return read_crosscode(files)
    raise ValueError(
        f"{files.path} holds {sorted(names)[:12]}: the tensors of no layout that is known. Known "
        "are dictionary_learning (encoder.weight, decoder.weight), ckkissane (W_enc, W_dec) and "
        "crosscode (_W_enc_XiDiL, _W_dec_LXoDo)."
    )


def _named_sites(foreign: Foreign, names: dict[str, Any]) -> tuple[Site, ...]:
    try:
        return sites_of(ModelsConfig(**names))
    except ValueError as error:
        raise ValueError(
            f"the files of this {foreign.library} crosscoder of {len(foreign.W_enc)} sites name "
            f"{dict(foreign.names) or 'no models'}; with what was given: {error}"
        ) from error


def _placed(foreign: Foreign, sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """The sites with width and scale of the file."""
    n_sites, d_model, _ = foreign.W_enc.shape
    if len(sites) != n_sites or any(s.d_model not in (0, d_model) for s in sites):
        raise ValueError(
            f"the file holds {n_sites} sites of width {d_model}, but these were named: "
            f"{[(s.name, s.model_name, s.hook_name, s.d_model or 'any width') for s in sites]}. "
            "Name as many, model by model, in the order of the file."
        )
    pairs = zip(sites, foreign.scales, strict=True)
    return tuple(replace(s, d_model=d_model, scale=scale) for s, scale in pairs)


def _assembled(foreign: Foreign, sites: tuple[Site, ...], name: str) -> Crosscoder:
    n_sites, d_model, d_sae = foreign.W_enc.shape
    facts = {"library": foreign.library, "name": name, **foreign.facts}
    cfg = CrosscoderConfig(
        d_in=n_sites * d_model,
        d_sae=d_sae,
        sites=sites,
        metadata=SAEMetadata(
            hook_name=sites[-1].hook_name, model_name=sites[-1].model_name, imported_from=facts
        ),
    )
    crosscoder = Crosscoder(cfg)
    weights = {
        "W_enc": foreign.W_enc.reshape(cfg.d_in, d_sae),
        "W_dec": foreign.W_dec.transpose(0, 1).reshape(d_sae, cfg.d_in),
        "b_enc": foreign.b_enc,
        "b_dec": foreign.b_dec.flatten(),
        "threshold": foreign.threshold,
    }
    crosscoder.load_state_dict({n: t.to(torch.float32) for n, t in weights.items()})
    return crosscoder


def _check_scales(foreign: Foreign, scales: Sequence[float]) -> None:
    if len(scales) != len(foreign.W_enc) or not all(s > 0 for s in scales):
        raise ValueError(
            f"scales are {tuple(scales)}: give one above 0 for each of the {len(foreign.W_enc)} "
            "sites."
        )
    if any(s != 1 for s in foreign.scales):
        raise ValueError(
            f"the file has its scales {foreign.scales} folded in already: leave scales out."
        )
