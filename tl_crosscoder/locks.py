"""`locked`: one process at a time writes to an output.

Contract: the lock is the system's and goes with the process that holds it, so that no kill leaves
one. Limits: no locks where the system has no `fcntl` (Windows); a network file system has to pass
them on.
"""

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tl_crosscoder import files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_locked: set[Path] = set()
"""Lock files that this process holds."""


@contextmanager
def locked(path: Path, *, is_file: bool = False) -> Iterator[None]:
    """Keep other processes from writing a folder, or a file, within this block.

    A folder that is not there is made, and removed again where it stays empty. The process that
    holds the lock may lock again.

    Raises:
        ValueError: another process writes to it.
    """
    folder, name = (path.parent, path.name) if is_file else (path, "folder")
    lock = folder.absolute() / f".{name}{files.OWN}lock"
    if fcntl is None or lock in _locked:
        yield
        return
    made = [parent for parent in lock.parents if not parent.exists()]
    lock.parent.mkdir(parents=True, exist_ok=True)
    handle = _take(lock, path)
    _locked.add(lock)
    try:
        yield
    finally:
        _locked.discard(lock)
        lock.unlink(missing_ok=True)
        os.close(handle)
        for parent in made:
            with suppress(OSError):  # it is not empty
                parent.rmdir()


def _take(lock: Path, path: Path) -> int:
    """A handle of the lock file, which holds it until it is closed."""
    assert fcntl is not None
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have deleted this file, and a third made another by now.
            if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
                os.truncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return handle
        except BlockingIOError as error:
            who = os.read(handle, 300).decode(errors="replace") or "another process"
            os.close(handle)
            raise ValueError(
                f"{who} is writing to {path} now. Wait until it is done, stop it, or choose "
                "another output."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
            warnings.warn(
                f"no other process may write to {path}: it cannot be locked", stacklevel=2
            )
            return handle
        os.close(handle)
