"""One door to training: `train` loads the models, reads the text, trains, measures, and leaves all.

Beside what the trainer writes: `held_out.jsonl` (the text measured on), `analysis.json` and
`analysis.safetensors` (the measures) and `examples.sqlite` (`ExampleDatabase`). `analysis.json` is
written last: a resumed run makes again what is missing or damaged. Limit: the held-out text is cut
at `n_measured_tokens`, and examples are of that text alone.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from tl_crosscoder import files
from tl_crosscoder.analysis.example_database import ExampleDatabase
from tl_crosscoder.analysis.measurement import Measurement, measure_all
from tl_crosscoder.config.inputs import CONTEXT_SIZE
from tl_crosscoder.config.presets import preset_name
from tl_crosscoder.config.scan import ScanSettings
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.data.cache import ActivationCache, open_cache
from tl_crosscoder.data.documents import Document
from tl_crosscoder.data.mixture import SplitText
from tl_crosscoder.data.text import (
    Text,
    check_text,
    checked_text,
    text_at_hand,
    text_of_run,
    write_documents,
)
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.files import EXAMPLES_NAME, HELD_OUT_NAME, RECORD_NAME, SCAN_NAMES
from tl_crosscoder.locks import locked
from tl_crosscoder.mesh import Mesh, mesh_of
from tl_crosscoder.models.loading import options_of_each
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.site import ANY_HOOK, sites_of
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.progress import note, silenced
from tl_crosscoder.results.render import wrapped
from tl_crosscoder.run.run import Run, save_measurement
from tl_crosscoder.run.scan import scanned
from tl_crosscoder.train.checkpoint import check_output, read_record
from tl_crosscoder.train.parallel.trainer import ParallelTrainer
from tl_crosscoder.train.presets import crosscoder_config, recipe_of
from tl_crosscoder.train.trainer import Trainer, fit_each

Content = TokenizedText | list[Document] | None
"""Text at hand; None is read by its name."""


def train(
    config: RunConfig,
    *,
    models: ModelPair | None = None,
    text: Text | None = None,
    resume: bool = False,
    choose_hook: bool = False,
) -> Run:
    """Train and measure a dictionary, in a folder; arguments and errors as `train_all`."""
    how = {"resume": resume, "choose_hook": choose_hook}
    return train_all([config], models=models, text=text, **how)[0]


def train_all(
    configs: Sequence[RunConfig],
    *,
    models: ModelPair | None = None,
    text: Text | None = None,
    resume: bool = False,
    choose_hook: bool = False,
) -> list[Run]:
    """Train and measure dictionaries on the same activations, each in a folder.

    The models run once for all; every dictionary is what it would have been alone. The configs may
    differ in what a dictionary is made of and how fast it learns, not in models and text. See the
    module for what is left in `config.output`. Of several processes that `torchrun` started, which
    train and measure one dictionary together, the first returns the run; the others return nothing.

    Args:
        configs: the runs.
        models: loaded models, in place of the names in the config.
        text: documents or contexts, in place of the name in the config.
        resume: continue what a folder holds; a run that is whole there stays as it is.
        choose_hook: read the loaded models at the hook point that a layer scan recommends, in place
            of theirs. Models that are named without a hook point always are; what is continued is
            read where it was begun.

    Raises:
        ValueError, FileNotFoundError: bad input, or an output that another process writes to,
            before any long work; nothing is overwritten.
        FloatingPointError: runs whose loss is not finite, by name; the others are complete.
        TrainingInterruptedError: see `Trainer.fit`.
    """
    how = {"models": models, "text": text, "resume": resume, "choose_hook": choose_hook}
    first = configs[0]
    mesh_here = mesh_of(first.data_parallel, first.latent_parallel, device=first.device)
    with mesh_here as mesh:
        if mesh is None:
            return _locked(configs, **how)
        if len(configs) > 1:
            raise ValueError(
                f"several processes train one dictionary at a time, and these are {len(configs)}: "
                "train each of a sweep by a command of its own."
            )
        with silenced(not mesh.is_first):
            return _locked(configs, mesh=mesh, **how)


def _locked(configs: Sequence[RunConfig], *, mesh: Mesh | None = None, **how: Any) -> list[Run]:
    """Train in folders that no other process writes to."""

    def check() -> None:
        for config in configs:
            check_output(files.user_path(config.output), resume=how["resume"])

    check() if mesh is None else mesh.by_first(check)
    with ExitStack() as stack:
        for config in configs if mesh is None or mesh.is_first else ():
            stack.enter_context(locked(files.user_path(config.output)))
        return _train_all(configs, mesh=mesh, **how)


def _train_all(
    configs: Sequence[RunConfig],
    *,
    models: ModelPair | None,
    text: Text | None,
    resume: bool,
    choose_hook: bool,
    mesh: Mesh | None,
) -> list[Run]:
    first, scan = configs[0], None
    chooses = first.cache is None and (choose_hook or (models is None and not first.hook_name))
    begun_at = _begun_at(configs) if chooses and resume else None
    if chooses:
        configs = [replace(config, hook_name=begun_at or ANY_HOOK) for config in configs]
    source, content = _opened(configs[0], models, text)
    configs = [_fitted(config, source, content, is_loaded=models is not None) for config in configs]
    for config in configs:
        crosscoder_config(source, config, config.preset)  # refuses what cannot be
    if chooses and isinstance(source, ModelPair):
        if begun_at is None:
            settings, asked = ScanSettings(), (configs[0], source, content)
            scan = (
                scanned(*asked, settings=settings)
                if mesh is None
                else mesh.by_first(lambda: scanned(*asked, settings=settings))
            )
            note(wrapped(scan.line()))
            configs = [replace(config, hook_name=scan.hook_name) for config in configs]
        source = source.at(str(configs[0].hook_name).split(","))
    read = _text(configs[0], source, content)
    kind = Trainer if mesh is None else partial(ParallelTrainer, mesh=mesh)
    trainers = [
        kind(
            source,
            read.training,
            read.held_out,
            config=config,
            recipe=config.preset,
            output=config.output,
            resume=resume,
        )
        for config in configs
    ]
    _say(trainers, read)
    mesh = mesh or Mesh()
    for trainer in trainers if mesh.is_first else ():
        if scan is not None and trainer.output is not None:
            scan.save(trainer.output / SCAN_NAMES[0])
    _fit_and_measure(trainers, source, read, mesh)
    if not mesh.is_first:
        return []
    loaded = source if isinstance(source, ModelPair) else None
    return [Run(path=Path(c.output), device=str(source.device), loaded=loaded) for c in configs]


def _begun_at(configs: Sequence[RunConfig]) -> str | None:
    """Hook point of the run that one of the folders holds."""
    folders = [files.user_path(config.output) for config in configs]
    records = [read_record(folder) for folder in folders if (folder / RECORD_NAME).is_file()]
    return records[0]["training"].get("hook_name") if records else None


def _opened(
    config: RunConfig, models: ModelPair | None, text: Text | None
) -> tuple[ActivationSource, Content]:
    """What is run over, and documents or contexts where they are at hand; small checks first."""
    content = None if text is None else checked_text(text)
    if isinstance(content, str | Path):
        raise ValueError(f"text is {str(content)!r}: a name belongs in the config's text.")
    if config.cache is not None and models is None and content is None:
        return open_cache(config), None
    if models is None:
        check_models(config)
    if content is None:
        check_text(config)
    return models or ModelPair.from_config(config), content


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


def _say(trainers: Sequence[Trainer], text: SplitText) -> None:
    """Print what is going to be done: models, hook points, text, and the numbers of each run."""
    sites = trainers[0].source.sites
    named = [*(s.minus for s in sites if s.minus), *sites]
    models = " and ".join(dict.fromkeys(s.label for s in named))
    hooks = ", ".join(dict.fromkeys(s.hook_name for s in named))
    lines = [f"{models} at {hooks}; {text.describe()}"]
    for trainer in trainers:
        plan, config = trainer.plan, trainer.config
        name = preset_name(config.preset) if isinstance(config, RunConfig) else "dictionary"
        k = getattr(trainer.cfg.sparsity, "k", None)
        lines.append(
            f"{name}, {plan.d_sae:,} latents{'' if k is None else f', k {k:g}'}: "
            f"{plan.n_tokens:,} activation pairs in batches of {plan.batch_size:,}, learning rate "
            f"{plan.lr:g} after {plan.lr_warmup_steps} steps. The run is kept in {trainer.output}."
        )
    note("\n".join(map(wrapped, lines)))


def _fit_and_measure(
    trainers: list[Trainer], source: ActivationSource, text: SplitText, mesh: Mesh
) -> None:
    folders = [t.output for t in trainers if t.output is not None]
    is_done = mesh.by_first(
        lambda: [t.is_complete and _is_measured(f) for f, t in zip(folders, trainers, strict=True)]
    )
    if text.held_out_documents and mesh.is_first:
        for folder in folders:
            write_documents(folder / HELD_OUT_NAME, text.held_out_documents)
    made = fit_each(trainers)
    trainers.clear()  # and with them gradients and optimizer, several times the dictionary
    left = {
        folder: one
        for folder, one, done in zip(folders, made, is_done, strict=True)
        if isinstance(one, Crosscoder) and not done
    }
    if left:
        how = {"show_progress": True, "axis": mesh.world}
        measured = measure_all(source, [*left.values()], text.held_out, **how)
        for folder, measurement in zip(left, measured, strict=True) if mesh.is_first else ():
            of = {"text": text.held_out, "tokenizer": source.tokenizer}
            save_measurement(measurement, folder, **of)
    failed = [one for one in made if isinstance(one, FloatingPointError)]
    if failed and len(made) > 1:
        raise FloatingPointError(
            f"{len(failed)} of {len(made)} runs failed, and the others are complete: "
            f"{' '.join(map(str, failed))} Without these, the sweep goes on with resume (--resume)."
        )
    if failed:
        raise failed[0]


def _is_measured(folder: Path) -> bool:
    try:
        Measurement.load(folder)
        ExampleDatabase.open(folder / EXAMPLES_NAME).close()
    except (FileNotFoundError, ValueError):  # none, damaged, or of an earlier version
        return False
    return True


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


def _text(config: RunConfig, source: ActivationSource, content: Content) -> SplitText:
    if content is not None:
        return text_at_hand(config, source, content)
    if config.cache is None or isinstance(source, ModelPair):
        return text_of_run(config, source)
    cache = cast(ActivationCache, source)
    n = math.ceil(config.n_measured_tokens / cache.n_ctx)
    return SplitText(training=cache.training, held_out=cache.held_out[:n], held_out_documents=[])
