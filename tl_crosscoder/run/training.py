"""One door to training: `train` loads the models, reads the text, trains, measures, and leaves all.

Beside what the trainer writes: `held_out.jsonl` (the text measured on), `analysis.json` and
`analysis.safetensors` (the measures) and `examples.sqlite` (`ExampleDatabase`). Limit: the held-out
text is cut at `n_measured_tokens`, and examples are of that text alone.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, overload

from tqdm.auto import tqdm

from tl_crosscoder.analysis.example_database import ExampleDatabase
from tl_crosscoder.analysis.measurement import Measurement, measure, measure_all
from tl_crosscoder.config.presets import preset_name
from tl_crosscoder.config.text import CONTEXT_SIZE
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.data.cache import ActivationCache
from tl_crosscoder.data.documents import Document
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.loading import options_of_each
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.results.render import wrapped
from tl_crosscoder.run.run import HELD_OUT_NAME, Run
from tl_crosscoder.run.sources import load_source, open_cache, sites_of
from tl_crosscoder.run.text import (
    RunText,
    Text,
    check_text,
    checked_text,
    text_at_hand,
    text_of_run,
    write_documents,
)
from tl_crosscoder.train.checkpoint import check_output
from tl_crosscoder.train.presets import crosscoder_config, recipe_of
from tl_crosscoder.train.trainer import Trainer, fit_together

EXAMPLES_NAME = "examples.sqlite"


@overload
def train(
    configs: RunConfig,
    *,
    models: ModelPair | None = None,
    text: Text | None = None,
    resume: bool = False,
) -> Run: ...
@overload
def train(
    configs: Sequence[RunConfig],
    *,
    models: ModelPair | None = None,
    text: Text | None = None,
    resume: bool = False,
) -> list[Run]: ...
def train(
    configs: RunConfig | Sequence[RunConfig],
    *,
    models: ModelPair | None = None,
    text: Text | None = None,
    resume: bool = False,
) -> Run | list[Run]:
    """Train and measure a dictionary, or several on the same activations, each in a folder.

    The models run once for all; every dictionary is what it would have been alone. The configs may
    differ in what a dictionary is made of and how fast it learns, not in models and text. See the
    module for what is left in `config.output`.

    Args:
        configs: one run, or several.
        models: loaded models, in place of the names in the config.
        text: documents or contexts, in place of the name in the config.
        resume: continue what a folder holds; a run that is whole there stays as it is.

    Raises:
        ValueError, FileNotFoundError: bad input, before any long work; nothing is overwritten.
        FloatingPointError, TrainingInterruptedError: see `Trainer.fit`.
    """
    each = [configs] if isinstance(configs, RunConfig) else [*configs]
    for config in each:
        check_output(Path(config.output), resume=resume)
    source, content = _opened(each[0], models, text)
    each = [_fitted(config, source, content, is_loaded=models is not None) for config in each]
    for config in each:
        crosscoder_config(source, config, config.preset)  # refuses what cannot be
    read = _text(each[0], source, content)
    trainers = _trainers(each, source, read, resume=resume)
    _say(trainers, read)
    _fit_and_measure(trainers, source, read)
    loaded = source if isinstance(source, ModelPair) else None
    runs = [Run(path=Path(c.output), device=str(source.device), loaded=loaded) for c in each]
    return runs[0] if isinstance(configs, RunConfig) else runs


def _opened(
    config: RunConfig, models: ModelPair | None, text: Text | None
) -> tuple[ActivationSource, TokenizedText | list[Document] | None]:
    """What is run over, and documents or contexts where they are at hand."""
    if text is None:
        if models is None:
            return open_source(config), None
        check_text(config)
        return models, None
    content = checked_text(text)
    if isinstance(content, str | Path):
        raise ValueError(f"text is {str(content)!r}: a name belongs in the config's text.")
    if models is None:
        check_models(config)
        models = load_source(config)
    return models, content


def _fitted(
    config: RunConfig, source: ActivationSource, content: object, *, is_loaded: bool
) -> RunConfig:
    """The config with what follows from models and contexts that are there."""
    changes: dict[str, Any] = {}
    if isinstance(source, ModelPair) and is_loaded:
        weights = (p.dtype for p in source.models[0].parameters() if p.is_floating_point())
        changes["dtype"] = str(next(weights)).removeprefix("torch.")
    if isinstance(content, TokenizedText):
        changes |= {"context_size": content.context_size, "pack": False}
    elif config.context_size == CONTEXT_SIZE and isinstance(source, ModelPair):
        changes["context_size"] = min(CONTEXT_SIZE, source.n_ctx)
    return replace(config, **changes)


def _trainers(
    configs: Sequence[RunConfig], source: ActivationSource, text: RunText, *, resume: bool
) -> list[Trainer]:
    return [
        Trainer(
            source,
            text.training,
            text.held_out,
            config=config,
            recipe=config.preset,
            output=config.output,
            resume=resume,
        )
        for config in configs
    ]


def _say(trainers: Sequence[Trainer], text: RunText) -> None:
    """Print what is going to be done: models, hook points, text, and the numbers of each run."""
    sites = trainers[0].source.sites
    named = [*(s.minus for s in sites if s.minus), *sites]
    models = " and ".join(dict.fromkeys(s.label for s in named))
    hooks = ", ".join(dict.fromkeys(s.hook_name for s in named))
    lines = [f"{models} at {hooks}; {text.training.describe()}"]
    for trainer in trainers:
        plan, config = trainer.plan, trainer.config
        name = preset_name(config.preset) if isinstance(config, RunConfig) else "dictionary"
        k = getattr(trainer.cfg.sparsity, "k", None)
        lines.append(
            f"{name}, {plan.d_sae:,} latents{'' if k is None else f', k {k:g}'}: "
            f"{plan.n_tokens:,} activation pairs in batches of {plan.batch_size:,}, learning rate "
            f"{plan.lr:g} after {plan.lr_warmup_steps} steps. The run is kept in {trainer.output}."
        )
    tqdm.write("\n".join(map(wrapped, lines)), file=sys.stderr)


def _fit_and_measure(trainers: list[Trainer], source: ActivationSource, text: RunText) -> None:
    folders = [trainer.output for trainer in trainers]
    is_done = [t.is_complete and _is_measured(f) for f, t in zip(folders, trainers, strict=True)]
    if text.held_out_documents:
        for folder in folders:
            assert folder is not None
            write_documents(folder / HELD_OUT_NAME, text.held_out_documents)
    crosscoders = fit_together(trainers)
    trainers.clear()  # and with them gradients and optimizer, several times the dictionary
    left = [i for i, done in enumerate(is_done) if not done]
    if not left:
        return
    chosen = [crosscoders[i] for i in left]
    made = measure_all(source, chosen, text.held_out, show_progress=True)
    for i, measurement in zip(left, made, strict=True):
        folder = folders[i]
        assert folder is not None
        save_measurement(measurement, folder, text=text.held_out, tokenizer=source.tokenizer)


def _is_measured(folder: Path | None) -> bool:
    assert folder is not None
    try:
        Measurement.load(folder)
    except (FileNotFoundError, ValueError):  # none, or of an earlier version
        return False
    return True


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
    recipe_of(config.preset, n_steps=1)


def _text(
    config: RunConfig, source: ActivationSource, content: TokenizedText | list[Document] | None
) -> RunText:
    if content is not None:
        return text_at_hand(config, source, content)
    if config.cache is None or isinstance(source, ModelPair):
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
