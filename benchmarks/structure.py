"""How large the package is, and whether its rooms keep their order.

    python benchmarks/structure.py

Reads the source of a checkout as text (`--root`, by default this one) and prints lines, modules,
import circles, imports upward, public names, dataclasses and the flags of `train`. Nothing is
imported. Limit: the order of rooms is that of `pyproject.toml`'s import contract.
"""

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

ROOMS = (
    "files", "config", "results", "models", "data", "crosscoder", "train", "analysis",
    "interventions", "baselines", "organisms", "run", "benchmark", "report", "hub",
    "integrations", "notebook", "demo", "cli",
)  # fmt: skip
PACKAGE = "tl_crosscoder"


def modules_of(root: Path) -> dict[str, Path]:
    """Modules of the package by dotted name, without their `__init__`s' suffix."""
    folder = root / PACKAGE
    names = {".".join(p.relative_to(folder).with_suffix("").parts): p for p in folder.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports(tree: ast.Module, modules: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a module imports, inside functions too."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(PACKAGE):
            continue
        base = (node.module or "").removeprefix(PACKAGE).lstrip(".")
        for alias in node.names:
            name = f"{base}.{alias.name}".lstrip(".")
            yield name if name in modules else base


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that reach each other by imports."""

    def reached(start: str) -> set[str]:
        found, left = set(), [start]
        while left:
            for name in graph.get(left.pop(), set()) - found:
                found.add(name)
                left.append(name)
        return found

    reach = {name: reached(name) for name in graph}
    found: list[set[str]] = []
    for name, others in reach.items():
        circle = {other for other in others if name in reach.get(other, set())} - {name}
        if circle and not any(name in known for known in found):
            found.append(circle | {name})
    return found


def upward(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports of a room that stands below the importing one."""
    order = {room: i for i, room in enumerate(ROOMS)}

    def place(name: str) -> int:
        return order.get(name.split(".")[0], -1)

    return sorted(
        (name, other)
        for name, others in graph.items()
        for other in others
        if 0 <= place(name) < place(other)
    )


def is_dataclass(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and any(
        "dataclass" in ast.unparse(decorator) for decorator in node.decorator_list
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    root: Path = parser.parse_args().root
    modules = modules_of(root)
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules.items()}
    graph = {name: {*imports(tree, modules)} - {name, ""} for name, tree in trees.items() if name}
    top = [node for tree in trees.values() for node in tree.body]
    named = [n for n in top if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    sizes = {name: len(p.read_text(encoding="utf-8").splitlines()) for name, p in modules.items()}
    tests = [p.read_text(encoding="utf-8") for p in (root / "tests").rglob("*.py")]
    rows = {
        "lines of the package": sum(sizes.values()),
        "modules": len(modules),
        "modules of more than 300 lines": sum(n > 300 for n in sizes.values()),
        "modules at the root": sum("." not in n and p.name != "__init__.py"
                                   for n, p in modules.items()) + 1,
        "import circles": len(circles(graph)),
        "imports upward": len(upward(graph)),
        "public names": sum(not n.name.startswith("_") for n in named),
        "dataclasses": sum(map(is_dataclass, top)),
        "modules that name a run's config": sum(
            any(isinstance(n, ast.Name) and n.id == "RunConfig" for n in ast.walk(tree))
            for tree in trees.values()
        ),
        "lines of tests": sum(len(text.splitlines()) for text in tests),
    }  # fmt: skip
    for name, value in rows.items():
        print(f"{name:<34}{value:>8,}")
    for circle in circles(graph):
        print("circle:", ", ".join(sorted(circle)))
    for name, other in upward(graph):
        print("upward:", name, "->", other)


if __name__ == "__main__":
    main()
