"""`Measurement`: everything that one pass over a text tells about a crosscoder and its models.

One number per latent and measure, the classes, the reconstruction of all sites and of the
difference, and the top tokens. It is saved as JSON with one safetensors file beside it, and loads
without the models. Of several sites two are compared, see `site.compared_sites`. Limit: ranks
latents by norm and firing alone; nothing causal.
"""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.analysis.decoder_norms import LATENT_CLASSES, latent_class_ids
from tl_crosscoder.analysis.firing import Firing
from tl_crosscoder.analysis.latent_scaling import DifferenceByLatent, LatentScaling
from tl_crosscoder.analysis.max_activating import Example, TopTokens
from tl_crosscoder.analysis.reconstruction import Reconstruction
from tl_crosscoder.tables import TableOfColumns, without_nan

if TYPE_CHECKING:
    import pandas as pd

NORMS = ("relative_decoder_norm", "delta_norm", "decoder_cosine", "encoder_cosine")

MIN_ACTIVE_TOKENS = 10
"""A latent active on fewer held-out tokens is not ranked: its norms were hardly trained."""


@dataclass(frozen=True, kw_only=True)
class LatentMeasures:
    """One value per latent, `[d_sae]`; norms, cosines and class compare two sites.

    NaN where there is only one, and cosines also where they are not of one width.
    """

    relative_decoder_norm: Float[Tensor, " d_sae"]
    delta_norm: Float[Tensor, " d_sae"]
    decoder_cosine: Float[Tensor, " d_sae"]
    encoder_cosine: Float[Tensor, " d_sae"]
    firing: Firing
    scaling: dict[str, LatentScaling] = field(default_factory=dict)
    """By direction: `finetuned`, `base` and the controls; empty where sites differ in width."""
    difference: DifferenceByLatent | None = None
    """What each latent says of x^1 - x^0; None where there is none."""

    @property
    def class_ids(self) -> Int[Tensor, " d_sae"]:
        """Index into `LATENT_CLASSES`."""
        return latent_class_ids(self.delta_norm)

    @property
    def n_active(self) -> Float[Tensor, " d_sae"]:
        """Tokens of the measured text on which the latent is active."""
        return self.firing.n_active

    @property
    def n_active_by_source(self) -> Float[Tensor, "n_sources d_sae"]:
        """The same for each source of the text."""
        return self.firing.n_active_by_source

    def parts(self) -> dict[str, TableOfColumns]:
        """The tables in it, by name."""
        found: dict[str, TableOfColumns] = {"firing": self.firing}
        found |= {f"scaling.{name}": table for name, table in self.scaling.items()}
        return found | ({"difference": self.difference} if self.difference else {})

    def norms(self) -> dict[str, Tensor]:
        """What is read off the weights alone."""
        return {name: getattr(self, name) for name in NORMS}

    def to_frame(self) -> "pd.DataFrame":
        """One row a latent: everything that has been measured of it."""
        import pandas as pd

        columns: dict[str, Any] = {name: t.tolist() for name, t in self.norms().items()}
        columns["class"] = [LATENT_CLASSES[i] for i in self.class_ids.tolist()]
        for name, part in self.parts().items():
            own = part.columns()
            prefix = "" if name == "firing" else f"{name}."
            columns |= {f"{prefix}{column}": values for column, values in own.items()}
        for name, table in self.scaling.items():
            columns[f"scaling.{name}.nu_error"] = table.nu_error.tolist()
            columns[f"scaling.{name}.nu_reconstruction"] = table.nu_reconstruction.tolist()
        frame = pd.DataFrame(columns)
        frame.index.name = "latent"
        return frame


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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LatentSummary":
        """From JSON, where NaN is null."""
        fields: dict[str, Any] = {k: math.nan if v is None else v for k, v in values.items()}
        fields["examples"] = [Example(**e) for e in values["examples"]]
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a crosscoder says about its models on a text."""

    reconstruction: Reconstruction
    latents: LatentMeasures
    top: list[LatentSummary]
    """The latents that lean most to the fine-tune, most first; see `rank`. Of a single site those
    that are active most often."""
    top_tokens: TopTokens
    """Most active tokens of every latent, as positions in the measured text."""
    sources: tuple[str, ...]
    compared: tuple[str, str] | None = ("base", "finetuned")
    """Names of the sites that norms, classes and the difference compare; None of a single site."""

    @property
    def class_counts(self) -> dict[str, int]:
        """Living latents of each class."""
        alive = self.latents.class_ids[self.latents.n_active > 0].tolist()
        counts = Counter(LATENT_CLASSES[i] for i in alive)
        return {name: counts[name] for name in LATENT_CLASSES}

    def save(self, folder: str | Path) -> Path:
        """Write `analysis.json` and `analysis.safetensors`."""
        folder = Path(folder)
        parts = self.latents.parts()
        tensors = self.latents.norms() | {
            f"top_tokens.{k}": v for k, v in vars(self.top_tokens).items()
        }
        for name, part in parts.items():
            tensors |= {f"{name}.{column}": t for column, t in part.tensors().items()}
        files.write_tensors(folder / "analysis.safetensors", tensors)
        content = {
            "reconstruction": asdict(self.reconstruction),
            "latents_per_class": self.class_counts,
            "sources": list(self.sources),
            "compared": self.compared and list(self.compared),
            "top": [asdict(s) for s in self.top],
            "facts": {name: part.facts() for name, part in parts.items()},
        }
        files.write_json(folder / "analysis.json", without_nan(content))
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
        if "facts" not in content:
            raise ValueError(
                f"{folder} holds measures of an earlier version. Measure it again with "
                "`tl-crosscoder analyze --fresh`."
            )
        reconstruction = content["reconstruction"]
        reconstruction["fve"] = {
            site: math.nan if value is None else value
            for site, value in reconstruction["fve"].items()
        }
        compared = content.get("compared", ["base", "finetuned"])
        tensors = load_file(paths[1])
        top_tokens = {k: tensors.pop(f"top_tokens.{k}") for k in ("values", "positions")}
        return cls(
            reconstruction=Reconstruction(**reconstruction),
            latents=_latents(tensors, content["facts"]),
            top=[LatentSummary.from_dict(s) for s in content["top"]],
            top_tokens=TopTokens(**top_tokens),
            sources=tuple(content["sources"]),
            compared=compared and tuple(compared),
        )


def rank(latents: LatentMeasures, *, n: int) -> list[int]:
    """The n latents with the largest relative decoder norm, of those active often enough.

    Of equal norms (latents that write to one site alone) the most active come first.
    """
    norms = latents.relative_decoder_norm.masked_fill(latents.n_active < MIN_ACTIVE_TOKENS, -1)
    by_activity = latents.n_active.sort(descending=True, stable=True).indices
    by_norm = norms.nan_to_num(-1)[by_activity].sort(descending=True, stable=True).indices
    return [i for i in by_activity[by_norm][:n].tolist() if norms[i] >= 0]


def most_active(latents: LatentMeasures, *, n: int) -> list[int]:
    """The n latents that are active on most tokens, of those active often enough."""
    order = latents.n_active.sort(descending=True, stable=True).indices[:n].tolist()
    return [i for i in order if latents.n_active[i] >= MIN_ACTIVE_TOKENS]


def _latents(tensors: dict[str, Tensor], facts: dict[str, Any]) -> LatentMeasures:
    """From one flat set of tensors, where those of a part have its name before theirs."""
    own: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, column = name.rpartition(".")
        own.setdefault(part, {})[column] = tensor
    difference = own.get("difference")
    return LatentMeasures(
        **own[""],
        firing=Firing.from_tensors(own["firing"], facts["firing"]),
        scaling={
            part.removeprefix("scaling."): LatentScaling.from_tensors(columns, facts[part])
            for part, columns in own.items()
            if part.startswith("scaling.")
        },
        difference=None if difference is None else DifferenceByLatent(**difference),
    )
