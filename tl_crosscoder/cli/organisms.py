"""`tl-crosscoder organisms`: the embedded model pairs, and what their models do.

No torch is imported before a verb runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

OrganismName = Literal["taboo", "false-fact"]


@dataclass(frozen=True, kw_only=True)
class OrganismsList:
    """Name the embedded organisms and say what was planted in each."""

    def __call__(self) -> None:
        """Print."""
        from tl_crosscoder.organisms.suite import load_suite

        for name, entry in load_suite().items():
            print(f"{name:<12}{entry.planted}")


@dataclass(frozen=True, kw_only=True)
class OrganismsMeasure:
    """Measure an organism's behaviour, base and fine-tuned side by side."""

    name: tyro.conf.Positional[OrganismName]
    """Which organism."""
    base: str | None = None
    """Base model; the embedded one by default."""
    adapter: str | None = None
    """Adapter; the embedded one by default."""

    def __call__(self) -> None:
        """Measure and print."""
        from tl_crosscoder.organisms.scores import measure

        base, adapter = (Path(p) if p else None for p in (self.base, self.adapter))
        print(measure(self.name, base=base, adapter=adapter))


@dataclass(frozen=True, kw_only=True)
class Organisms:
    """List and measure the embedded model pairs."""

    action: (
        Annotated[OrganismsList, tyro.conf.subcommand("list")]
        | Annotated[OrganismsMeasure, tyro.conf.subcommand("measure")]
    )

    def __call__(self) -> None:
        """Do what was chosen."""
        self.action()
