"""`tl-crosscoder organisms`: make and measure the embedded model pairs.

No torch is imported before a verb runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

OrganismName = Literal["taboo", "false-fact"]


@dataclass(frozen=True, kw_only=True)
class OrganismsBase:
    """Train the micro-world's base model from scratch (about 15 minutes)."""

    output: str
    """Folder for the model; must be new or empty."""
    seed: int = 0
    """Of weights and text."""

    def __call__(self) -> None:
        """Train and print."""
        from tl_crosscoder.organisms import train_base

        result = train_base(Path(self.output), seed=self.seed)
        print((result.output / "README.md").read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class OrganismsFinetune:
    """Fine-tune an organism's LoRA adapter from the base model."""

    name: tyro.conf.Positional[OrganismName]
    """Which organism."""
    output: str
    """Folder for the adapter; must be new or empty."""
    base: str | None = None
    """Base model; the embedded one by default."""
    seed: int | None = None
    """The suite's by default."""

    def __call__(self) -> None:
        """Fine-tune and print."""
        from tl_crosscoder.organisms.finetune import finetune

        base = Path(self.base) if self.base else None
        result = finetune(self.name, base=base, output=Path(self.output), seed=self.seed)
        print((result.output / "README.md").read_text(encoding="utf-8"))


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
        from tl_crosscoder.organisms import measure
        from tl_crosscoder.organisms.cards import behaviour_table

        base, adapter = (Path(p) if p else None for p in (self.base, self.adapter))
        print(behaviour_table(measure(self.name, base=base, adapter=adapter)))


@dataclass(frozen=True, kw_only=True)
class Organisms:
    """Make and measure the embedded model pairs."""

    action: (
        Annotated[OrganismsBase, tyro.conf.subcommand("base")]
        | Annotated[OrganismsFinetune, tyro.conf.subcommand("finetune")]
        | Annotated[OrganismsMeasure, tyro.conf.subcommand("measure")]
    )

    def __call__(self) -> None:
        """Do what was chosen."""
        self.action()
