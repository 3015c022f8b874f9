"""Atomic writes: a file or folder under its final name is complete, or is not there.

Every artefact of a run goes through these functions, so that a kill at any byte leaves either
the old content or the new one. Limits: atomic on one file system, as `os.replace` is; a folder
that replaces a folder is for an instant not there; a kill leaves its hidden temporary behind.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor

# The files of a run's folder, each by one name. The dictionary, as SAELens reads it:
CFG_NAME, WEIGHTS_NAME = "cfg.json", "sae_weights.safetensors"
RECORD_NAME = "runner_cfg.json"
"""How the dictionary is made."""
METRICS_NAME = "metrics.jsonl"
"""Metrics of the training."""
HELD_OUT_NAME = "held_out.jsonl"
"""Documents that are measured on."""
ANALYSIS_NAMES = "analysis.json", "analysis.safetensors"
"""Measures."""
EXAMPLES_NAME = "examples.sqlite"
NORMS_NAME = "relative_decoder_norm.html"
PLOTLY_NAME = "plotly.min.js"
"""What draws the figures of the folder."""
ATTRIBUTION_NAMES = "attribution.json", "attribution.safetensors"
"""What each latent carries of the change."""
WATERFALL_NAME = "waterfall.json"
"""How much of the change passes the hook, and how much of that the latents hold."""
CHANGES_NAME = "changes.json"
"""What changed, and which latents cause it."""
FLOOR_NAME = "floor.json"
"""The same numbers for pairs that should show nothing."""
NULL_NAME = "null"
"""Folder of these pairs: samples, adapter, and a run for each kind, such as `null/self`."""
SCAN_NAMES = "layer_scan.json", "layer_scan.html"
"""What passes each layer, where the hook point was chosen by that, and its figure."""
PATCHING_NAME = "patching.json"
CAUSAL_NAMES = "ablation_*.json", "sufficiency_*.json", "curves_*.json", "baselines_*.json"
"""Tests of interventions, a file for each effect."""
MINED_NAME = "mined_tokens.json"
GENERATIONS_NAMES = "texts_finetuned.json", "texts_amplified.json"
"""What methods without a dictionary find in logits: tokens, and texts."""
RECOVERY_NAME = "recovery.json"
"""How well the planted difference of an organism was found."""
JUDGED_NAME = "judged.json"
"""Names of latents by a language model."""
JUDGED_CHANGES_NAME = "judged_changes.json"
"""Names of changes by a language model."""
REPORT_NAME = "report.html"

# Unmistakable: whatever bears another name is somebody's file, and is never deleted.
OWN = ".tl_crosscoder."
_TEMPORARY = re.compile(r"\..+\.\d+\.tl_crosscoder\.(tmp|old)")
_LOCK = re.compile(r"\..+\.tl_crosscoder\.lock")


def _beside(path: Path, end: str) -> Path:
    return path.parent / f".{path.name}.{os.getpid()}{OWN}{end}"


def is_temporary(path: Path) -> bool:
    """Whether this is what a killed process left of something that it was writing."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sweep(folder: Path, *, of: str = "") -> None:
    """Delete from a folder what killed processes left of files; nothing else, and not below.

    Args:
        folder: it need not be there.
        of: only what is left of the file of this name.
    """
    if folder.is_dir():
        own = (path for path in folder.iterdir() if path.name.startswith(f".{of}"))
        _remove(*filter(is_temporary, own))


def discard(folder: Path) -> None:
    """Delete a folder so that a kill never leaves half of it under its name."""
    gone = _beside(folder, "old")
    _remove(gone)
    folder.replace(gone)
    _remove(gone)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`.

    Works for a file and for a folder (whoever writes decides which). An error removes the
    temporary path and leaves `path` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _beside(path, "tmp"), _beside(path, "old")
    # A killed process that had the same number (common in containers) may have left its own.
    _remove(temporary, old)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            path.replace(old)  # deleting it here would take time, and a kill leave half of it
        temporary.replace(path)
    finally:
        if old.exists() and not path.exists():
            old.replace(path)
        _remove(temporary, old)


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def size_text(n_bytes: int) -> str:
    """A number of bytes for a reader, in kB or MB."""
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:,.1f} kB"


def listing(folder: Path) -> str:
    """The files of a folder and of the folders in it, a line each with its size."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    width = max(map(len, names), default=0)
    sizes = [size_text(path.stat().st_size) for path in paths]
    return "\n".join(f"  {n:<{width}} {s:>10}" for n, s in zip(names, sizes, strict=True))


def free_bytes(path: Path) -> int:
    """Room on the disk of a path, which need not exist yet."""
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Content of a JSON file. Raises ValueError for a damaged one, with its path."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): it is damaged. Copy it again.") from error


def read_object(path: Path, **kinds: type) -> dict[str, Any]:
    """Content of a JSON file that is a mapping and has, at least, fields of these types.

    Raises:
        ValueError: any other content, with the path and the field.
    """
    return checked_object(read_json(path), path, **kinds)


def checked_object(content: Any, path: Path | str, **kinds: type) -> dict[str, Any]:
    """What was read from a JSON file, if it is such a mapping. Raises as `read_object`."""
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__} in place of a mapping: it is damaged, or of "
            "something else. Copy it again."
        )
    for name, kind in kinds.items():
        # JSON's true is no number.
        if type(content.get(name)) is not kind:
            raise ValueError(
                f"{path}: {name} is {_short(content.get(name))}; it must be a {kind.__name__}. It "
                "is damaged, or of another version. Copy it again."
            )
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON. Raises ValueError for NaN and infinity, which are not JSON."""
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path} cannot be written: a number in it is not ({error}).") from error
    write_text(path, text + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, "Tensor"], *, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; tensors may be views, on any device."""
    from safetensors.torch import save_file  # torch, which the command line's help does without

    own = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}
    with replacing(path) as temporary, _inside(path) as made:
        made.touch()
        mode = made.stat().st_mode
        try:
            save_file(own, made, metadata=metadata)
        except SafetensorError as error:
            raise _as_os_error(error) from error
        # safetensors 0.8 makes files that only their owner may read (its issue 782).
        made.chmod(mode)
        made.replace(temporary)


@contextmanager
def _inside(path: Path) -> Iterator[Path]:
    """A path in a temporary folder: safetensors 0.8 writes to a `.tmpXXXXXX` of its own first.

    A kill would leave it, and nobody could tell it from a file of the user.
    """
    folder = path.parent / f".{path.name}.folder.{os.getpid()}{OWN}tmp"
    _remove(folder)
    folder.mkdir()
    try:
        yield folder / path.name
    finally:
        _remove(folder)


def check_floats(path: Path) -> None:
    """Raise ValueError where a tensor of a safetensors file holds no floating-point numbers.

    Whole numbers and truth values would be read into weights, as zeros and ones.
    """
    from safetensors import safe_open  # torch, which the command line's help does without

    with safe_open(path, "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    if odd := {name: kind for name, kind in kinds.items() if not kind.startswith(("F", "BF"))}:
        raise ValueError(
            f"{path} holds {odd}: weights must be floating-point numbers. It is damaged, or of "
            "something else. Copy it again."
        )


def read_tensors(path: Path) -> dict[str, "Tensor"]:
    """Tensors of a safetensors file. Raises ValueError for a damaged one, with its path."""
    from safetensors.torch import load_file  # torch, which the command line's help does without

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}). Copy it again.") from error


def user_path(path: str | Path) -> Path:
    """A path as a user gave it, `~` being the home folder: of every path that comes from outside.

    Only a shell expands `~`, and not in `--output=~/run`, in YAML or in Python. Raises ValueError
    for a home that is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be found ({error}) Write the whole path.") from error


def is_empty_folder(path: Path) -> bool:
    """Whether nothing is there but what a killed process left of a file that it was writing."""
    return path.is_dir() and all(is_temporary(p) or _LOCK.fullmatch(p.name) for p in path.iterdir())


def new_folder(folder: str | Path) -> Path:
    """The folder, which is not there or is empty. Raises ValueError for another."""
    folder = user_path(folder)
    if folder.exists() and not is_empty_folder(folder):
        raise ValueError(f"{folder} is not an empty folder: choose another; nothing was written.")
    return folder


def holds(folder: Path, patterns: Sequence[str]) -> bool:
    """Whether something in a folder fits one of the patterns."""
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def check_folder(
    folder: Path, marker: str, *, what: str, resume: bool, saved: Sequence[str]
) -> None:
    """Refuse, without touching it, a folder that something may not be written to.

    One that was begun (`marker` is there) and stopped before anything was saved, for want of memory
    say, has nothing to lose: the corrected settings may begin there anew.

    Args:
        folder: it need not be there.
        marker: name of the file that is written first.
        what: what the folder would hold.
        resume: whether what is there is to be continued.
        saved: patterns of the files of which one is there when something was saved.

    Raises:
        ValueError: it holds `what` and `resume` is off, or it holds files that are no such thing.
    """
    if (folder / marker).is_file():
        if not resume and holds(folder, saved):
            raise ValueError(
                f"{folder} already holds a {what}. Choose another output folder, or continue that "
                f"{what} with resume (--resume)."
            )
    elif folder.exists() and not is_empty_folder(folder):
        raise ValueError(
            f"{folder} is not an empty folder and holds no {what} ({marker} is missing). Choose "
            "another output folder; nothing was written."
        )


def check_same(before: Any, now: Any, *, what: str, free: Sequence[str] = ()) -> None:
    """Raise ValueError, which begins with `what`, if two JSON records differ; see `differences`."""
    differing = sorted(differences(before, now, free=free))
    if differing:
        raise ValueError(
            f"{what}: {', '.join(differing)}. Resume with the same settings, or choose another "
            "output."
        )


def differences(
    before: Any, now: Any, *, free: Sequence[str] = (), path: str = ""
) -> Iterator[str]:
    """Paths, such as `training.lr`, at which two JSON records differ; not under those `free`."""
    if path in free:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            inner = f"{path}.{key}" if path else key
            yield from differences(before.get(key), now.get(key), free=free, path=inner)
    elif json.dumps(before) != json.dumps(now):
        yield f"{path} ({_short(before)} there, {_short(now)} now)"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:60]}…{text[-57:]}"


def is_disk_full(error: OSError) -> bool:
    """Whether a write failed for want of room, on the disk or in a quota or limit."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _as_os_error(error: Exception) -> OSError:
    """Safetensors says a system error in words: "No space left on device (os error 28)"."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found.group(1)) if found else errno.EIO, str(error))
