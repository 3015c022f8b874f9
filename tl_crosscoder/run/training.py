"""A whole diff: load the models, read the text, train, measure, leave it all in a folder.

Beside what the trainer writes: `held_out.jsonl` (the text measured on), `analysis.json` and
`analysis.safetensors` (the measures) and `examples.sqlite` (`ExampleDatabase`). Limit: the held-out
text is cut at `n_measured_tokens`.

The examples of a run: opened, or collected where the folder has none.

Limit: examples are of the run's held-out text alone.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from tqdm.auto import tqdm

from tl_crosscoder.analysis.example_database import ExampleDatabase
from tl_crosscoder.analysis.measurement import Measurement, measure, measure_all
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.data.cache import ActivationCache
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.loading import options_of_each
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.run.run import HELD_OUT_NAME, Run
from tl_crosscoder.run.sources import load_source, open_cache, sites_of
from tl_crosscoder.run.text import RunText, check_text, text_of_run, write_documents
from tl_crosscoder.train.checkpoint import check_output
from tl_crosscoder.train.presets import recipe_of
from tl_crosscoder.train.trainer import Trainer, crosscoder_config, fit_together

EXAMPLES_NAME = "examples.sqlite"


def run_diff(config: RunConfig, *, resume: bool = False) -> Measurement:
    """Do everything that `config` says; see the module for what it leaves in `config.output`.

    Raises:
        ValueError, FileNotFoundError: bad input, before any long work; nothing is overwritten.
        FloatingPointError, TrainingInterruptedError: see `Trainer.fit`.
    """
    return run_together([config], resume=resume)[0]


def run_together(configs: Sequence[RunConfig], *, resume: bool = False) -> list[Measurement]:
    """Train several dictionaries on the same activations, each in its own output folder.

    The models run once for all; every dictionary is what it would have been alone. The configs
    may differ in what a dictionary is made of and how fast it learns, not in models and text.

    Raises: as `run_diff` does.
    """
    config = configs[0]
    for own in configs:
        check_output(Path(own.output), resume=resume)
    source = open_source(config)
    for own in configs:
        crosscoder_config(source, own, own.preset)  # refuses what cannot be, before long work
    text = _text(config, source)
    tqdm.write(f"Text: {text.training.describe()}", file=sys.stderr)
    return train_and_measure(configs, source, text, resume=resume)


def train_and_measure(
    configs: Sequence[RunConfig],
    source: ActivationSource,
    text: RunText,
    *,
    resume: bool = False,
) -> list[Measurement]:
    """The same where the source is open and the text is read, which the configs then only record.

    With `resume`, a run that is whole in its folder stays as it is.

    Raises: as `Trainer` and `fit_together` do.
    """
    trainers = [
        Trainer(
            source,
            text.training,
            text.held_out,
            config=own,
            recipe=own.preset,
            output=own.output,
            resume=resume,
        )
        for own in configs
    ]
    folders = [Path(own.output) for own in configs]
    found = [
        _measured(f) if t.is_complete else None for f, t in zip(folders, trainers, strict=True)
    ]
    if text.held_out_documents:
        for folder in folders:
            write_documents(folder / HELD_OUT_NAME, text.held_out_documents)
    crosscoders = fit_together(trainers)
    del trainers  # and with them gradients and optimizer, several times the dictionary
    open_ = [i for i, measurement in enumerate(found) if measurement is None]
    if open_:
        made = measure_all(
            source, [crosscoders[i] for i in open_], text.held_out, show_progress=True
        )
        for i, measurement in zip(open_, made, strict=True):
            how = {"text": text.held_out, "tokenizer": source.tokenizer}
            save_measurement(measurement, folders[i], **how)
            found[i] = measurement
    return [measurement for measurement in found if measurement is not None]


def _measured(folder: Path) -> Measurement | None:
    try:
        return Measurement.load(folder)
    except (FileNotFoundError, ValueError):  # none, or of an earlier version
        return None


def open_source(config: RunConfig) -> ActivationSource:
    """The models of a config, or its cache; small checks come before anything is loaded.

    Raises:
        ValueError, FileNotFoundError: no models, no text, or a cache of other ones.
    """
    if config.cache is None:
        check_models(config)
        check_text(config)
        return load_source(config)
    return open_cache(config)


def check_models(config: RunConfig) -> None:
    """What can be refused before models load: which ones, where, in which format, which recipe.

    Raises ValueError.
    """
    adapters = {(s.model_name, s.revision, s.adapter): s.adapter for s in sites_of(config)}
    options_of_each(
        [*adapters.values()],
        device=config.device,
        dtype=config.dtype,
        merge_adapter=config.merge_adapter,
    )
    recipe_of(config.preset, n_steps=config.n_steps)


def _text(config: RunConfig, source: ActivationSource) -> RunText:
    if config.cache is None:
        return text_of_run(config, source)
    cache = cast(ActivationCache, source)
    n = math.ceil(config.n_measured_tokens / cache.n_ctx)
    return RunText(training=cache.training, held_out=cache.held_out[:n], held_out_documents=[])


def save_measurement(
    measurement: Measurement, output: Path, *, text: TokenizedText, tokenizer: Any
) -> None:
    """Write the measures and the examples beside the dictionary."""
    measurement.save(output)
    save_examples(measurement, output, text=text, tokenizer=tokenizer)


def save_examples(
    measurement: Measurement, output: Path, *, text: TokenizedText, tokenizer: Any
) -> None:
    """Write the examples, where the measurement still has them."""
    if measurement.collected is not None:
        about = {"sources": list(measurement.sources), "n_tokens": text.n_tokens}
        ExampleDatabase.write(
            output / EXAMPLES_NAME, measurement.collected, text, tokenizer=tokenizer, about=about
        )


def measure_again(run: Run, *, text: str | None = None) -> Measurement:
    """Load models and dictionary of a run and measure anew, on its held-out text or another.

    A run on a cache is measured on the cache, without the models. Measures on the run's own
    held-out text replace those in the folder; on other text they are only returned.

    Raises:
        FileNotFoundError, ValueError: no run there, or its text or cache is gone.
    """
    source, contexts = run.measured(text)
    found = measure(source, run.crosscoder, contexts, show_progress=True)
    if text is None:
        save_measurement(found, run.path, text=contexts, tokenizer=source.tokenizer)
    return found


def run_examples(run: Run) -> ExampleDatabase:
    """Examples of a run; collected now, on its held-out text, where its folder has none.

    Published dictionaries come without them. The measures in the folder stay as they are.

    Raises:
        FileNotFoundError: the run keeps no text either.
    """
    path = run.path / EXAMPLES_NAME
    if not path.is_file():
        source, contexts = run.measured()
        tqdm.write(f"Collecting examples on held-out text, once, into {path}.", file=sys.stderr)
        found = measure(source, run.crosscoder, contexts, show_progress=True)
        save_examples(found, run.path, text=contexts, tokenizer=source.tokenizer)
    return ExampleDatabase.open(path)


def examples_of(run: Run, text: TokenizedText) -> ExampleDatabase:
    """Examples of a run, checked to be of the text that it is measured on.

    Raises:
        FileNotFoundError: the run has neither examples nor text.
        ValueError: they are of another text.
    """
    database = run_examples(run)
    if not database.is_of(text):
        database.close()
        raise ValueError(
            f"the examples in {run.path} are of another text than the run is measured on now. "
            "Make them again with `tl-crosscoder analyze --fresh`."
        )
    return database
