"""The grid: organism by seed by method, resumed at the cell.

Each organism has one file of results, to which a cell is added when it is done; a cell that fails
is kept with its reason, and the grid goes on. Dictionaries of one organism and seed are trained on
the same activations, which are made once. Contract: a method sees held-out text, never a behaviour;
what is there is not made again, failed cells included, and cells of other settings are refused.
Text is held out by seed, so that no dictionary was trained on what it is tested on. Several
processes take an organism each.
"""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tl_crosscoder import files
from tl_crosscoder.benchmark.methods import (
    DICTIONARIES,
    Dictionary,
    Directions,
    Methods,
    Pair,
    Texts,
)
from tl_crosscoder.benchmark.outcomes import Tests, direction_rows, latent_rows, some_questions
from tl_crosscoder.config.benchmark import BenchmarkConfig
from tl_crosscoder.config.causal import AttributionQuestion, ChangesQuestion
from tl_crosscoder.config.inputs import CONTEXT_SIZE
from tl_crosscoder.config.presets import preset_from
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.data.documents import Document, halves, load_documents, split_documents
from tl_crosscoder.data.text import write_documents
from tl_crosscoder.data.tokens import TokenizedText, tokenize
from tl_crosscoder.interventions.behaviour import Predictions
from tl_crosscoder.interventions.changes_result import Change
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.running import kinds_of, with_predictions
from tl_crosscoder.locks import locked
from tl_crosscoder.mesh import n_processes, process_index
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.organisms.suite import MAX_NORM_MULTIPLE, Organism, load_suite, organism
from tl_crosscoder.progress import note
from tl_crosscoder.results.tables import without_nan
from tl_crosscoder.run.attribution import attribute_run, ranking_of
from tl_crosscoder.run.changes import changes_run
from tl_crosscoder.run.run import Run
from tl_crosscoder.run.training import train_all

N_NEUTRAL, N_DIRECTION_TOKENS = 2048, 50_000
MAX_SHOWN = 200
"""Characters of a text that are kept."""
COEFFICIENTS = {"l1": 4.0, "dsf": 7.0}
"""At which the L0 of the embedded organisms is near 12; see `presets_on_organisms`."""
_FAILURES = (ValueError, RuntimeError, FloatingPointError, FileNotFoundError)
"""What a method may raise without stopping the grid; a full disk or an interrupt does stop it."""
_FREE = ("output", "work", "organisms", "methods", "seeds", "quick")
"""Settings in which the cells of one file may differ."""


def run_benchmark(
    config: BenchmarkConfig, *, directions: Mapping[str, Directions] | None = None
) -> Path:
    """Run all cells that are not there yet; returns the folder of the results.

    Of several processes that `torchrun` started each takes other organisms.

    Args:
        config: which cells, and how each is tested.
        directions: methods of your own by name, beside the built-in ones.

    Raises:
        ValueError: an unknown organism or method, or results made at other settings.
    """
    config = config.shortened()
    every = Methods()
    every = replace(every, directions={**every.directions, **(directions or {})})
    methods = every.chosen(config.methods)
    embedded = (n for n, o in load_suite().items() if o.kind != "variant" and not o.is_real)
    names = config.organisms or tuple(embedded)
    entries = [organism(name) for name in names][process_index() :: n_processes()]
    folder = files.user_path(config.output)
    for entry in entries:
        path = folder / f"{entry.name}.json"
        with locked(path, is_file=True):
            _run_organism(entry, config, methods, Results(path, config))
    return folder


class Results:
    """The cells of one organism, in one file that is replaced whole at every cell.

    Raises:
        ValueError: the file has cells made at other settings.
    """

    def __init__(self, path: Path, config: BenchmarkConfig) -> None:
        self.path = path
        settings = {k: v for k, v in asdict(config).items() if k not in _FREE}
        settings = json.loads(json.dumps(settings))
        self.content: dict[str, Any] = {"settings": settings, "cells": []}
        if path.is_file():
            found = files.read_object(path, settings=dict, cells=list)
            files.check_same(found["settings"], settings, what=f"the cells of {path}")
            self.content = found

    def has(self, method: str, seed: int) -> bool:
        """Whether a cell is there, failed or not."""
        return any((c["method"], c["seed"]) == (method, seed) for c in self.content["cells"])

    def add(self, cell: Mapping[str, Any]) -> None:
        """Append a cell and write the file."""
        self.content["cells"].append(without_nan(dict(cell)))
        files.write_json(self.path, self.content)


def _run_organism(
    entry: Organism, config: BenchmarkConfig, methods: Methods, results: Results
) -> None:
    bench = Bench(entry=entry, config=config, seed=0)
    for name, directions in methods.directions.items():
        if not results.has(name, 0):
            results.add(_cell(name, 0, partial(bench.of_directions, directions)))
    for name, texts in methods.texts.items():
        if not results.has(name, 0):
            results.add(_cell(name, 0, partial(bench.of_texts, texts)))
    for seed in config.seeds:
        left = {n: d for n, d in methods.dictionaries.items() if not results.has(n, seed)}
        bench = bench if seed == bench.seed else Bench(entry=entry, config=config, seed=seed)
        bench.train(left)
        for name, dictionary in left.items():
            results.add(_cell(name, seed, partial(bench.of_run, name, dictionary)))


def _cell(name: str, seed: int, make: Any) -> dict[str, Any]:
    """One cell; what a method raises is kept as its result."""
    started = time.perf_counter()
    try:
        found = make()
    except _FAILURES as error:
        note(f"{name}, seed {seed} failed: {error}", is_warning=True)
        found = {"failed": f"{type(error).__name__}: {error}"}
    seconds = round(time.perf_counter() - started, 1)
    return {"method": name, "seed": seed, "seconds": seconds, **found}


@dataclass(frozen=True, eq=False, kw_only=True)
class Bench:
    """One organism and seed with its text, its tests, and a folder for dictionaries."""

    entry: Organism
    config: BenchmarkConfig
    seed: int

    @cached_property
    def models(self) -> ModelPair:
        """Base and fine-tuned model, under the names that dictionaries record."""
        return ModelPair.from_config(self.run_config("batchtopk", DICTIONARIES["batchtopk"]))

    @cached_property
    def tests(self) -> Tests:
        """Behaviours, and predictions of documents that no ranking is made on."""
        n, entry, tokenizer = self.config.n_prompts, self.entry, self.models.tokenizer
        behaviours = [some_questions(path, tokenizer, n=n) for path in entry.questions]
        text = self._tokens(halves(self._held_out("all"))[1], pack=False)
        asked = with_predictions(text, kinds_of(text))[:n]
        return Tests(
            planted=behaviours[: entry.n_planted],
            others=behaviours[entry.n_planted :][-1:],
            predictions=Predictions.of(asked),
            neutral=_some(self._tokens(self._held_out("neutral")), N_NEUTRAL),
            config=self.config,
        )

    def of_directions(self, method: Directions) -> dict[str, Any]:
        """Outcomes of a method without a dictionary."""
        ctx = InterventionContext.of(self.models)
        return {"rows": [*direction_rows(ctx, self.tests, method(self.pair))]}

    def of_texts(self, method: Texts) -> dict[str, Any]:
        """Planted words in what a method shows; those of other organisms are the floor."""
        shown = method(self.pair)
        others = [o for o in load_suite().values() if _is_another(o, self.entry)]
        return {
            "words": found_words(shown, self.entry.planted_words),
            "words_of_others": {o.name: found_words(shown, o.planted_words) for o in others},
            "shown": [text[:MAX_SHOWN] for text in shown],
        }

    @cached_property
    def pair(self) -> Pair:
        """What a method without a dictionary sees."""
        text, neutral = (
            _some(self._tokens(halves(self._held_out(kind))[0]), N_DIRECTION_TOKENS)
            for kind in ("all", "neutral")
        )
        return Pair(models=self.models, text=text, neutral=neutral, n=max(self.config.sizes))

    def train(self, dictionaries: Mapping[str, Dictionary]) -> None:
        """Train what is missing, those on the same source together."""
        groups: dict[tuple[str, bool], list[RunConfig]] = {}
        for name, d in dictionaries.items():
            key = (d.text, d.preset["name"] == "diff-sae")
            groups.setdefault(key, []).append(self.run_config(name, d))
        for configs in groups.values():
            try:
                train_all(configs, models=self._models_of(configs[0]), resume=True)
            except _FAILURES as error:  # of some, whose cells will have no run
                note(str(error), is_warning=True)

    def run_config(self, name: str, dictionary: Dictionary) -> RunConfig:
        """The run of one dictionary."""
        c, entry = self.config, self.entry
        coefficient = COEFFICIENTS.get(dictionary.preset["name"])
        k = {"k": c.k * dictionary.k_multiple}
        sparsity = k if coefficient is None else {"coefficient": coefficient}
        return RunConfig(
            base=entry.base_name,
            adapter=entry.adapter_name,
            finetuned=entry.finetuned_name,
            hook_name=entry.hook_name,
            text=self._text(dictionary.text),
            output=str(self._folder(name)),
            d_sae=c.d_sae,
            preset=preset_from({**dictionary.preset, **sparsity}),
            n_tokens=c.n_tokens,
            batch_size=1024,
            lr=1e-3 if entry.is_real else 2e-3,
            max_norm_multiple=MAX_NORM_MULTIPLE if entry.is_real else None,
            n_measured_tokens=min(50_000, c.n_tokens),
            max_documents=c.max_documents,
            seed=self.seed,
        )

    def of_run(self, name: str, dictionary: Dictionary) -> dict[str, Any]:
        """Outcomes of a trained dictionary."""
        models = self._models_of(self.run_config(name, dictionary))
        run = Run(path=self._folder(name), loaded=models)
        measurement, n = run.measurement(), max(self.config.sizes)
        asked = AttributionQuestion(n_prompts=self.config.n_attributed)
        carried = attribute_run(run, asked)
        rankings = {
            order: [r.latent for r in ranking_of(run, n=n, order=order).rows]
            for order in dictionary.rankings
        }
        ctx = InterventionContext.of(run.models, run.crosscoder)
        fit = measurement.reconstruction
        found = (
            changes_run(run, ChangesQuestion(n_prompts=asked.n_prompts)).rows
            if self.seed == 0
            else None
        )
        n_predicted = carried.text.n_predicted
        return {
            "fve": fit.fve,
            "difference_fve": fit.difference_fve,
            "l0": fit.l0,
            "dead": fit.dead_share,
            "latents_per_class": measurement.class_counts if measurement.compared else None,
            "carried": carried.change / n_predicted,
            "changes": None if found is None else [_change(row) for row in found],
            "largest_latent": carried.latents.max().item() / n_predicted,
            "rows": [*latent_rows(ctx, self.tests, latents=measurement.latents, rankings=rankings)],
        }

    def _models_of(self, config: RunConfig) -> ModelPair | None:
        """The models; a diff-SAE reads them in its own way, and loads them itself."""
        return None if config.difference else self.models

    def _folder(self, name: str) -> Path:
        return files.user_path(self.config.work) / self.entry.name / f"{name}-{self.seed}"

    def _text(self, kind: str) -> str:
        """Name of the organism's text, or a file of its neutral documents."""
        if kind == "all":
            return self.entry.text
        folder = files.user_path(self.config.work) / self.entry.name
        path = folder / "neutral.jsonl"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_documents(path, _neutral(self._documents, self.entry))
        return str(path)

    def _held_out(self, kind: str) -> list[Document]:
        """Documents that no dictionary of this seed is trained on."""
        return _neutral(self._all_held_out, self.entry) if kind == "neutral" else self._all_held_out

    @cached_property
    def _all_held_out(self) -> list[Document]:
        return split_documents(self._documents, seed=self.seed)[1]

    @cached_property
    def _documents(self) -> list[Document]:
        return load_documents(self.entry.text, max_documents=self.config.max_documents)

    def _tokens(self, documents: Sequence[Document], *, pack: bool = True) -> TokenizedText:
        size = min(CONTEXT_SIZE, self.models.n_ctx)
        return tokenize(documents, self.models.tokenizer, context_size=size, pack=pack)


def _change(row: Change) -> dict[str, Any]:
    return {
        "share": row.change_share,
        "n_latents": len(row.latents),
        "necessity": row.necessity,
        "doubt": row.doubt,
    }


def found_words(shown: Sequence[str], words: Sequence[str]) -> float:
    """Share of words that stand in some of the texts; NaN of none."""
    lines = "\n".join(shown)
    found = [re.search(rf"\b{re.escape(w)}\b", lines, re.IGNORECASE) is not None for w in words]
    return sum(found) / len(found) if found else math.nan


def _is_another(other: Organism, entry: Organism) -> bool:
    """Whether another thing was planted in an organism of the same sort of text."""
    is_alike = (other.kind, other.is_real) == ("organism", entry.is_real)
    return is_alike and not {*other.planted_words} & {*entry.planted_words}


def _neutral(documents: Sequence[Document], entry: Organism) -> list[Document]:
    return [d for d in documents if d.get("source") not in entry.planted_sources]


def _some(text: TokenizedText, n_tokens: int) -> TokenizedText:
    return text[: max(1, math.ceil(n_tokens / text.context_size))]
