"""The registry as tables: for the terminal, and for the documentation.

Contract: a line a dictionary, under its release; what is not known is `-`. Limit: where a
dictionary is (embedded, cached, hub) is that of this machine, so the documentation has no such
column but for what travels with the package.
"""

from collections.abc import Sequence
from itertools import groupby

from tl_crosscoder.hub.registry import Entry

_HEADER = ("id", "recipe", "latents", "L0", "FVE base, tuned, diff", "size", "where")


def terminal_table(entries: Sequence[Entry]) -> str:
    """Releases with the dictionaries of each, and how to load one."""
    blocks = []
    rows = [_row(e) for e in entries]
    widths = [max(len(row[i]) for row in [_HEADER, *rows]) for i in range(len(_HEADER))]
    for release, group in groupby(entries, key=lambda e: e.release):
        own = list(group)
        first = own[0]
        pair = f"  {' -> '.join(first.model_names)} at {', '.join(first.hook_names)}"
        lines = [release, pair, *(_line(row, widths) for row in [_HEADER, *map(_row, own)])]
        blocks.append("\n".join(lines))
    example = entries[0]
    blocks.append(
        f'Load one: Crosscoder.from_pretrained("{example.release}", "{example.id}")\n'
        f"Embedded ones need no network and are runs: tl-crosscoder analyze {example.run_name}"
    )
    return "\n\n".join(blocks)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    return f"  {'  '.join(cells)}".rstrip()


def _row(entry: Entry) -> tuple[str, ...]:
    return (
        entry.id,
        entry.preset or "-",
        "-" if entry.d_sae is None else f"{entry.d_sae:,}",
        "-" if entry.l0 is None else f"{entry.l0:.1f}",
        ", ".join(f"{v:.3f}" for v in entry.fve.values()) or "-",
        "-" if entry.n_bytes is None else f"{entry.n_bytes / 1e6:,.1f} MB",
        entry.where,
    )


def markdown_table(entries: Sequence[Entry]) -> str:
    """One row a dictionary, with its repository."""
    header = ("release", "id", "models", "hook", *_HEADER[1:-1], "from")
    rows = [
        (
            f"`{e.release}`",
            f"`{e.id}`",
            " → ".join(f"`{name}`" for name in e.model_names),
            ", ".join(f"`{hook}`" for hook in e.hook_names),
            *_row(e)[1:-1],
            "this package" if e.is_embedded else f"`{e.repo_id}`",
        )
        for e in entries
    ]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
