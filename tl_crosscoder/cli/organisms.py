"""The verb `organisms`: what the embedded model pairs are, whether they are whole, what they do."""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

Name = tyro.conf.Positional[str]


@dataclass(frozen=True, kw_only=True)
class OrganismsList:
    """Name the embedded organisms and say what was planted in each."""

    def __call__(self) -> None:
        """Print."""
        from tl_crosscoder.organisms.suite import load_suite, public_suite
        from tl_crosscoder.results.render import WIDTH

        suite = load_suite() | public_suite()
        width = max(map(len, suite)) + 2
        kinds = {
            "": "organism",
            "Nulls": "null",
            "Variants": "variant",
            "On a real model, SmolLM2-135M (organisms show says what to install)": "real",
            "On the hub, for a GPU (Kassem et al. 2026)": "public",
        }
        for heading, kind in kinds.items():
            if heading:
                print(f"\n{heading}")
            for name, entry in suite.items():
                if kind == ("real" if entry.is_real else entry.kind):
                    said = entry.planted if kind in ("organism", "public") else entry.description
                    line = f"{name:<{width}}{said}"
                    print(textwrap.fill(line, WIDTH, subsequent_indent=" " * width))


@dataclass(frozen=True, kw_only=True)
class OrganismsShow:
    """Say what an organism is: its card, its files and the command that diffs it."""

    name: Name
    """Which organism."""

    def __call__(self) -> None:
        """Print."""
        from tl_crosscoder.models.smollm2 import INSTALL
        from tl_crosscoder.organisms.suite import organism, public_suite

        entry = public_suite().get(self.name) or organism(self.name)
        if entry.kind == "public":
            text = entry.text or "TEXT"
            named = f"--base {entry.base} --adapter {entry.folder} --text {text}"
            print(f"{entry.planted}\nDiff it with: tl-crosscoder train {named} --output RUN")
            return
        print((entry.folder / "README.md").read_text(encoding="utf-8"))
        print(f"family      {entry.family}")
        print(f"base        {entry.base}")
        print(f"fine-tuned  {entry.folder}")
        print(f"text        {entry.text}")
        print("questions   " + "\n            ".join(map(str, entry.questions)))
        if entry.is_real:
            print(f"\nThe base: {INSTALL}")
        print(f"\nDiff it with: tl-crosscoder demo --organism {entry.name}")


@dataclass(frozen=True, kw_only=True)
class OrganismsMeasure:
    """Measure an organism's behaviour and health, base and fine-tuned side by side."""

    name: Name
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
class OrganismsVerify:
    """Compare the files of the embedded organisms with their checksums."""

    name: tyro.conf.Positional[tuple[str, ...]] = ()
    """Which organisms; all by default."""

    def __call__(self) -> None:
        """Compare and print; exit code 2 where a file is missing or differs."""
        from tl_crosscoder.organisms.checksums import verify

        n = verify(self.name)
        print(f"{n} files are as they were published.")


@dataclass(frozen=True, kw_only=True)
class OrganismsBuild:
    """Fine-tune an organism again (in a checkout): the same bits where torch and processor are."""

    name: Name
    """Which organism."""
    output: str
    """Folder of the adapter; must be new or empty."""
    seed: int | None = None
    """Another seed than that of what is embedded."""

    def __call__(self) -> None:
        """Train and print its card."""
        from tl_crosscoder.organisms.suite import build

        print(build(self.name, output=self.output, seed=self.seed))


@dataclass(frozen=True, kw_only=True)
class Organisms:
    """List, show, measure, verify and remake the embedded model pairs."""

    action: (
        Annotated[OrganismsList, tyro.conf.subcommand("list")]
        | Annotated[OrganismsShow, tyro.conf.subcommand("show")]
        | Annotated[OrganismsMeasure, tyro.conf.subcommand("measure")]
        | Annotated[OrganismsVerify, tyro.conf.subcommand("verify")]
        | Annotated[OrganismsBuild, tyro.conf.subcommand("build")]
    )

    def __call__(self) -> None:
        """Do what was chosen."""
        self.action()
