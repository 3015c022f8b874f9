"""Whether the embedded organisms are whole: every file against its published SHA-256.

`pretrained/SHA256SUMS` has the format of `sha256sum`, which reads it too.
"""

from collections.abc import Iterable
from pathlib import Path

from tl_crosscoder import files
from tl_crosscoder.models.pretrained import pretrained_folder
from tl_crosscoder.organisms.suite import Organism, load_suite, organism

NAME = "SHA256SUMS"
_FOLDERS = ("models", "texts", "questions")


def verify(names: Iterable[str] = ()) -> int:
    """Compare files of organisms with their checksums, and return how many there are.

    Args:
        names: of organisms; all files of the suite where there are none.

    Raises:
        ValueError: an unknown organism, files that are missing or differ (all are named).
    """
    folder = pretrained_folder()
    published = read(folder / NAME)
    entries = [organism(name) for name in names]
    wanted = {path for e in entries for path in published if _is_of(folder / path, e)}
    bad = []
    for name in sorted(wanted if entries else published):
        if not (folder / name).is_file():
            bad.append(f"{name} is missing")
        elif files.sha256(folder / name) != published[name]:
            bad.append(f"{name} differs from what was published")
    folders = {(folder / path).parent for path in published}
    every = entries or load_suite().values()
    lacking = [entry.name for entry in every if entry.folder not in folders]
    bad += [f"{name} has no checksums" for name in lacking]
    if bad:
        raise ValueError(
            "; ".join(bad) + ". Install the package again, or restore the files in a checkout "
            "with: git checkout -- pretrained"
        )
    return len(wanted if entries else published)


def read(path: Path) -> dict[str, str]:
    """Checksum by file name, relative to the folder of `path`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def write(folder: Path) -> Path:
    """Write the checksums of all models, texts and questions in a folder."""
    every = (path for name in _FOLDERS for path in (folder / name).rglob("*.*"))
    found = sorted(path for path in every if path.is_file())
    lines = [f"{files.sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in found]
    files.write_text(folder / NAME, "".join(lines))
    return folder / NAME


def _is_of(path: Path, entry: Organism) -> bool:
    own = (entry.base, entry.folder, entry.questions[0].parent)
    return path.parent in own or path.name == f"{entry.text_name}.jsonl.xz"
