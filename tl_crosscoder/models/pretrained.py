"""Names of what travels with the package: `tl_crosscoder/world-base`, `tl_crosscoder/taboo`, ...

Such a name stands wherever a model, an adapter, a text or a dictionary is asked for, and is what
dictionaries record, so that they are the same on every machine. Each function raises
FileNotFoundError for the prefix of the package with a name that it does not hold.
"""

from pathlib import Path

from tl_crosscoder.models import smollm2

PREFIX = "tl_crosscoder/"


def pretrained_folder() -> Path:
    """The shipped assets: inside an installed wheel, or at the root of a checkout."""
    package, checkout = (parent / "pretrained" for parent in Path(__file__).parents[1:3])
    return package if package.exists() else checkout


def resolve_model(name: str | Path) -> str | Path:
    """The folder behind an embedded model's name; any other name or path as it is.

    The real model of an ordinary package, `smollm2.NAME`, is converted where it has not been.
    """
    if Path(name).as_posix() == smollm2.NAME and not Path(name).exists():
        return smollm2.smollm2_folder()
    return _shipped("models", str(name)) if _is_embedded(name) else name


def embedded_text(name: str) -> Path:
    """The file behind an embedded text's name."""
    return _shipped("texts", name, ".jsonl.xz")


def embedded_run(path: str | Path) -> Path | None:
    """The folder behind an embedded dictionary's name; None for any other path."""
    return _shipped("dictionaries", Path(path).as_posix()) if _is_embedded(path) else None


def _is_embedded(name: str | Path) -> bool:
    return Path(name).as_posix().startswith(PREFIX) and not Path(name).exists()


def _shipped(kind: str, name: str, ending: str = "") -> Path:
    folder = pretrained_folder() / kind
    path = folder / f"{name.removeprefix(PREFIX)}{ending}"
    if not path.exists():
        known = sorted(PREFIX + p.name.removesuffix(ending) for p in folder.glob(f"*{ending}"))
        raise FileNotFoundError(
            f"{name!r} does not come with the package, and is not here; it has the {kind} {known}."
        )
    return path
