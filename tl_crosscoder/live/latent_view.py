"""One latent to look at, and the latents whose examples hold a text.

Contract: what `tl-crosscoder analyze --latent` and `--search` print, as values with an HTML form.
Limit: examples are those in the run's `examples.sqlite`, which is made where there is none, and the
effect on the logits needs the models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tl_crosscoder.activations.roles import ROLES
from tl_crosscoder.analysis.example_database import StoredExample
from tl_crosscoder.analysis.firing import Firing
from tl_crosscoder.analysis.latent_measures import LatentMeasures
from tl_crosscoder.analysis.lens import LogitEffects, logit_effect
from tl_crosscoder.analysis.patchscope import Patchscope, patchscope
from tl_crosscoder.analysis.ranking import RankedLatent, in_order
from tl_crosscoder.html_results import in_context
from tl_crosscoder.html_tables import box, heading, note, table
from tl_crosscoder.interventions.subject import Subject
from tl_crosscoder.run_examples import run_examples
from tl_crosscoder.run_folder import RunFolder
from tl_crosscoder.tables import TableOfRows
from tl_crosscoder.visualize.analysis_tables import one_latent
from tl_crosscoder.visualize.circuits_html import TokensHtml
from tl_crosscoder.visualize.token_panels import colored_tokens

N_TOP, N_OF_QUANTILE = 5, 1
"""Examples shown: with the largest codes, and of each quantile."""
_MEASURES = ("relative_decoder_norm", "delta_norm", "decoder_cosine", "nu_error",
             "nu_reconstruction", "difference_alone", "difference_lost_without", "latent_class",
             "n_active", "active_share", "template_share")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LatentView:
    """A latent with all that is known of it."""

    measures: RankedLatent
    """Its norms, scaling and firing; `place` has no meaning here."""
    latents: LatentMeasures
    """Those of all latents."""
    stored: tuple[StoredExample, ...]
    """All examples: the largest codes, then those of each quantile."""
    effects: LogitEffects
    """Tokens that it promotes and suppresses."""
    scope: Patchscope
    """Tokens that a model names when its decoder row stands in place of an activation."""

    @classmethod
    def of(cls, run: RunFolder, subject: Subject, latent: int, *, n: int = 8) -> "LatentView":
        """Collect it; n tokens of each kind.

        Raises:
            ValueError: a latent that does not exist.
            FileNotFoundError: the run keeps neither examples nor text.
        """
        subject.latents([latent])
        measured = run.measurement().latents
        with run_examples(run) as database:
            stored = database.latent(latent)
        # A latent of the base alone has no row in the fine-tuned model to be named.
        at = subject.finetuned
        if not subject.decoder(at)[latent].any():
            at = subject.base
        row, site = subject.decoder(at)[[latent]], subject.site_name(at)
        (measures,) = in_order(measured, [latent], order="chosen").rows
        return cls(
            measures=measures,
            latents=measured,
            stored=tuple(stored),
            effects=logit_effect(run.models, run.crosscoder, [latent], n=n),
            scope=patchscope(subject.models, row, site=site, n=n),
        )

    @property
    def latent(self) -> int:
        """Its number."""
        return self.measures.latent

    def examples(self) -> TokensHtml:
        """The strongest examples and one of each quantile, coloured on one scale."""
        top = [e for e in self.stored if e.kind == "top"][:N_TOP]
        rest = [e for e in self.stored if e.kind != "top" and e.rank < N_OF_QUANTILE]
        bound = max((v for e in self.stored for v in e.activations), default=None)
        panels = [
            colored_tokens(e.tokens, e.activations, heading=_example_heading(e), bound=bound)
            for e in (*top, *rest)
        ]
        return TokensHtml(panels=tuple(panels))

    def __repr__(self) -> str:
        return one_latent(self.measures, self.latents, self.stored, self.effects, self.scope)

    def _repr_html_(self) -> str:
        firing = self.latents.firing
        parts = [
            heading(f"Latent {self.latent}"),
            table({name: [getattr(self.measures, name)] for name in _MEASURES}),
            table(_by_role(firing, self.latent)),
            heading("Direct effect on the next token's logits"),
            table(_effects(self.effects)),
            note(f"Patchscope of its {self.scope.site} row, by multiples of the stream's norm"),
            table(_scope(self.scope)),
            heading("Examples" if self.stored else "No examples: silent on the measured text"),
        ]
        return box(*parts) + (self.examples()._repr_html_() if self.stored else "")


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A latent with a text among its examples."""

    latent: int
    relative_decoder_norm: float
    latent_class: str
    n_on_token: int
    """Examples where the text lies on the token itself."""
    n_near: int
    """Those with the text in their window."""
    n_examples: int
    before: str
    token: str
    """That of the strongest such example."""
    after: str


@dataclass(frozen=True, kw_only=True)
class Hits(TableOfRows):
    """What a search found: latents that are active on the text first, then near it."""

    ROW: ClassVar[type] = Hit
    rows: tuple[Hit, ...]
    text: str

    @property
    def latents(self) -> list[int]:
        """Their numbers."""
        return [row.latent for row in self.rows]

    def _repr_html_(self) -> str:
        columns = self.columns()
        around = [columns.pop(name) for name in ("before", "token", "after")]
        examples: list[Any] = [in_context(*each) for each in zip(*around, strict=True)]
        said = f"Latents with {self.text!r} among their examples"
        return box(note(said), table(columns | {"example": examples}))


def search(run: RunFolder, text: str, *, n: int = 20) -> Hits:
    """Latents whose examples contain a text, in any case.

    Raises:
        ValueError: an empty text.
        FileNotFoundError: the run keeps neither examples nor text.
    """
    with run_examples(run) as database:
        found = database.search(text, n=n)
    ranked = in_order(run.measurement().latents, [hit.latent for hit in found], order="chosen")
    rows = [
        Hit(
            latent=hit.latent,
            relative_decoder_norm=row.relative_decoder_norm,
            latent_class=row.latent_class,
            n_on_token=hit.n_on_token,
            n_near=hit.n_matching,
            n_examples=hit.n_tokens,
            before=hit.example.before,
            token=hit.example.token,
            after=hit.example.after,
        )
        for hit, row in zip(found, ranked.rows, strict=True)
    ]
    return Hits(rows=tuple(rows), text=text)


def _example_heading(example: StoredExample) -> str:
    what = "" if example.quantile is None else f", quantile {example.quantile + 1}"
    return f"{example.value:.2f}{what} ({example.source}, {example.role})"


def _by_role(firing: Firing, latent: int) -> dict[str, list[Any]]:
    """Share of the tokens of each role and source on which it fires."""
    names = [*ROLES, *(f"source {name}" for name in firing.sources)]
    counts = torch.cat([firing.n_active_by_role, firing.n_active_by_source])[:, latent].tolist()
    sizes = [*firing.tokens_by_role, *firing.tokens_by_source]
    seen = [(name, int(n), of) for name, n, of in zip(names, counts, sizes, strict=True) if of]
    return {
        "fires on": [name for name, _, _ in seen],
        "active_share": [n / of for _, n, of in seen],
        "n_active": [n for _, n, _ in seen],
        "of": [of for _, _, of in seen],
    }


def _effects(effects: LogitEffects) -> dict[str, Sequence[str]]:
    names = [*dict.fromkeys(row.direction for row in effects.rows)]
    columns: dict[str, Sequence[str]] = {"direction": names}
    for is_promoted, name in ((True, "promotes"), (False, "suppresses")):
        own = [r for r in effects.rows if r.is_promoted == is_promoted]
        columns[name] = [_quoted(r.token for r in own if r.direction == d) for d in names]
    return columns


def _scope(scope: Patchscope) -> dict[str, Sequence[Any]]:
    scales = [*dict.fromkeys(row.scale for row in scope.rows)]
    tokens = [_quoted(row.token for row in scope.rows if row.scale == s) for s in scales]
    return {"multiple": [f"{s:g}" for s in scales], "tokens": tokens}


def _quoted(tokens: Any) -> str:
    return ", ".join(map(repr, tokens))
