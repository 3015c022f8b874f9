"""An end of training at which nothing is lost: Ctrl-C and SIGTERM wait for the step to be saved.

Limit: signals are caught in the main thread only.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class TrainingInterruptedError(KeyboardInterrupt):
    """Training was interrupted after it had saved a checkpoint."""


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second Ctrl-C stops at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def interrupt(number: int, frame: Any) -> None:
        del number, frame
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(s, interrupt) for s in signals]
    try:
        yield interrupted
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
