"""`measure`: everything that one pass over a text tells about a crosscoder and its pair.

The result holds one number per latent and measure, the classes, the reconstruction of both sites
and of their difference, and the top tokens. It is saved as JSON with one safetensors file beside
it, and loads without the models. Limit: ranks latents by norm and firing alone; nothing causal.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.activations.harvest import harvest
from tl_crosscoder.activations.text import TokenizedText
from tl_crosscoder.analysis.decoder_norms import (
    LATENT_CLASSES,
    decoder_cosine,
    delta_norm,
    latent_class_ids,
    relative_decoder_norm,
)
from tl_crosscoder.analysis.max_activating import Example, TopTokens, examples
from tl_crosscoder.analysis.reconstruction import Reconstruction, ReconstructionSums
from tl_crosscoder.crosscoder.crosscoder import Crosscoder, split_sites
from tl_crosscoder.pair import ModelPair

MIN_ACTIVE_TOKENS = 10
"""A latent active on fewer held-out tokens is not ranked: its norms were hardly trained."""

N_ROWS = 4096
"""Tokens encoded at a time."""


@dataclass(frozen=True, kw_only=True)
class LatentMeasures:
    """One value per latent, `[d_sae]`."""

    relative_decoder_norm: Float[Tensor, " d_sae"]
    delta_norm: Float[Tensor, " d_sae"]
    decoder_cosine: Float[Tensor, " d_sae"]
    n_active: Float[Tensor, " d_sae"]
    """Tokens of the measured text on which the latent is active."""
    n_active_by_source: Float[Tensor, "n_sources d_sae"]
    """The same for each source of the text."""

    @property
    def class_ids(self) -> Int[Tensor, " d_sae"]:
        """Index into `LATENT_CLASSES`."""
        return latent_class_ids(self.delta_norm)


@dataclass(frozen=True, kw_only=True)
class LatentSummary:
    """A ranked latent, ready to print."""

    latent: int
    relative_decoder_norm: float
    delta_norm: float
    decoder_cosine: float
    latent_class: str
    n_active: int
    examples: list[Example]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a crosscoder says about its pair on a text."""

    reconstruction: Reconstruction
    latents: LatentMeasures
    top: list[LatentSummary]
    """The latents that lean most to the fine-tune, most first; see `rank`."""
    top_tokens: TopTokens
    """Most active tokens of every latent, as positions in the measured text."""
    sources: tuple[str, ...]

    @property
    def class_counts(self) -> dict[str, int]:
        """Living latents of each class."""
        alive = self.latents.class_ids[self.latents.n_active > 0].tolist()
        counts = Counter(LATENT_CLASSES[i] for i in alive)
        return {name: counts[name] for name in LATENT_CLASSES}

    def save(self, folder: str | Path) -> Path:
        """Write `analysis.json` and `analysis.safetensors`."""
        folder = Path(folder)
        tensors = vars(self.latents) | {
            f"top_tokens.{k}": v for k, v in vars(self.top_tokens).items()
        }
        files.write_tensors(folder / "analysis.safetensors", tensors)
        content = {
            "reconstruction": asdict(self.reconstruction),
            "latents_per_class": self.class_counts,
            "sources": list(self.sources),
            "top": [asdict(s) for s in self.top],
        }
        files.write_json(folder / "analysis.json", _without_nan(content))
        return folder / "analysis.json"

    @classmethod
    def load(cls, folder: str | Path) -> "Measurement":
        """Read what `save` wrote; FileNotFoundError where there is none."""
        folder = Path(folder)
        paths = folder / "analysis.json", folder / "analysis.safetensors"
        if not all(p.is_file() for p in paths):
            raise FileNotFoundError(
                f"{folder} holds no measures (analysis.json, analysis.safetensors). Measure it "
                "again with `tl-crosscoder analyze --fresh`."
            )
        content = json.loads(paths[0].read_text(encoding="utf-8"))
        reconstruction = content["reconstruction"]
        reconstruction["fve"] = {
            site: math.nan if value is None else value
            for site, value in reconstruction["fve"].items()
        }
        top = [s | {"examples": [Example(**e) for e in s["examples"]]} for s in content["top"]]
        tensors = load_file(paths[1])
        top_tokens = {k: tensors.pop(f"top_tokens.{k}") for k in ("values", "positions")}
        return cls(
            reconstruction=Reconstruction(**reconstruction),
            latents=LatentMeasures(**tensors),
            top=[LatentSummary(**s) for s in top],
            top_tokens=TopTokens(**top_tokens),
            sources=tuple(content["sources"]),
        )


def rank(latents: LatentMeasures, *, n: int) -> list[int]:
    """The n latents with the largest relative decoder norm, of those active often enough."""
    norms = latents.relative_decoder_norm.masked_fill(latents.n_active < MIN_ACTIVE_TOKENS, -1)
    order = norms.nan_to_num(-1).sort(descending=True, stable=True).indices[:n].tolist()
    return [i for i in order if norms[i] >= 0]


@torch.no_grad()
def measure(
    pair: ModelPair,
    crosscoder: Crosscoder,
    text: TokenizedText,
    *,
    n_top: int = 10,
    n_examples: int = 8,
    batch_size: int = 32,
    show_progress: bool = False,
) -> Measurement:
    """Run the pair over a held-out text once and measure everything.

    Args:
        pair: the models that the crosscoder was trained on.
        crosscoder: for raw activations, as `Trainer.fit` and `Crosscoder.load` give it.
        text: text that training has not seen.
        n_top: latents to rank.
        n_examples: tokens in context for each of them.
        batch_size: contexts a forward pass.
        show_progress: with a progress bar.

    Raises:
        ValueError: the pair's sites are not those of the crosscoder, or the text is empty.
    """
    check_sites(pair, crosscoder)
    if crosscoder.W_dec.device != pair.device:
        raise ValueError(
            f"the crosscoder is on {crosscoder.W_dec.device} and the pair on {pair.device}: load "
            f"it with Crosscoder.load(..., device='{pair.device}')."
        )
    base, finetuned = _normalised_decoders(crosscoder)
    norms = base.norm(dim=-1), finetuned.norm(dim=-1)
    class_ids = latent_class_ids(delta_norm(*norms))
    description = "Measuring" if show_progress else None
    sums, top, active = _one_pass(
        pair,
        crosscoder,
        harvest(pair, text, batch_size=batch_size, description=description),
        class_ids=class_ids,
        n_examples=n_examples,
        n_sources=len(text.sources),
    )
    latents = LatentMeasures(
        relative_decoder_norm=relative_decoder_norm(*norms),
        delta_norm=delta_norm(*norms),
        decoder_cosine=decoder_cosine(base, finetuned),
        n_active=active.sum(dim=0).double(),
        n_active_by_source=active.double(),
    )
    ranked = rank(latents, n=n_top)
    return Measurement(
        reconstruction=sums.result([s.name for s in crosscoder.sites]),
        latents=latents,
        top=[_summary(j, latents, examples(top, j, text, pair.tokenizer)) for j in ranked],
        top_tokens=top,
        sources=text.sources,
    )


def _one_pass(
    pair: ModelPair,
    crosscoder: Crosscoder,
    harvested: Iterable[tuple[TokenizedText, Tensor]],
    *,
    class_ids: Int[Tensor, " d_sae"],
    n_examples: int,
    n_sources: int,
) -> tuple[ReconstructionSums, TopTokens, Int[Tensor, "n_sources d_sae"]]:
    """Sums, top tokens, and tokens on which each latent is active, by source."""
    d_sae = crosscoder.cfg.d_sae
    top = TopTokens.empty(n=n_examples, d_sae=d_sae, device=pair.device)
    active = torch.zeros(n_sources, d_sae, dtype=torch.int64, device=pair.device)
    sums: ReconstructionSums | None = None
    n_seen = 0
    for part, activations in harvested:
        mask = part.mask.to(activations.device)
        positions = n_seen + mask.flatten().nonzero().squeeze(-1)
        source_ids = part.source_ids.to(mask.device)[mask]
        n_seen += part.tokens.numel()
        # Few rows at a time: codes are [rows, d_sae].
        parts = zip(
            *(t.split(N_ROWS) for t in (activations[mask], positions, source_ids)), strict=True
        )
        for x, where, sources in parts:
            codes = crosscoder.encode(x)
            batch = ReconstructionSums.of(x, codes, crosscoder, class_ids)
            sums = batch if sums is None else sums + batch
            top = top.update(codes, where)
            for i in sources.unique().tolist():
                active[i] += (codes[sources == i] > 0).sum(dim=0)
    if sums is None:
        raise ValueError("there are no contexts to measure on: the text is empty.")
    return sums, top, active


def check_sites(pair: ModelPair, crosscoder: Crosscoder) -> None:
    """Refuse a pair whose hook points or widths are not those of the crosscoder."""
    theirs = [(s.name, s.hook_name, s.d_model) for s in crosscoder.sites]
    ours = [(s.name, s.hook_name, s.d_model) for s in pair.sites]
    if theirs != ours:
        raise ValueError(
            f"the crosscoder was trained on the sites {theirs}, but the pair has {ours}. Load the "
            "models with the hook point that the dictionary's cfg.json names."
        )


def _normalised_decoders(crosscoder: Crosscoder) -> tuple[Tensor, Tensor]:
    """First and last site's decoder in the normalised space; see `scaled_decoder_norms`."""
    rows = split_sites(crosscoder.W_dec.detach(), crosscoder.sites)
    return rows[0] * crosscoder.sites[0].scale, rows[-1] * crosscoder.sites[-1].scale


def _summary(latent: int, latents: LatentMeasures, found: list[Example]) -> LatentSummary:
    return LatentSummary(
        latent=latent,
        relative_decoder_norm=latents.relative_decoder_norm[latent].item(),
        delta_norm=latents.delta_norm[latent].item(),
        decoder_cosine=latents.decoder_cosine[latent].item(),
        latent_class=LATENT_CLASSES[int(latents.class_ids[latent])],
        n_active=int(latents.n_active[latent]),
        examples=found,
    )


def _without_nan(value: Any) -> Any:
    """NaN as null: it is not JSON."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
