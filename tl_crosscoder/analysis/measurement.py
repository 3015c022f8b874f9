"""`Measurement`: everything that one pass over a text tells about a crosscoder and its models.

One number per latent and measure, the classes, the reconstruction of all sites and of the
difference, and the top tokens. It is saved as JSON with one safetensors file beside it, and loads
without the models. Of several sites two are compared, see `site.compared_sites`. Limit: nothing
causal; see `interventions`.
"""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tl_crosscoder import files
from tl_crosscoder.analysis.decoder_norms import LATENT_CLASSES
from tl_crosscoder.analysis.example_collector import CollectedExamples
from tl_crosscoder.analysis.latent_measures import LatentMeasures
from tl_crosscoder.analysis.max_activating import Example, TopTokens
from tl_crosscoder.analysis.ranking import RankedLatent
from tl_crosscoder.analysis.reconstruction import Reconstruction
from tl_crosscoder.tables import without_nan


@dataclass(frozen=True, kw_only=True)
class LatentSummary:
    """A ranked latent with tokens in context, ready to print."""

    ranked: RankedLatent
    examples: list[Example]

    @property
    def latent(self) -> int:
        """Its number."""
        return self.ranked.latent

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LatentSummary":
        """From JSON, where NaN is null."""
        fields: dict[str, Any] = {
            k: math.nan if v is None else v for k, v in values["ranked"].items()
        }
        return cls(
            ranked=RankedLatent(**fields), examples=[Example(**e) for e in values["examples"]]
        )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a crosscoder says about its models on a text."""

    reconstruction: Reconstruction
    latents: LatentMeasures
    top: list[LatentSummary]
    """The latents most likely to be the fine-tune's, most first; see `ranking.rank_latents`."""
    order: str
    """What they are ranked by."""
    top_tokens: TopTokens
    """Most active tokens of every latent, as positions in the measured text."""
    sources: tuple[str, ...]
    compared: tuple[str, str] | None = ("base", "finetuned")
    """Names of the sites that norms, classes and the difference compare; None of a single site."""
    collected: CollectedExamples | None = field(default=None, repr=False, compare=False)
    """All examples, for `ExampleDatabase.write`; None of a measurement that was loaded."""

    @property
    def class_counts(self) -> dict[str, int]:
        """Living latents of each class."""
        alive = self.latents.class_ids[self.latents.n_active > 0].tolist()
        counts = Counter(LATENT_CLASSES[i] for i in alive)
        return {name: counts[name] for name in LATENT_CLASSES}

    def _repr_html_(self) -> str:
        from tl_crosscoder.html_results import measurement_html

        return measurement_html(self)

    def save(self, folder: str | Path) -> Path:
        """Write `analysis.json` and `analysis.safetensors`."""
        folder = Path(folder)
        tensors = self.latents.tensors() | {
            f"top_tokens.{k}": v for k, v in vars(self.top_tokens).items()
        }
        files.write_tensors(folder / "analysis.safetensors", tensors)
        content = {
            "reconstruction": asdict(self.reconstruction),
            "latents_per_class": self.class_counts,
            "sources": list(self.sources),
            "compared": self.compared and list(self.compared),
            "order": self.order,
            "top": [asdict(s) for s in self.top],
            "facts": self.latents.facts(),
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
            latents=LatentMeasures.from_tensors(tensors, content["facts"]),
            order=content["order"],
            top=[LatentSummary.from_dict(s) for s in content["top"]],
            top_tokens=TopTokens(**top_tokens),
            sources=tuple(content["sources"]),
            compared=compared and tuple(compared),
        )
