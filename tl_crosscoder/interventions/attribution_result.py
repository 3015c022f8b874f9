"""`Attribution`: what each latent, the dictionary's error and its bias carry of a change, in nats.

Contract: nats are signed so that what carries the change has the sign of `change`; by role and
latent `[n_roles, d_sae]`, by passage and latent as sparse rows, by context and term `[4, n]`; and
the text that they were computed on. `residual` is what the quadrature leaves. Limit: sums over the
text; what a latent carries of it says nothing about other text.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.files import ATTRIBUTION_NAMES
from tl_crosscoder.results.measures import spoken
from tl_crosscoder.results.render import Section, as_html, as_text
from tl_crosscoder.results.tables import without_nan

TERMS = {
    "latents": "latents",
    "error": "what the dictionary leaves out",
    "bias": "biases",
    "masked": "tokens without codes",
}
"""Where the change comes from; the latents' term is the sum over latents."""


@dataclass(frozen=True, kw_only=True)
class MeasuredText:
    """Which text something was computed on."""

    n_contexts: int
    n_predicted: int
    """Predictions that were explained."""
    sources: tuple[str, ...]
    sha256: str
    """Of the token ids."""
    part: str = "given"
    """Which documents of the text: `for ranking` is the half that tests do not use."""


@dataclass(frozen=True, kw_only=True)
class AttributedLatent:
    """What one latent carries."""

    place: int
    latent: int
    attribution: float
    """Nats over the text, of the sign of the change where the latent carries it."""
    attribution_share: float
    """Share of the change; shares of all terms add up to 1, up to the residual."""
    cumulative_share: float
    """Share of this latent and of all before it."""
    n_contexts: int
    """Contexts of the text in which it has a part."""
    main_role: str
    """Role of the tokens where most of it is, or `mixed`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Attribution:
    """The change shared out; see `attribution.attribution`."""

    by_role: Float[Tensor, "n_roles d_sae"]
    """Nats of each latent at tokens of each of `ROLES`, float64."""
    spans: Int[Tensor, "n_passages 3"]
    """Of each passage its context, and the first and the last position plus one that it predicts;
    see `passages`."""
    offsets: Int[Tensor, " n_passages_plus_1"]
    """Passage i owns the entries `offsets[i] : offsets[i + 1]` of the next two."""
    passage_latents: Int[Tensor, " nnz"]
    passage_values: Float[Tensor, " nnz"]
    """Nats of a latent in a passage, summed over its tokens, float32."""
    terms: Float[Tensor, "n_terms n_contexts"]
    """Nats of each of `TERMS` in each context, float64."""
    tokens: Float[Tensor, "n_contexts pos"] | None = None
    """Nats of all latents at each token, where they were kept."""
    effect: str
    """What changed, such as `predictions of response tokens`."""
    unit: str
    compared: tuple[str, str]
    """Names of the sites that stand for base and fine-tuned."""
    hook_name: str
    n_steps: int
    at_base: bool
    """Gradients of the base's activation alone: the terms do not add up to the change."""
    start: float
    """The goal where the fine-tuned model goes on from the base's activation, over the text."""
    end: float
    """The goal in the fine-tuned model."""
    text: MeasuredText

    @property
    def latents(self) -> Float[Tensor, " d_sae"]:
        """Nats of each latent over the text."""
        return self.by_role.sum(dim=0)

    @property
    def change(self) -> float:
        """What is shared out: the fall of KL, which ends at 0, or the rise of a log-probability."""
        return self.start - self.end if self.unit == KL_UNIT else self.end - self.start

    @property
    def totals(self) -> dict[str, float]:
        """Nats of each of `TERMS` over the text."""
        return dict(zip(TERMS, self.terms.sum(dim=1).tolist(), strict=True))

    @property
    def residual(self) -> float:
        """Change minus the sum of all terms: the error of the quadrature."""
        return self.change - sum(self.totals.values())

    def ranking(self, n: int | None = None) -> list[int]:
        """Latents in falling order of what they carry of the change; those without a part are out.

        The last ones may work against it.
        """
        carried = self.latents * (1.0 if self.change >= 0 else -1.0)
        order = carried.sort(descending=True, stable=True).indices
        return order[carried[order] != 0][:n].tolist()

    def rows(self, n: int | None = 10) -> list[AttributedLatent]:
        """The first latents of the ranking."""
        latents, found, before = self.latents, [], 0.0
        contexts = torch.repeat_interleave(self.spans[:, 0], self.offsets.diff())
        pairs = torch.stack([contexts, self.passage_latents.long()]).unique(dim=1)
        n_contexts = torch.bincount(pairs[1], minlength=len(latents))
        for place, j in enumerate(self.ranking(n), 1):
            own, before = latents[j].item(), before + latents[j].item()
            found.append(
                AttributedLatent(
                    place=place,
                    latent=j,
                    attribution=own,
                    attribution_share=self.share(own),
                    cumulative_share=self.share(before),
                    n_contexts=int(n_contexts[j]),
                    main_role=_main_role(self.by_role[:, j]),
                )
            )
        return found

    def share(self, nats: float) -> float:
        """Share of the change; NaN where nothing changed."""
        return nats / self.change if self.change else float("nan")

    def of_contexts(
        self, latents: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n_contexts n"]:
        """Nats of some latents in each context, or of all, as a matrix."""
        passages = self.of_passages(latents)
        found = torch.zeros(self.terms.shape[1], passages.shape[1])
        return found.index_add_(0, self.spans[:, 0], passages)

    def of_passages(
        self, latents: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n_passages n"]:
        """Nats of some latents in each passage, or of all, as a matrix."""
        d_sae = self.by_role.shape[1]
        chosen = torch.arange(d_sae) if latents is None else latents
        place = torch.full((d_sae,), -1)
        place[chosen] = torch.arange(len(chosen))
        rows = torch.repeat_interleave(torch.arange(len(self.spans)), self.offsets.diff())
        columns = place[self.passage_latents.long()]
        found = torch.zeros(len(self.spans), len(chosen))
        found[rows[columns >= 0], columns[columns >= 0]] = self.passage_values[columns >= 0]
        return found

    def sections(self, *, n: int = 10) -> list[Section]:
        """One line of how the change is shared out, and the first latents."""
        names = [f.name for f in fields(AttributedLatent)]
        rows = self.rows(n)
        if not rows:
            return [Section(title=self.line())]
        columns = {name: [getattr(row, name) for row in rows] for name in names}
        note = (
            f"Integrated gradients at {self.n_steps} points between both activations at "
            f"{self.hook_name}."
            if not self.at_base
            else f"Gradient at the base's activation at {self.hook_name}: terms need not add up."
        )
        return [Section(title=self.line(), columns=columns, notes=[note])]

    def line(self) -> str:
        """Completeness in one sentence."""
        base, finetuned = map(spoken, self.compared)
        per_token = self.change / max(1, self.text.n_predicted)
        about = (
            f"{self.effect[:1].upper()}{self.effect[1:]}: the {base} model's activation changes "
            f"what the {finetuned} model says by {self.change:.4g} nats ({per_token:.3g} a "
            f"prediction, {self.text.n_contexts:,} contexts)"
        )
        if not self.change:
            return f"{about}: there is nothing to share out."
        parts = ", ".join(f"{TERMS[k]} {self.share(v):.1%}" for k, v in self.totals.items())
        return f"{about}: {parts}, residual {self.share(self.residual):+.1%}."

    def __str__(self) -> str:
        return as_text(self.sections())

    def _repr_html_(self) -> str:
        return as_html(self.sections())

    # --- files -----------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write `attribution.safetensors`, and then `attribution.json` with its hash."""
        folder = files.user_path(folder)
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        files.write_tensors(folder / ATTRIBUTION_NAMES[1], tensors)
        content = {
            **{n: value for n, value in own.items() if n not in tensors and n != "tokens"},
            "text": asdict(self.text),
            "change": self.change,
            "terms": self.totals,
            "residual": self.residual,
            "rows": [asdict(row) for row in self.rows(100)],
            "sha256": files.sha256(folder / ATTRIBUTION_NAMES[1]),
        }
        files.write_json(folder / ATTRIBUTION_NAMES[0], without_nan(content))
        return folder / ATTRIBUTION_NAMES[0]

    @classmethod
    def load(cls, folder: str | Path) -> "Attribution":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: the folder holds no attribution.
            ValueError: it is damaged, or of another version.
        """
        folder = files.user_path(folder)
        paths = [folder / name for name in ATTRIBUTION_NAMES]
        again = "Compute it again with `tl-crosscoder attribute`."
        if not all(path.is_file() for path in paths):
            raise FileNotFoundError(f"{folder} holds no attribution of latents. {again}")
        content, tensors = files.read_object(paths[0]), files.read_tensors(paths[1])
        if content.get("sha256") != files.sha256(paths[1]):
            raise ValueError(
                f"{paths[1]} is damaged: its sha256 is not the one in {paths[0].name}. {again}"
            )
        names = {f.name for f in fields(cls)} - {"text", "compared"}
        own: Mapping[str, Any] = {n: v for n, v in content.items() if n in names} | tensors
        try:
            text = content["text"] | {"sources": tuple(content["text"]["sources"])}
            return cls(
                **own, compared=tuple(content["compared"]), text=MeasuredText(**text)
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder} holds an attribution of another version ({error}). {again}"
            ) from error


def measured_text(text: TokenizedText, *, n_predicted: int, part: str) -> MeasuredText:
    """What is recorded of a text."""
    ids = text.tokens.int().contiguous().numpy().tobytes()
    return MeasuredText(
        n_contexts=len(text),
        n_predicted=n_predicted,
        sources=text.sources,
        sha256=hashlib.sha256(ids).hexdigest(),
        part=part,
    )


KL_UNIT = "KL, nats"
"""Unit of a goal that falls to 0; of the others it rises or falls."""


def _main_role(by_role: Float[Tensor, " n_roles"]) -> str:
    sizes = by_role.abs()
    share, role = (sizes / sizes.sum()).max(dim=0)
    return ROLES[int(role)] if share > 0.5 else "mixed"
