"""`measure`: run the models over a held-out text once, and everything that this pass tells.

Contract: every crosscoder collects sums, counts and its most active tokens while activations are
computed batch by batch; nothing of size [tokens, d_sae] is kept. A `Measurement` is saved as JSON
with one safetensors file beside it, and loads without the models. Limits: codes of `N_ROWS` tokens
at a time are dense; two sites are compared; nothing is causal, see `interventions`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.analysis.examples import (
    CollectedExamples,
    Example,
    ExampleCollector,
    ExampleSettings,
    TopTokens,
    examples,
)
from tl_crosscoder.analysis.firing import FiringSums
from tl_crosscoder.analysis.geometry import LATENT_CLASSES, latent_class_ids, norm_measures
from tl_crosscoder.analysis.latent_scaling import ScalingSums
from tl_crosscoder.analysis.latents import UNRANKED, LatentMeasures, RankedLatent, rank_latents
from tl_crosscoder.analysis.reconstruction import Reconstruction, ReconstructionSums
from tl_crosscoder.crosscoder.crosscoder import N_ROWS, Crosscoder, sparse_codes
from tl_crosscoder.crosscoder.site_views import check_source
from tl_crosscoder.data.harvest import Harvested, harvest
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.files import ANALYSIS_NAMES
from tl_crosscoder.mesh import ALONE, Axis
from tl_crosscoder.models.site import site_parts
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.results.measures import DIRECTIONS, MEASURES, ORDERS, spoken
from tl_crosscoder.results.render import Section, as_html
from tl_crosscoder.results.tables import without_nan


@dataclass(frozen=True, kw_only=True)
class LatentSummary:
    """A ranked latent with tokens in context, ready to print."""

    ranked: RankedLatent
    examples: list[Example]

    @property
    def latent(self) -> int:
        """Index in the dictionary."""
        return self.ranked.latent


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one pass over a text tells about a crosscoder and its models."""

    reconstruction: Reconstruction
    latents: LatentMeasures
    top: list[LatentSummary]
    """The latents most likely to be the fine-tune's, most first; see `rank_latents`."""
    order: str
    """What the latents in `top` are ranked by."""
    top_tokens: TopTokens
    """Most active tokens of every latent, as positions in the measured text."""
    sources: tuple[str, ...]
    compared: tuple[str, str] | None = ("base", "finetuned")
    """Names of the sites that norms, classes and the difference compare; None of a single site."""
    collected: CollectedExamples | None = field(default=None, repr=False, compare=False)
    """All examples, for `ExampleDatabase.write`; None of a measurement that was loaded."""

    @property
    def class_counts(self) -> dict[str, int]:
        """Active latents of each class."""
        active = self.latents.class_ids[self.latents.n_active > 0].tolist()
        counts = Counter(LATENT_CLASSES[i] for i in active)
        return {name: counts[name] for name in LATENT_CLASSES}

    def sections(self, *, n_examples: int = 1) -> list[Section]:
        """Tables of reconstruction, classes, Latent Scaling and the ranked latents."""
        n_latents, n_tokens = len(self.latents.n_active), self.reconstruction.n_tokens
        parts = [self._whole(f"{n_latents:,} latents on {n_tokens:,} held-out tokens")]
        if self.compared is not None:
            parts.append(self._classes())
        is_active = self.latents.n_active > 0
        if self.latents.scaling and bool(is_active.any()):
            parts.append(self._scaling(is_active))
        return [*parts, self._ranked(n_examples)]

    def _whole(self, title: str) -> Section:
        r, notes = self.reconstruction, []
        if self.compared not in (None, ("base", "finetuned")):
            base, finetuned = self.compared
            notes.append(
                f"Difference, R and classes compare {finetuned} (as finetuned) with {base} (as "
                "base)."
            )
        is_of_one_width = r.difference_share is not None or any(map(math.isnan, r.fve.values()))
        if self.compared and not is_of_one_width:
            notes.append("The sites differ in width: there is no difference to explain.")
        elif self.compared and r.difference_fve is None:
            notes.append("The models are equal at this hook: there is no difference to explain.")
        if constant := [site for site, fve in r.fve.items() if math.isnan(fve)]:
            notes.append(
                f"At {_listed(constant)} the activation is the same at all of these tokens: there "
                "is no variance to explain."
            )
        if worse := [site for site, fve in r.fve.items() if fve < 0]:
            notes.append(
                f"At {_listed(worse)} the FVE is below 0: the mean activation is nearer than the "
                "reconstruction. The dictionary is of other activations, or its training failed: "
                "no number below means anything."
            )
        columns = {f"FVE {site}": [fve] for site, fve in r.fve.items()}
        names = ("difference_fve", "difference_share", "l0", "dead_share")
        columns |= {n: [getattr(r, n)] for n in names if getattr(r, n) is not None}
        return Section(title=title, columns=columns, notes=notes)

    def _classes(self) -> Section:
        counts, by_class = self.class_counts, self.reconstruction.difference_fve_by_class
        columns = {"latent_class": [*counts], "n_active_latents": [*counts.values()]}
        if by_class:
            explained = [by_class.get(name) if n else None for name, n in counts.items()]
            columns |= {"difference_fve_by_class": explained}
        return Section(columns=columns)

    def _scaling(self, is_active: Bool[Tensor, " d_sae"]) -> Section:
        scaling, kinds = self.latents.scaling, ("error", "reconstruction")
        medians = {
            f"median |nu {kind}|": [
                getattr(table, f"nu_{kind}")[is_active].abs().nanmedian().item()
                for table in scaling.values()
            ]
            for kind in kinds
        }
        names = [DIRECTIONS.get(name, name) for name in scaling]
        n_specific = [int(table.is_specific.sum()) for table in scaling.values()]
        measure = MEASURES["is_specific"]
        note = f"specific: {measure.meaning} Source: {measure.source}."
        columns = {"Latent Scaling": names, "is_specific": n_specific, **medians}
        return Section(columns=columns, notes=[note])

    def _ranked(self, n_examples: int) -> Section:
        if not self.top:
            return Section(title=UNRANKED)
        title = f"The {len(self.top)} latents that are active on most tokens"
        if self.order != "activity" and self.compared is not None:
            finetuned = spoken(self.compared[1])
            whose = "the fine-tune" if finetuned == "fine-tuned" else finetuned
            title = (
                f"The {len(self.top)} latents most likely to be specific to {whose}, by "
                f"{ORDERS[self.order]} (R: 1 = {finetuned} only; nu: 0 = not in the other model)"
            )
        names = ("place", "latent", "explained_difference", "relative_decoder_norm", "nu_error",
                 "nu_reconstruction", "decoder_cosine", "latent_class", "active_share")  # fmt: skip
        columns = {name: [getattr(s.ranked, name) for s in self.top] for name in names}
        examples = [s.examples[:n_examples] for s in self.top]
        return Section(title=title, columns=columns, examples=examples)

    def _repr_html_(self) -> str:
        return as_html(self.sections())

    def save(self, folder: str | Path) -> Path:
        """Write `analysis.safetensors`, and then `analysis.json` with its hash."""
        folder = files.user_path(folder)
        tensors = self.latents.tensors() | {
            f"top_tokens.{k}": v for k, v in vars(self.top_tokens).items()
        }
        files.write_tensors(folder / ANALYSIS_NAMES[1], tensors)
        content = {
            "reconstruction": asdict(self.reconstruction),
            "latents_per_class": self.class_counts,
            "sources": list(self.sources),
            "compared": self.compared and list(self.compared),
            "order": self.order,
            "top": [asdict(s) for s in self.top],
            "facts": {name: table.facts() for name, table in self.latents.tables().items()},
            "sha256": files.sha256(folder / ANALYSIS_NAMES[1]),
        }
        files.write_json(folder / ANALYSIS_NAMES[0], without_nan(content))
        return folder / ANALYSIS_NAMES[0]

    @classmethod
    def load(cls, folder: str | Path) -> "Measurement":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: the folder holds no measures.
            ValueError: they are damaged, or of an earlier version.
        """
        folder = files.user_path(folder)
        paths = [folder / name for name in ANALYSIS_NAMES]
        if not all(p.is_file() for p in paths):
            raise FileNotFoundError(
                f"{folder} holds no measures ({', '.join(ANALYSIS_NAMES)}). Measure it "
                "again with `tl-crosscoder analyze --fresh`."
            )
        content, tensors = files.read_object(paths[0]), files.read_tensors(paths[1])
        # Those that an earlier version wrote have no hash.
        if content.get("sha256", sha256 := files.sha256(paths[1])) != sha256:
            raise ValueError(
                f"{paths[1]} is damaged: its sha256 is not the one in {paths[0].name}. Measure it "
                "again with `tl-crosscoder analyze --fresh`."
            )
        try:
            top_tokens = {k: tensors.pop(f"top_tokens.{k}") for k in ("values", "positions")}
            fve = content["reconstruction"].pop("fve")
            return cls(
                reconstruction=Reconstruction(fve=_with_nan(fve), **content["reconstruction"]),
                latents=LatentMeasures.from_tensors(tensors, content["facts"]),
                order=content["order"],
                top=[
                    LatentSummary(
                        ranked=RankedLatent(**_with_nan(each["ranked"])),
                        examples=[Example(**e) for e in each["examples"]],
                    )
                    for each in content["top"]
                ],
                top_tokens=TopTokens(**top_tokens),
                sources=tuple(content["sources"]),
                compared=content["compared"] and tuple(content["compared"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{folder} holds measures of an earlier version ({error}). Measure it again with "
                "`tl-crosscoder analyze --fresh`."
            ) from error


def _listed(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))


def _with_nan(values: dict[str, Any]) -> dict[str, Any]:
    """JSON's null as NaN."""
    return {name: math.nan if value is None else value for name, value in values.items()}


@torch.no_grad()
def measure(
    source: ActivationSource,
    crosscoder: Crosscoder,
    text: TokenizedText,
    *,
    n_top: int = 10,
    n_examples: int = 8,
    batch_size: int = 32,
    show_progress: bool = False,
    axis: Axis = ALONE,
) -> Measurement:
    """Run the models over a held-out text once and measure everything.

    Args:
        source: the models that the crosscoder was trained on, as a pair or any other source.
        crosscoder: for raw activations, as `Trainer.fit` and `Crosscoder.load` give it.
        text: text that training has not seen.
        n_top: latents to rank.
        n_examples: tokens in context for each of them.
        batch_size: contexts a forward pass.
        show_progress: with a progress bar.
        axis: processes that share the text out; all find the same.

    Raises:
        ValueError: the source's sites are not those of the crosscoder, or the text is empty or has
            fewer contexts than there are processes.
    """
    how = {"n_top": n_top, "n_examples": n_examples, "batch_size": batch_size, "axis": axis}
    return measure_all(source, [crosscoder], text, show_progress=show_progress, **how)[0]


@torch.no_grad()
def measure_all(
    source: ActivationSource,
    crosscoders: Sequence[Crosscoder],
    text: TokenizedText,
    *,
    n_top: int = 10,
    n_examples: int = 8,
    batch_size: int = 32,
    show_progress: bool = False,
    axis: Axis = ALONE,
) -> list[Measurement]:
    """`measure` of several crosscoders in one pass of the models."""
    passes = [_Pass(source, c, text, n_examples=n_examples) for c in crosscoders]
    description = "Measuring" if show_progress else None
    if not len(text):
        raise ValueError("there are no contexts to measure on: the text is empty.")
    how = {"batch_size": batch_size, "axis": axis}
    for part in harvest(source, text, description=description, **how):
        for one in passes:
            one.add(part)
    for one in passes:
        one.gather(axis)
    return [one.result(n_top) for one in passes]


class _Pass:
    """What one crosscoder collects while the models run over a text."""

    def __init__(
        self,
        source: ActivationSource,
        crosscoder: Crosscoder,
        text: TokenizedText,
        *,
        n_examples: int,
    ) -> None:
        check_source(source, crosscoder)
        self._crosscoder, self._text, self._tokenizer = crosscoder, text, source.tokenizer
        self._n_examples = n_examples
        device, d_sae = crosscoder.W_dec.device, crosscoder.cfg.d_sae
        # A difference is one site, with nothing to compare.
        self._pair = pair = None if source.is_difference else source.compared
        self._norms = norm_measures(crosscoder, self._pair)
        self._examples = ExampleCollector(
            d_sae,
            context_size=text.context_size,
            settings=ExampleSettings(n_top=max(n_examples, ExampleSettings.n_top)),
            device=device,
        )
        self._firing = FiringSums(n_sources=len(text.sources), d_sae=d_sae, device=device)
        class_ids = latent_class_ids(self._norms["delta_norm"])
        is_of_one_width = pair and len({crosscoder.sites[i].d_model for i in pair}) == 1
        of_one_width = pair if is_of_one_width else None
        self._reconstruction = ReconstructionSums(crosscoder, class_ids, pair=of_one_width)
        self._scaling = ScalingSums(crosscoder, pair=of_one_width) if of_one_width else None

    def add(self, part: Harvested) -> None:
        """Take whole contexts into account, a few at a time so that their dense codes fit."""
        for piece in part.split(N_ROWS):
            x = piece.rows
            codes = sparse_codes(self._crosscoder, x)
            self._reconstruction.add(x, codes)
            self._examples.add(codes, piece.positions(self._text.context_size).to(x.device))
            self._firing.add(codes, piece.text)
            if self._scaling is not None:
                self._scaling.add(site_parts(x, self._crosscoder.sites), codes)

    def gather(self, axis: Axis) -> None:
        """Put together what several processes have taken into account."""
        for sums in (self._reconstruction, self._examples, self._firing, self._scaling):
            if sums is not None:
                sums.gather(axis)

    def result(self, n_top: int) -> Measurement:
        """Divide, and rank."""
        latents = LatentMeasures(
            firing=self._firing.result(self._text.sources),
            scaling=self._scaling.result() if self._scaling else {},
            difference=self._scaling.difference_by_latent() if self._scaling else None,
            **self._norms,
        )
        ranking = rank_latents(latents, n=n_top)
        collected = self._examples.result()
        top = TopTokens.of(collected, n=self._n_examples)
        names = [site.name for site in self._crosscoder.sites]
        return Measurement(
            reconstruction=self._reconstruction.result(),
            latents=latents,
            order=ranking.order,
            top=[
                LatentSummary(
                    ranked=row, examples=examples(top, row.latent, self._text, self._tokenizer)
                )
                for row in ranking.rows
            ],
            top_tokens=top,
            collected=collected,
            sources=self._text.sources,
            compared=self._pair and (names[self._pair[0]], names[self._pair[1]]),
        )
