"""Names of what travels with the package: `tl_crosscoder/world-base`, `tl_crosscoder/taboo`, ...

Such a name stands wherever a model, an adapter or a text is asked for, and is what dictionaries
record, so that they are the same on every machine.
"""

from pathlib import Path

PREFIX = "tl_crosscoder/"


def pretrained_folder() -> Path:
    """The shipped assets: inside an installed wheel, or at the root of a checkout."""
    package, checkout = (parent / "pretrained" for parent in Path(__file__).parents[1:3])
    return package if package.exists() else checkout


def resolve_model(name: str | Path) -> str | Path:
    """The folder behind an embedded model's name; any other name or path as it is.

    Raises:
        FileNotFoundError: the prefix of the package with a name that it does not hold.
    """
    if not str(name).startswith(PREFIX) or Path(name).exists():
        return name
    models = pretrained_folder() / "models"
    folder = models / str(name).removeprefix(PREFIX)
    if not folder.is_dir():
        known = sorted(PREFIX + p.name for p in models.glob("*") if p.is_dir())
        raise FileNotFoundError(f"{name!r} does not come with the package; it has {known}.")
    return folder


def embedded_text(name: str) -> Path:
    """The file (`.jsonl.xz`) behind an embedded text's name.

    Raises:
        FileNotFoundError: the package holds no such text.
    """
    texts = pretrained_folder() / "texts"
    path = texts / f"{name.removeprefix(PREFIX)}.jsonl.xz"
    if not path.is_file():
        known = sorted(PREFIX + p.name.split(".")[0] for p in texts.glob("*.jsonl.xz"))
        raise FileNotFoundError(f"no text {name!r} comes with the package; it has {known}.")
    return path


def embedded_run(path: str | Path) -> Path | None:
    """The folder behind an embedded dictionary's name; None for any other path.

    Raises:
        FileNotFoundError: the prefix of the package with a name that it does not hold.
    """
    name = Path(path).as_posix()
    if not name.startswith(PREFIX) or Path(path).exists():
        return None
    dictionaries = pretrained_folder() / "dictionaries"
    folder = dictionaries / name.removeprefix(PREFIX)
    if not folder.is_dir():
        known = sorted(PREFIX + p.name for p in dictionaries.glob("*") if p.is_dir())
        raise FileNotFoundError(
            f"{name!r} is no dictionary that comes with the package, and no folder here; it has "
            f"{known}."
        )
    return folder
