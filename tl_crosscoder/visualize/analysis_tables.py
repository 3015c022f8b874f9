"""Rankings, single latents and searches as plain text, for the terminal."""

import math
from collections.abc import Sequence

from tl_crosscoder.activations.roles import ROLES
from tl_crosscoder.analysis.example_database import SearchHit, StoredExample
from tl_crosscoder.analysis.firing import Firing
from tl_crosscoder.analysis.latent_measures import LatentMeasures
from tl_crosscoder.analysis.lens import LogitEffects
from tl_crosscoder.analysis.max_activating import Example
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.analysis.patchscope import Patchscope
from tl_crosscoder.analysis.ranking import RankedLatent, Ranking
from tl_crosscoder.baselines.activation_difference import ActivationDifference
from tl_crosscoder.compared_models import ComparedModels
from tl_crosscoder.tables import TableOfRows
from tl_crosscoder.visualize.terminal import WIDTH, context, wrapped

_COLUMNS = (
    ("latent", "latent", "d"),
    ("score", "score", ".4f"),
    ("R", "relative_decoder_norm", ".3f"),
    ("Delta-norm", "delta_norm", ".3f"),
    ("nu error", "nu_error", ".2f"),
    ("nu rec.", "nu_reconstruction", ".2f"),
    ("cosine", "decoder_cosine", "+.2f"),
    ("alone", "difference_alone", ".2%"),
    ("fires", "active_share", ".2%"),
    ("template", "template_share", ".0%"),
    ("class", "latent_class", ""),
)


def ranking(result: Ranking) -> str:
    """A row a latent, with what its place was made of."""
    head = "  ".join(["  #", *(f"{name:>{_width(name)}}" for name, _, _ in _COLUMNS)])
    lines = [wrapped(f"Latents by {result.order}, toward the {result.toward} model"), "", head]
    for row in result.rows:
        cells = [_cell(getattr(row, field), form, name) for name, field, form in _COLUMNS]
        lines.append("  ".join([f"{row.place:>3}", *cells]).rstrip())
    return "\n".join(lines)


def one_latent(
    row: RankedLatent,
    latents: LatentMeasures,
    stored: Sequence[StoredExample],
    effects: LogitEffects,
    scope: Patchscope,
) -> str:
    """Measures, firing, lenses, and examples from the strongest to the weakest."""
    firing = latents.firing
    blocks = [
        f"Latent {row.latent}: {row.latent_class}, fires on {row.active_share:.2%} of "
        f"{firing.n_tokens:,} tokens",
        "\n".join(
            f"  {name:<12} {_cell(getattr(row, field), form, '').strip()}"
            for name, field, form in _COLUMNS[1:-1]
        ),
        _by_role(firing, row.latent),
        _effects(effects),
        _scope(scope),
        _examples(stored),
    ]
    return "\n\n".join(blocks)


def search_hits(hits: Sequence[SearchHit], text: str, measurement: Measurement) -> str:
    """Latents with a text among their examples, those active on it first."""
    if not hits:
        return f"No latent has {text!r} among its examples."
    lines = [f"Latents with {text!r} among their examples (R; tokens on it, near it, of all)"]
    for hit in hits:
        R = measurement.latents.relative_decoder_norm[hit.latent].item()
        shown = "-" if math.isnan(R) else f"{R:.3f}"
        lines.append(
            f"  latent {hit.latent:<6} R {shown}  {hit.n_on_token} on it, {hit.n_matching} near, "
            f"of {hit.n_tokens}"
        )
        lines.append(f"      {context(_example(hit.example))}")
    return "\n".join(lines)


def _by_role(firing: Firing, latent: int) -> str:
    lines = ["Fires on"]
    for i, role in enumerate(ROLES):
        n, seen = int(firing.n_active_by_role[i, latent]), firing.tokens_by_role[i]
        if seen:
            lines.append(f"  {role:<12} {n / seen:>7.2%} of its tokens ({n:,} of {seen:,})")
    for i, source in enumerate(firing.sources):
        n, seen = int(firing.n_active_by_source[i, latent]), firing.tokens_by_source[i]
        if seen:
            lines.append(f"  {source[:24]:<12} {n / seen:>7.2%} of the source ({n:,} of {seen:,})")
    return "\n".join(lines)


def _effects(effects: LogitEffects) -> str:
    lines = ["Direct effect on the next token's logits, strongest first"]
    for direction in dict.fromkeys(row.direction for row in effects.rows):
        for is_promoted, name in ((True, "promotes"), (False, "suppresses")):
            which = direction, is_promoted
            own = [r for r in effects.rows if (r.direction, r.is_promoted) == which]
            tokens = ", ".join(repr(r.token) for r in own)
            lines.append(wrapped(f"  {direction} {name} {tokens}"))
    return "\n".join(lines)


def _scope(scope: Patchscope) -> str:
    lines = [f"Patchscope of its {scope.site} row, by multiples of the stream's norm"]
    for scale in dict.fromkeys(row.scale for row in scope.rows):
        tokens = ", ".join(repr(row.token) for row in scope.rows if row.scale == scale)
        lines.append(wrapped(f"  x {scale:g}: {tokens}"))
    return "\n".join(lines)


def logit_lens(adl: ActivationDifference, models: ComparedModels) -> str:
    """Tokens that the mean difference promotes, by position (ADL 2025)."""
    effects = adl.logit_lens(models, n=8)
    lines = ["Tokens that the mean difference promotes, by position in the context"]
    for i, which in enumerate(adl.which()):
        own = [r for r in effects.rows if r.latent == i and r.is_promoted]
        lines.append(wrapped(f"  {adl.label(which)}: {', '.join(repr(r.token) for r in own)}"))
    return "\n".join(lines)


def rows_table(result: TableOfRows) -> str:
    """Any result of rows: facts about the whole, then a column a field."""
    about = ", ".join(f"{k} {v}" for k, v in result.about().items())
    columns = {name: [_plain(v) for v in values] for name, values in result.columns().items()}
    if not result.rows:
        return f"None. ({about})"
    widths = {name: max(len(name), *map(len, cells)) for name, cells in columns.items()}
    # Too many columns for a line go below each other.
    lines, names = [wrapped(about), ""], list(columns)
    while names:
        n, width = 0, 0
        while n < len(names) and (n == 0 or width + widths[names[n]] + 2 <= WIDTH):
            width += widths[names[n]] + 2
            n += 1
        shown, names = names[:n], names[n:]
        rows = [shown, *zip(*(columns[name] for name in shown), strict=True)]
        for row in rows:
            cells = (f"{cell:>{widths[name]}}" for cell, name in zip(row, shown, strict=True))
            lines.append("  ".join(cells))
        lines.append("")
    return "\n".join(lines).rstrip()


def _plain(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _examples(stored: Sequence[StoredExample]) -> str:
    if not stored:
        return "It has no examples: it never fires on the measured text."
    lines = []
    kinds = dict.fromkeys((e.kind, e.quantile) for e in stored)
    order = sorted(kinds, key=lambda k: math.inf if k[1] is None else k[1], reverse=True)
    n_quantiles = max((k[1] for k in kinds if k[1] is not None), default=0) + 1
    for kind, quantile in order:
        own = [e for e in stored if (e.kind, e.quantile) == (kind, quantile)]
        name = "largest" if quantile is None else f"quantile {quantile + 1} of {n_quantiles}"
        lines.append(f"{name}: {own[0].value:.2f} to {own[-1].value:.2f}")
        lines += [f"      {context(_example(e))}" for e in own[:3]]
    return "\n".join(lines)


def _example(stored: StoredExample) -> Example:
    return Example(
        before=stored.before,
        token=stored.token,
        after=stored.after,
        value=stored.value,
        source=stored.source,
    )


def _width(name: str) -> int:
    return max(6, len(name))


def _cell(value: float | str, form: str, name: str) -> str:
    width = _width(name)
    if isinstance(value, str):
        return f" {value}"
    return f"{'-' if math.isnan(value) else format(value, form):>{width}}"
