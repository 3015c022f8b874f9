"""The loop: batches of activations go to one trainer, or to several that share them.

Contract: trainers that are fitted together end with the weights, bit for bit on a CPU, that each
would have alone; the models run once for all. Limit: one process; all dictionaries in memory.
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from tl_crosscoder.config.training import TrainConfig
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.data.loader import Position
from tl_crosscoder.train.trainer import Trainer

SHARED = (
    "n_tokens", "batch_size", "buffer_contexts", "harvest_batch_size", "checkpoint_every", "seed",
    "n_calibration_tokens",
)  # fmt: skip
"""What trainers that share batches have in common."""


class TrainingInterruptedError(KeyboardInterrupt):
    """Training was interrupted after it had saved a checkpoint."""


def fit_together(trainers: Sequence[Trainer]) -> list[Crosscoder]:
    """Train all to the end on the same batches, calibrate, save, and return the dictionaries.

    Those that are complete already are not trained again.

    Raises:
        ValueError: trainers of other sites, text, batch size, length or seed.
        FloatingPointError: a loss is not finite; the last checkpoints are intact.
        TrainingInterruptedError: Ctrl-C; checkpoints of that very step are on disk.
    """
    open_ = [trainer for trainer in trainers if not trainer.is_complete]
    if open_:
        _check_shared(open_)
        _train(open_)
    # Of several the held-out rows are harvested once and kept; one has them as they come.
    rows = open_[0].calibration_rows() if open_ else []
    rows = [*rows] if len(open_) > 1 else rows
    return [t.finished() if t.is_complete else t.finish(rows) for t in trainers]


def _train(trainers: Sequence[Trainer]) -> None:
    step = _common_step(trainers)
    sample = trainers[0].first_rows() if any(t.state is None for t in trainers) else None
    first = trainers[0]
    with ExitStack() as stack:
        for trainer in trainers:
            stack.callback(trainer.close)
            trainer.begin(sample)
        del sample
        interrupted = stack.enter_context(_interruptible())
        assert first.state is not None
        position: Position = first.state.position
        batches = stack.enter_context(closing(first.loader.batches(position)))
        config = first.config
        bar = stack.enter_context(
            tqdm(
                total=config.n_steps * config.batch_size,
                initial=step * config.batch_size,
                desc="Training",
                unit="tok",
                unit_scale=True,
            )
        )
        while step < config.n_steps:
            batch, position = next(batches)
            step += 1
            is_last = step == config.n_steps
            texts = [t.advance(batch, position, is_last=is_last) for t in trainers]
            bar.update(len(batch))
            if texts[0]:
                bar.set_postfix_str(texts[0])
            if interrupted.is_set():
                paths = [trainer.save() for trainer in trainers]
                raise TrainingInterruptedError(_interruption(step, paths[0]))


def _common_step(trainers: Sequence[Trainer]) -> int:
    """The step at which all stand; those that are ahead, after a kill while saving, go back."""
    steps = [0 if t.state is None else t.state.step for t in trainers]
    step = min(steps)
    for trainer, own in zip(trainers, steps, strict=True):
        if own > step:
            trainer.return_to(step)
    return step


def _check_shared(trainers: Sequence[Trainer]) -> None:
    first = trainers[0]
    known = {f.name for f in fields(TrainConfig)}
    assert known.issuperset(SHARED)
    for trainer in trainers[1:]:
        differing = [n for n in SHARED if getattr(trainer.config, n) != getattr(first.config, n)]
        if trainer.source is not first.source:
            differing.append("the models or the cache")
        if not torch.equal(trainer.loader.text.tokens, first.loader.text.tokens):
            differing.append("the text")
        if differing:
            raise ValueError(
                f"dictionaries that are trained together share their batches, but these differ in "
                f"{', '.join(differing)}. Train them apart, or give them the same."
            )


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM finish the step and save; a second Ctrl-C stops at once."""
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


def _interruption(step: int, path: Path | None) -> str:
    where = f"saved {path}; continue with --resume" if path else "there is no output folder"
    return f"interrupted after step {step}: {where}."
