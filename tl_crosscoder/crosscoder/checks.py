"""Whether a dictionary belongs to the models at hand: refused before any work where it does not.

Contract: sites, models, weight processing and tokenizer are those that it was trained on. Limit:
models are told apart by name, revision and adapter; a field that an old dictionary lacks is not
compared.
"""

from typing import Any

from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.models.site import Site
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.models.tokenizer import tokenizer_sha256


def check_source(source: ActivationSource, crosscoder: Crosscoder) -> None:
    """Refuse models that are not those of the dictionary.

    Raises:
        ValueError: other hook points, widths, models, weight processing or tokenizer, or another
            device.
    """
    check_sites(source, crosscoder)
    theirs, ours = ([_model(s) for s in of.sites] for of in (crosscoder, source))
    if theirs != ours:
        raise ValueError(
            f"the dictionary was trained on {_listed(theirs)}, but the models are {_listed(ours)}. "
            "Load those that it names. If they are the same under other names, say so with "
            "crosscoder.rename_models_(pair.sites)."
        )
    metadata = crosscoder.cfg.metadata
    processing = getattr(metadata, "weight_processing", None)
    if processing not in (None, source.weight_processing):
        raise ValueError(
            f"the dictionary was trained on models with {processing} weights, but these have "
            f"{source.weight_processing} ones (norms folded or weights centred), which moves "
            "activations to other coordinates. Load the models the other way."
        )
    made_with = getattr(metadata, "tokenizer_sha256", None)
    if made_with not in (None, tokenizer_sha256(source.tokenizer)):
        raise ValueError(
            "the dictionary was trained with another tokenizer than that of these models. Give "
            "them the one it was trained with (tokenizer=...)."
        )
    check_device(source, crosscoder)


def check_sites(source: ActivationSource, crosscoder: Crosscoder) -> None:
    """Refuse models whose hook points or widths are not those of the dictionary."""
    theirs, ours = ([_where(s) for s in of.sites] for of in (crosscoder, source))
    if theirs != ours:
        is_difference = any(s.minus for s in crosscoder.sites)
        raise ValueError(
            f"the crosscoder was trained on the sites {theirs}, but the models have {ours}. Load "
            "the models with the hook point that the dictionary's cfg.json names"
            + (", and take their pair.difference()." if is_difference else ".")
        )


def check_device(source: ActivationSource, crosscoder: Crosscoder) -> None:
    """Refuse a dictionary that is not where the activations are."""
    device = crosscoder.W_dec.device
    if device != source.device:
        raise ValueError(
            f"the crosscoder is on {device} and the models on {source.device}: load it with "
            f"Crosscoder.load(..., device='{source.device}')."
        )


def _where(site: Site) -> tuple[Any, ...]:
    minus = ("minus", _where(site.minus)) if site.minus else ()
    return site.name, site.hook_name, site.d_model, *minus


def _model(site: Site) -> tuple[Any, ...]:
    minus = _model(site.minus) if site.minus else ()
    return site.model_name, site.revision, site.adapter, *minus


def _listed(models: list[tuple[Any, ...]]) -> str:
    return "; ".join(" ".join(str(part) for part in m if part is not None) for m in models)
