"""A single latent, and the lens of a mean difference, as plain text for the terminal."""

import math
from collections.abc import Sequence

from tl_crosscoder.activations.roles import ROLES
from tl_crosscoder.analysis.example_database import StoredExample
from tl_crosscoder.analysis.firing import Firing
from tl_crosscoder.analysis.latent_measures import LatentMeasures
from tl_crosscoder.analysis.lens import LogitEffects
from tl_crosscoder.analysis.max_activating import Example
from tl_crosscoder.analysis.patchscope import Patchscope
from tl_crosscoder.analysis.ranking import RankedLatent
from tl_crosscoder.baselines.activation_difference import ActivationDifference
from tl_crosscoder.compared_models import ComparedModels
from tl_crosscoder.result_columns import COLUMNS, shown_value, visible
from tl_crosscoder.text_tables import wrapped
from tl_crosscoder.visualize.terminal import context

MEASURES = (
    "score", "relative_decoder_norm", "delta_norm", "nu_error", "nu_reconstruction",
    "decoder_cosine", "difference_alone", "difference_lost_without", "active_share",
    "template_share",
)  # fmt: skip
"""Of one latent."""


def one_latent(
    row: RankedLatent,
    latents: LatentMeasures,
    stored: Sequence[StoredExample],
    *,
    effects: LogitEffects | None,
    scope: Patchscope | None,
    missing: Sequence[str] = (),
) -> str:
    """Measures, firing, lenses or why there are none, and examples, the strongest first."""
    firing = latents.firing
    known = [name for name in MEASURES if not math.isnan(getattr(row, name))]
    of_class = [] if math.isnan(row.relative_decoder_norm) else [row.latent_class]
    fires = f"fires on {row.active_share:.2%} of {firing.n_tokens:,} tokens"
    blocks = [
        f"Latent {row.latent}: {', '.join([*of_class, fires])}",
        "\n".join(
            f"  {COLUMNS[name].label:<12} {shown_value(name, getattr(row, name))}" for name in known
        ),
        _by_role(firing, row.latent),
        *([] if effects is None else [_effects(effects)]),
        *([] if scope is None else [_scope(scope)]),
        *map(wrapped, missing),
        _examples(stored),
    ]
    return "\n\n".join(blocks)


def _by_role(firing: Firing, latent: int) -> str:
    lines = ["Fires on"]
    for i, role in enumerate(ROLES):
        n, seen = int(firing.n_active_by_role[i, latent]), firing.tokens_by_role[i]
        if seen:
            lines.append(f"  {role:<12} {n / seen:>7.2%} of its tokens ({n:,} of {seen:,})")
    for i, source in enumerate(firing.sources):
        n, seen = int(firing.n_active_by_source[i, latent]), firing.tokens_by_source[i]
        if seen:
            lines.append(
                f"  {visible(source)[:24]:<12} {n / seen:>7.2%} of the source ({n:,} of {seen:,})"
            )
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
