"""One latent to look at, and the latents whose examples hold a text.

Contract: what `tl-crosscoder analyze --latent` and `--search` print, as values with an HTML form.
Where a run's sites cannot have something, such as an attention head's output an effect on the
logits, a note says so in its place. Limit: examples are those in the run's `examples.sqlite`, which
is made where there is none; the lenses need the models.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from tl_crosscoder.analysis.example_database import StoredExample
from tl_crosscoder.analysis.firing import Firing
from tl_crosscoder.analysis.latents import LatentMeasures, RankedLatent, Ranking, in_order
from tl_crosscoder.analysis.lens import LogitEffects
from tl_crosscoder.analysis.patchscope import Patchscope, patchscope
from tl_crosscoder.crosscoder.site_views import check_source, checked_latents
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.report.circuits import TokensHtml
from tl_crosscoder.report.html.latents import effects_on_logits
from tl_crosscoder.report.token_panels import colored_tokens
from tl_crosscoder.results.measures import ORDERS, spoken
from tl_crosscoder.results.render import Section, as_html, as_text
from tl_crosscoder.results.tables import TableOfRows
from tl_crosscoder.run.run import Run

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

MEASURES_OF_A_LATENT = (
    "score", "relative_decoder_norm", "delta_norm", "latent_class", "nu_error",
    "nu_reconstruction", "decoder_cosine", "explained_difference", "explained_difference_drop",
    "n_active", "active_share", "template_share",
)  # fmt: skip
_BRIEF = (
    "place", "latent", "attribution_share", "score", "relative_decoder_norm", "decoder_cosine",
    "explained_difference", "latent_class", "active_share",
)  # fmt: skip
"""Measures of ranked latents that fit beside an example."""
N_TOP, N_OF_QUANTILE = 5, 1
"""Examples shown: with the largest codes, and of each quantile."""


@dataclass(frozen=True, kw_only=True)
class TopLatents:
    """Latents in an order; shown, each has the token on which it is most active, in context."""

    run: Run = field(repr=False, compare=False)
    ranking: Ranking

    @property
    def latents(self) -> list[int]:
        """Latents in this order."""
        return self.ranking.latents

    @property
    def rows(self) -> tuple[RankedLatent, ...]:
        """Their measures."""
        return self.ranking.rows

    @property
    def order(self) -> str:
        """Name of the order."""
        return self.ranking.order

    def to_frame(self) -> "pd.DataFrame":
        """A row a latent, with all measures."""
        return self.ranking.to_frame()

    def save(self, path: str | Path) -> Path:
        """Write the ranking as `.json` or `.parquet`; `Ranking.load` reads it."""
        return self.ranking.save(path)

    def sections(self) -> list[Section]:
        """A table with a few measures; examples where there are any, or models to find them."""
        columns = self.ranking.columns()
        shown = {name: columns[name] for name in _BRIEF if name in columns}
        return [
            Section(
                title=f"The first {len(self.rows)} latents by {ORDERS[self.order]}",
                columns=shown,
                examples=self._examples(),
                notes=["to_frame() has all measures; latent(j) all of one."],
            )
        ]

    def _examples(self) -> list[list[StoredExample]]:
        if not self.rows:
            return []
        try:
            with self.run.examples() as database:
                return [database.latent(latent, n=1) for latent in self.latents]
        except (OSError, ValueError):  # no examples, and no text or models to collect them
            return []

    def __str__(self) -> str:
        return as_text(self.sections())

    def _repr_html_(self) -> str:
        return as_html(self.sections())


@dataclass(frozen=True, kw_only=True)
class LatentView:
    """A latent with all that is known of it."""

    measures: RankedLatent
    """Its norms, scaling and firing; `place` has no meaning here."""
    latents: LatentMeasures
    """Measures of all latents."""
    stored: tuple[StoredExample, ...]
    """All examples: the largest codes, then those of each quantile."""
    effects: LogitEffects | None
    """Tokens that it promotes and suppresses; None where `missing` says why."""
    scope: Patchscope | None
    """Tokens that a model names when its decoder row stands in place of an activation; likewise."""
    missing: tuple[str, ...] = ()
    """What these models and this hook cannot say, and why."""

    @classmethod
    def of(cls, run: Run, latent: int, *, n: int = 8) -> "LatentView":
        """Collect it; n tokens of each kind.

        Raises:
            ValueError: a latent that does not exist.
            FileNotFoundError: the run keeps neither examples nor text.
        """
        check_source(run.models, run.crosscoder)
        checked_latents([latent], run.crosscoder)
        measured = run.measurement().latents
        with run.examples() as database:
            stored = database.latent(latent)
        (measures,) = in_order(measured, [latent], order="chosen").rows
        missing: list[str] = []
        return cls(
            measures=measures,
            latents=measured,
            stored=tuple(stored),
            effects=_or_missing(
                lambda: effects_on_logits(run, [latent], n=n), "effect on the logits", missing
            ),
            scope=_or_missing(lambda: _patchscope(run, latent, n), "patchscope", missing),
            missing=tuple(missing),
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

    def sections(self) -> list[Section]:
        """Measures, firing, and lenses, or why there are none."""
        values = [getattr(self.measures, name) for name in MEASURES_OF_A_LATENT]
        columns = {name: [v] for name, v in zip(MEASURES_OF_A_LATENT, values, strict=True)}
        return [
            Section(title=f"Latent {self.latent}", columns=columns),
            Section(columns=_by_role(self.latents.firing, self.latent)),
            *([] if self.effects is None else [_effects(self.effects)]),
            *([] if self.scope is None else [_scope(self.scope)]),
            *([Section(notes=self.missing)] if self.missing else []),
        ]

    def __repr__(self) -> str:
        return as_text([*self.sections(), self._examples()])

    def _repr_html_(self) -> str:
        shown = as_html([*self.sections(), *([] if self.stored else [self._examples()])])
        return shown + (self.examples()._repr_html_() if self.stored else "")

    def _examples(self) -> Section:
        """A row of up to three examples for the largest activations and each quantile."""
        if not self.stored:
            return Section(title="No examples: it is never active on the measured text.")
        groups: dict[str, list[StoredExample]] = {}
        quantiles = {e.quantile for e in self.stored if e.quantile is not None}
        for quantile in (None, *sorted(quantiles, reverse=True)):
            name = "largest" if quantile is None else f"quantile {quantile + 1}"
            if own := [e for e in self.stored if e.quantile == quantile]:
                groups[name] = own
        ends = [f"{own[0].value:.2f} to {own[-1].value:.2f}" for own in groups.values()]
        return Section(
            columns={"examples": [*groups], "activations": ends},
            examples=[own[:3] for own in groups.values()],
        )


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A latent with a text among its examples."""

    latent: int
    relative_decoder_norm: float
    latent_class: str
    n_on_token: int
    """Examples where the text lies on the token itself."""
    n_near: int
    """Examples with the text in their window."""
    n_examples: int
    before: str
    token: str
    """Activation of the strongest such example."""
    after: str
    source: str


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

    def sections(self) -> list[Section]:
        """A row a latent, with its strongest example below."""
        if not self.rows:
            return [Section(title=f"No latent has {self.text!r} among its examples.")]
        columns = self.columns()
        for name in ("before", "token", "after", "source"):
            del columns[name]
        title = f"Latents with {self.text!r} among their examples"
        return [Section(title=title, columns=columns, examples=[[row] for row in self.rows])]


def _or_missing(made: Callable[[], T], what: str, missing: list[str]) -> T | None:
    """Every part; one that these sites do not have is replaced by a note of the reason."""
    try:
        return made()
    except ValueError as error:
        missing.append(f"No {what}: {error}")
        return None


def _patchscope(run: Run, latent: int, n: int) -> Patchscope:
    """Patchscope of the fine-tuned row, or of the base's where the latent writes to it alone."""
    models, crosscoder = run.models, run.crosscoder
    base, finetuned = models.compared or (0, 0)
    if models.is_difference:
        rows = {finetuned: crosscoder.decoder(0)[latent]}
    else:
        rows = {i: crosscoder.decoder(i)[latent] for i in (finetuned, base)}
    at = next((i for i, row in rows.items() if row.any()), None)
    if at is None:
        raise ValueError(f"latent {latent} writes nothing: there is no row to name tokens of.")
    return patchscope(models, rows[at][None], site=models.model_sites[at].name, n=n)


def search(run: Run, text: str, *, n: int = 20) -> Hits:
    """Latents whose examples contain a text, in any case.

    Raises:
        ValueError: an empty text.
        FileNotFoundError: the run keeps neither examples nor text.
    """
    with run.examples() as database:
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
            source=hit.example.source,
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
        "active on": [name for name, _, _ in seen],
        "active_share": [n / of for _, n, of in seen],
        "n_active": [n for _, n, _ in seen],
        "of": [of for _, _, of in seen],
    }


def _effects(effects: LogitEffects) -> Section:
    tokens: dict[str, list[str]] = {}
    for row in effects.rows:
        verb = "promotes" if row.is_promoted else "suppresses"
        tokens.setdefault(f"  {spoken(row.direction)} {verb} ", []).append(repr(row.token))
    lines = [what + ", ".join(own) for what, own in tokens.items()]
    return Section(title="Direct effect on the next token's logits, strongest first", notes=lines)


def _scope(scope: Patchscope) -> Section:
    tokens: dict[str, list[str]] = {}
    for row in scope.rows:
        tokens.setdefault(f"  x {row.scale:g}: ", []).append(repr(row.token))
    lines = [what + ", ".join(own) for what, own in tokens.items()]
    title = f"Patchscope of its {spoken(scope.site)} decoder row, by multiples of the mean norm"
    return Section(title=title, notes=lines)
