"""How long work shows where it is: a bar where somebody watches, a line a minute in a log.

    for batch in progress(batches, desc="Measuring", unit="batch"):
        ...
    note("The run is kept in runs/taboo.")

On a terminal and in a notebook it is tqdm's bar. Where stderr is a file or a pipe, work that takes
less than a minute says nothing, and longer work prints a plain line each minute. `TQDM_DISABLE=1`
turns bars and lines off, `silenced` (`tl-crosscoder --quiet`) the notes too, but no warning.
"""

import io
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import tqdm.std

with warnings.catch_warnings():
    # In a notebook without ipywidgets: the bar is then one of text.
    warnings.simplefilter("ignore", tqdm.std.TqdmWarning)
    import tqdm.auto

# At its import it may tell of kernels for 4 bits that it does not find, which nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

LINE_S = 60.0
"""Seconds between two lines where there is no terminal."""
LINE = (
    "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}"
    "{postfix}]"
)
"""What such a line says, in tqdm's names."""
_SILENCED = ContextVar("silenced", default=False)


class _Lines(tqdm.std.tqdm):
    """tqdm's counts and rates, a line at a time."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print a line; tqdm asks for an empty one to clear a bar, of which there is none here."""
        del pos
        if msg is None:
            print(str(self), file=self.fp, flush=True)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Keep a text for the next line."""
        del refresh
        super().set_postfix_str(s, refresh=False)

    def close(self) -> None:
        """End with a line, if there was one before; tqdm would return the carriage as well."""
        if not self.disable and self.last_print_t > self.start_t and self.n > self.last_print_n:
            self.display()
        self.leave, self.fp = False, io.StringIO()
        super().close()


def progress(items: Iterable[Any] | None = None, *, show: bool = True, **how: Any) -> Any:
    """A bar over items, or one to `update`; a line a minute where nobody watches.

    Args:
        items: what to iterate over; None for a bar that is updated by hand.
        show: False gives one that shows nothing.
        how: `desc`, `total`, `initial`, `unit`, `unit_scale` of tqdm.
    """
    if not show or _SILENCED.get():
        return tqdm.std.tqdm(items, disable=True, **how)
    if is_watched():
        return tqdm.auto.tqdm(items, **how)
    # The mean rate since the start: of two lines, a smoothed one tells the first minute's.
    every = {"delay": LINE_S, "mininterval": LINE_S, "maxinterval": LINE_S, "smoothing": 0}
    return _Lines(items, bar_format=LINE, **every, **how)


def is_watched() -> bool:
    """Whether stderr is a terminal, or this is a notebook, with widgets or without."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell" or sys.stderr.isatty()


def note(text: str, *, is_warning: bool = False) -> None:
    """Print a sentence about the work on stderr, above any bar; a warning is never silenced."""
    if is_warning or not _SILENCED.get():
        tqdm.auto.tqdm.write(text, file=sys.stderr)


@contextmanager
def silenced(is_silenced: bool = True) -> Iterator[None]:
    """Within it there are no bars, lines and notes."""
    token = _SILENCED.set(is_silenced or _SILENCED.get())
    try:
        yield
    finally:
        _SILENCED.reset(token)
