"""Writing an output folder whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tl_crosscoder.files import replacing


def check_output(output: Path) -> None:
    """Refuse a folder that already holds something.

    Raises:
        ValueError: if `output` is a file or a folder that is not empty.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ValueError(
            f"output {str(output)!r} exists and is not empty: nothing was written. "
            "Choose a new folder, or delete this one first."
        )


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output`, renamed to it when the block ends without an error.

    Raises:
        ValueError: if `output` is a file or a folder that is not empty.
    """
    check_output(output)
    with replacing(output) as draft:
        draft.mkdir()
        yield draft
        for path in draft.iterdir():
            # safetensors makes its files private to their owner; a published model is not.
            path.chmod(0o644)
