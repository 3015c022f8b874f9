"""Results of interventions as plain text, for the terminal."""

import math
from collections.abc import Sequence
from statistics import fmean

from tl_crosscoder.interventions.patching import PatchingResult, PatchingRow
from tl_crosscoder.interventions.trials import CausalRow, CausalTest
from tl_crosscoder.visualize.terminal import wrapped

_NAMES = {
    "necessity": "Necessity: the fine-tuned model without these latents; share of the change that "
    "goes",
    "insert": "Sufficiency: the base model with what these latents add; share of the change that "
    "comes",
    "steer": "Sufficiency: the base model steered; share of the change that comes",
}


def patching_table(result: PatchingResult) -> str:
    """KL and recovery of every variant, random ones as the mean of their kind."""
    kinds = list(dict.fromkeys(row.tokens for row in result.rows))
    first = [row for row in result.rows if row.tokens == kinds[0]]
    sizes = {row.tokens: f"{row.tokens} ({row.n_tokens:,} tokens)" for row in result.rows}
    head = f"  {'':<37} {'latents':>7}" + "".join(f"  {sizes[kind]:<25}" for kind in kinds)
    under = f"  {'':<37} {'':>7}" + "".join(f"  {'KL':<6}{'recovered':<19}" for _ in kinds)
    lines = [
        wrapped(
            f"KL({result.compared[1]} || patched) in nats a token, and the share of KL(base "
            f"stream) that a patch takes away, 95 % intervals over {first[0].n_prompts} prompts"
        ),
        wrapped(f"Candidates: {result.candidates}"),
        "",
        head.rstrip(),
        under.rstrip(),
    ]
    shown: set[str] = set()
    for row in first:
        if row.group == "random":
            kind = row.variant.rstrip("0123456789 ")
            if kind in shown:
                continue
            shown.add(kind)
            lines.append(_mean_line(result, kind, kinds))
        else:
            own = [result.row(row.variant, k) for k in kinds]
            lines.append(_line(row.variant, row.n_latents, [_recovered(r) for r in own]))
    return "\n".join(line.rstrip() for line in lines)


def _line(name: str, n_latents: int, cells: Sequence[str]) -> str:
    return f"  {name:<37} {n_latents or '-':>7}" + "".join(f"  {cell:<25}" for cell in cells)


def _recovered(row: PatchingRow) -> str:
    low, high = _share(row.recovery_low), _share(row.recovery_high)
    return f"{row.kl:.3f} {_share(row.recovery)} [{low}, {high}]"


def _share(value: float) -> str:
    """In percent; what is worse than nothing by far needs no digits."""
    return f"{value:+.0%}" if value > -9.995 else "< -999%"


def _mean_line(result: PatchingResult, kind: str, kinds: Sequence[str]) -> str:
    """Draws of one kind of control: means, and the lowest and highest recovery."""
    cells = []
    own = [r for r in result.rows if r.variant.rstrip("0123456789 ") == kind]
    for tokens in kinds:
        drawn = [r for r in own if r.tokens == tokens]
        shares = [r.recovery for r in drawn]
        cells.append(
            f"{fmean(r.kl for r in drawn):.3f} {_share(fmean(shares))} ({_share(min(shares))} to "
            f"{_share(max(shares))})"
        )
    n = len(own) // len(kinds)
    return _line(f"{kind.removeprefix('candidates, ')}, {n} draws", own[0].n_latents, cells)


def causal_table(result: CausalTest) -> str:
    """One block a test."""
    lines = [
        wrapped(
            f"{result.effect[:1].upper()}{result.effect[1:]}, on {result.n_prompts} prompts; "
            f"{result.n_random} norm-matched random directions and {result.n_matched} sets of "
            "latents of the same firing rate as controls; p after Holm; KL to the unedited model "
            "on neutral text"
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
            f"  {'':<20}{'value':>7}  {'share [95 %]':<22}{'random':>7} {'95th':>6}  "
            f"{'same rate':>9}  {'p':>5}  {'KL':>6} {'random':>7}",
            *(_causal_line(row) for row in rows),
        ]
    return "\n".join(lines)


def _causal_line(row: CausalRow) -> str:
    name = row.latents if math.isnan(row.strength) else f"{row.latents}, x {row.strength:g}"
    share = f"{_share(row.share)} [{_share(row.share_low)}, {_share(row.share_high)}]"
    matched = "-" if math.isnan(row.matched_mean) else _share(row.matched_mean)
    return (
        f"  {name:<20}{row.value:>7.3g}  {share:<22}{_share(row.random_mean):>7} "
        f"{_share(row.random_high):>6}  {matched:>9}  {row.p_random_holm:>5.3f}  "
        f"{row.off_target_kl:>6.3f} {row.random_off_target_kl:>7.3f}"
    )


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
