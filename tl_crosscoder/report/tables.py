"""A single latent, and the lens of a mean difference, as plain text for the terminal.

Results of interventions as plain text, at most 100 columns wide, for the terminal.

Limit: names of variants and sets are cut to the room that the numbers leave.
"""

import math
from collections.abc import Collection, Sequence
from statistics import fmean

from tl_crosscoder.analysis.examples.database import Example, StoredExample
from tl_crosscoder.analysis.firing import Firing
from tl_crosscoder.analysis.latents import LatentMeasures, RankedLatent
from tl_crosscoder.analysis.lens import LogitEffects
from tl_crosscoder.analysis.patchscope import Patchscope
from tl_crosscoder.baselines.activation_difference import ActivationDifference
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.interventions.patching import PatchingResult, PatchingRow
from tl_crosscoder.interventions.trials import CausalRow, CausalTest
from tl_crosscoder.models.sites import ComparedModels
from tl_crosscoder.report.terminal import context
from tl_crosscoder.results.measures import COLUMNS, shown_value, visible
from tl_crosscoder.results.render import WIDTH, wrapped

MEASURES = (
    "score", "relative_decoder_norm", "delta_norm", "nu_error", "nu_reconstruction",
    "decoder_cosine", "explained_difference", "explained_difference_drop", "active_share",
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


_NAMES = {
    "necessity": "Necessity: taken out of the fine-tuned model; share of the change that goes",
    "insert": "Sufficiency: the base model with what these latents add; share of the change that "
    "comes",
    "steer": "Sufficiency: the base model steered; share of the change that comes",
}


def patching_table(result: PatchingResult) -> str:
    """KL and recovery of every variant, random ones as the mean of their kind.

    Kinds of token stand side by side where they fit, else one below the other.
    """
    kinds = list(dict.fromkeys(row.tokens for row in result.rows))
    n_prompts = result.rows[0].n_prompts
    head = [
        wrapped(
            f"KL({result.compared[1]} || patched) in nats a token, and the share of KL(base "
            f"stream) that a patch of n latents takes away, 95 % intervals over "
            f"{n_prompts} prompts"
        ),
        wrapped(f"Candidates: {result.candidates}"),
    ]
    rows = _patching_rows(result, kinds)
    apart = [_patching_rows(result, [kind]) for kind in kinds]
    left = range(2, 2 + len(kinds))
    blocks = [_aligned(each, left=left) for each in ([rows] if _fits(rows) else apart)]
    return "\n\n".join("\n".join(lines) for lines in [head, *blocks])


def _patching_rows(result: PatchingResult, kinds: Sequence[str]) -> list[list[str]]:
    """Cells: name, number of latents, and KL and recovery on each kind of token."""
    sizes = {row.tokens: row.n_tokens for row in result.rows}
    rows = [["", "n", *(f"{kind} ({sizes[kind]:,} tokens)" for kind in kinds)]]
    shown: set[str] = set()
    for row in (r for r in result.rows if r.tokens == kinds[0]):
        if row.group != "random":
            own = [result.row(row.variant, kind) for kind in kinds]
            rows.append([row.variant, f"{row.n_latents or '-'}", *map(_recovered, own)])
        elif (kind := row.drawn_as) not in shown:
            shown.add(kind)
            rows.append(_mean_row(result, kind, kinds))
    return rows


def _recovered(row: PatchingRow) -> str:
    shown = _with_interval(row.recovery, row.recovery_low, row.recovery_high)
    return f"{row.kl:.3f} {shown}"


def _with_interval(value: float, low: float, high: float) -> str:
    """Where there is no value, or it is worse than nothing by far, an interval says no more."""
    shown = _share(value)
    if math.isnan(value) or abs(value) >= _MOST:
        return shown
    return f"{shown} [{_share(low)}, {_share(high)}]"


_MOST = 9.995
"""A larger share needs no digits."""


def _share(value: float) -> str:
    """In percent."""
    if math.isnan(value):
        return "-"
    if abs(value) >= _MOST:
        return "<-999%" if value < 0 else ">+999%"
    return f"{value:+.0%}"


def _mean_row(result: PatchingResult, kind: str, kinds: Sequence[str]) -> list[str]:
    """Draws of one kind of control: means, and the lowest and highest recovery."""
    cells = []
    own = [r for r in result.rows if r.group == "random" and r.drawn_as == kind]
    for tokens in kinds:
        drawn = [r for r in own if r.tokens == tokens]
        shares = [r.recovery for r in drawn]
        mean, ends = _share(fmean(shares)), f"({_share(min(shares))} to {_share(max(shares))})"
        cells.append(f"{fmean(r.kl for r in drawn):.3f} {mean} {ends}")
    n = sum(r.tokens == kinds[0] for r in own)
    return [f"{kind.removeprefix('candidates, ')}, {n} draws", f"{own[0].n_latents}", *cells]


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _fits(rows: Sequence[Sequence[str]]) -> bool:
    """No name has to be cut."""
    return sum(width + 2 for width in _widths(rows)) <= WIDTH


def _aligned(rows: Sequence[Sequence[str]], *, left: Collection[int]) -> list[str]:
    """Lines of cells, numbers to the right; the first column, of names, takes the room left."""
    widths = _widths(rows)
    room = max(_LEAST_NAME, WIDTH - sum(w + 2 for w in widths[1:]) - 2)
    widths[0] = min(widths[0], room)
    lines = []
    for name, *cells in rows:
        first = name if len(name) <= widths[0] else name[: widths[0] - 1] + "…"
        padded = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths[1:], strict=True), 1)
        ]
        lines.append("  ".join([f"  {first:<{widths[0]}}", *padded]).rstrip())
    return lines


_LEAST_NAME = 12


def causal_table(result: CausalTest) -> str:
    """One block a test."""
    has_matched = any(not math.isnan(row.matched_mean) for row in result.rows)
    matched = f" and {result.n_matched} sets of latents of the same firing rate"
    lines = [
        wrapped(
            f"{result.effect[:1].upper()}{result.effect[1:]}, on {result.n_prompts} prompts; "
            f"{result.n_random} norm-matched random directions{matched if has_matched else ''} as "
            "controls; p after Holm; KL to the unedited model on neutral text"
        )
    ]
    for test in dict.fromkeys(row.test for row in result.rows):
        rows = [row for row in result.rows if row.test == test]
        one = rows[0]
        lines += [
            "",
            wrapped(
                f"{_NAMES[test]} ({result.unit}: base {one.base:.3g}, "
                f"fine-tuned {one.finetuned:.3g})"
            ),
            *_aligned([_CAUSAL_HEAD, *map(_causal_cells, rows)], left=(2,)),
        ]
    return "\n".join(lines)


_CAUSAL_HEAD = ["", "value", "share [95 %]", "random", "95th", "rate", "p", "KL", "random"]


def _causal_cells(row: CausalRow) -> list[str]:
    return [
        row.latents if math.isnan(row.strength) else f"{row.latents}, x {row.strength:g}",
        f"{row.value:.3g}",
        _with_interval(row.share, row.share_low, row.share_high),
        *(_share(value) for value in (row.random_mean, row.random_high, row.matched_mean)),
        *(_nats(value) for value in (row.p_random_holm, row.off_target_kl)),
        _nats(row.random_off_target_kl),
    ]


def _nats(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def samples_table(samples: Sequence[tuple[str, dict[str, str]]]) -> str:
    """What models write after each prompt, by the name of the model."""
    blocks = []
    for prompt, texts in samples:
        width = max(map(len, texts))
        lines = [wrapped(f"> {_one_line(prompt)}")]
        lines += [wrapped(f"  {name:<{width}}  {_one_line(text)}") for name, text in texts.items()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _one_line(text: str) -> str:
    return " ".join(repr(text)[1:-1].replace("\\n", " ").split())
