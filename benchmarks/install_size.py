"""What a plain install brings: packages and bytes, and which dependency brings how much.

    python benchmarks/install_size.py --output benchmarks/results/install_size.json

Follows the requirements of the installed packages from this one on, without extras; torch and what
only torch needs (CUDA packages, Triton) are counted apart. `alone` is what would be saved without a
dependency: packages that nothing else needs. Limit: versions and platform are those of this
environment.
"""

import argparse
from collections.abc import Collection, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tl_crosscoder import files

PACKAGE, APART = "tl-crosscoder", "torch"
HOSTS = ("transformer-lens", "sae-lens")
"""What this is a plugin of."""


@cache
def requirements(name: str, extras: frozenset[str]) -> tuple[tuple[str, frozenset[str]], ...]:
    """Names and extras that a package needs here; nothing of one that is not installed."""
    try:
        lines = distribution(name).requires or []
    except PackageNotFoundError:
        return ()
    found = []
    for requirement in map(Requirement, lines):
        needed = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in (extras or {""})
        )
        if needed:
            found.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return tuple(found)


def closure(name: str, *, without: Collection[str] = ()) -> set[str]:
    """Installed packages that a package needs, itself left out."""

    def walked(name: str, extras: frozenset[str]) -> Iterator[str]:
        for needed, own in requirements(name, extras):
            if needed not in without and (needed, own) not in seen:
                seen.add((needed, own))
                if is_installed(needed):
                    yield needed
                    yield from walked(needed, own)

    seen: set[tuple[str, frozenset[str]]] = set()
    return set(walked(name, frozenset()))


def is_installed(name: str) -> bool:
    """Whether a requirement is met here."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


@cache
def size(name: str) -> int:
    """Bytes of a package's files."""
    found = distribution(name)
    paths = (Path(str(found.locate_file(file))) for file in found.files or ())
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> None:
    """Print the table, and keep it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file of the same numbers")
    args = parser.parse_args()
    every, rest = closure(PACKAGE), closure(PACKAGE, without={APART})
    rows: list[dict[str, Any]] = []
    for name, _ in requirements(PACKAGE, frozenset()):
        alone = every - closure(PACKAGE, without={name})
        rows.append({"name": name, "n_packages": len(alone), "bytes": sum(map(size, alone))})
    rows.sort(key=lambda row: -row["bytes"])
    total = {"n_packages": len(every), "n_packages_without_torch": len(rest)}
    hosts = {*HOSTS, *(name for host in HOSTS for name in closure(host, without={APART}))}
    total |= {"n_packages_of_hosts": len(hosts & rest)}
    total |= {"bytes": sum(map(size, every)), "bytes_without_torch": sum(map(size, rest))}
    print(f"{total['n_packages']} packages, {total['n_packages_without_torch']} without torch; "
          f"{total['bytes_without_torch'] / 1e6:,.0f} MB without torch")  # fmt: skip
    for row in rows:
        print(f"  {row['name']:<20} {row['n_packages']:>3} alone {row['bytes'] / 1e6:8.1f} MB")
    if args.output:
        files.write_json(args.output, {**total, "rows": rows, "packages": sorted(rest)})


if __name__ == "__main__":
    main()
