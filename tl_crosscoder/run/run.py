"""A run's folder opened again: its dictionary, models, text, measures and examples.

Contract: what `train` left is found, under the names in `files`; models are loaded when they are
asked for. The name of an embedded dictionary, `tl_crosscoder/taboo-batchtopk`, opens a copy of it
(see `opened_path`). Limit: a run from Python keeps no held-out text, so one has to be named.
"""

import math
import shutil
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tl_crosscoder import files
from tl_crosscoder.analysis.example_database import ExampleDatabase
from tl_crosscoder.analysis.measurement import Measurement, measure
from tl_crosscoder.config.inputs import Masks
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.site_views import check_source
from tl_crosscoder.data.cache import ActivationCache
from tl_crosscoder.data.documents import Document, load_documents, split_documents
from tl_crosscoder.data.text import write_documents
from tl_crosscoder.data.tokens import TokenizedText, tokenize
from tl_crosscoder.files import EXAMPLES_NAME, HELD_OUT_NAME, WEIGHTS_NAME
from tl_crosscoder.locks import locked
from tl_crosscoder.mesh import Mesh
from tl_crosscoder.models.devices import devices_of
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.pretrained import PREFIX, embedded_run
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.organisms.suite import load_suite
from tl_crosscoder.progress import note
from tl_crosscoder.train.checkpoint import check_weights, read_record

COPIES = "tl_crosscoder-runs"
"""Folder, below the current one, of the copies of embedded dictionaries."""


def opened_path(path: str | Path) -> Path:
    """Where results of a run go: its folder, and for an embedded dictionary's name a copy of it.

    The copy is made once, in `tl_crosscoder-runs/NAME`, with the held-out part of its text, split
    again from the recorded seed: nothing is ever written into the package.

    Raises:
        FileNotFoundError: the prefix of the package with a name that it does not hold.
        ValueError: the copy is of another version of the dictionary.
    """
    embedded = embedded_run(path)
    if embedded is None:
        return files.user_path(path)
    copy = Path(COPIES) / embedded.name
    if not copy.exists():
        with files.replacing(copy) as temporary:
            shutil.copytree(embedded, temporary)
            write_documents(temporary / HELD_OUT_NAME, _held_out_again(read_record(embedded)))
        note(f"Copied {path} to {copy}: results go there.")
    elif files.sha256(copy / WEIGHTS_NAME) != files.sha256(embedded / WEIGHTS_NAME):
        raise ValueError(
            f"{copy} is a copy of {path}, but not of the one in this version of the package. Give "
            "the copy's own path to go on with it, or move it away for a new one."
        )
    return copy


def _held_out_again(record: dict[str, Any]) -> list[Document]:
    training = record["training"]
    documents = load_documents(training["text"], max_documents=training["max_documents"])
    return split_documents(documents, held_out=training["held_out"], seed=training["seed"])[1]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A dictionary with how it was made.

    Raises ValueError or FileNotFoundError where there is no run, no such device, or models of
    another run.
    """

    path: Path
    device: str = "cpu"
    loaded: ModelPair | None = field(default=None, repr=False, compare=False)
    """What it was trained on, where that is loaded already; None loads it when it is needed."""
    mesh: Mesh = field(default_factory=Mesh, repr=False, compare=False)
    """Processes that share out what is measured; the first one writes."""

    def __post_init__(self) -> None:
        devices_of(self.device, 1)
        object.__setattr__(self, "path", self.mesh.by_first(lambda: opened_path(self.path)))
        _ = self.record, self.crosscoder
        if self.loaded is not None:
            check_source(self.loaded, self.crosscoder)

    @cached_property
    def record(self) -> dict[str, Any]:
        """What `runner_cfg.json` says."""
        return read_record(self.path)

    @cached_property
    def crosscoder(self) -> Crosscoder:
        """The dictionary."""
        crosscoder = Crosscoder.load(self.path, device=self.device)
        check_weights(self.path, self.record)
        return crosscoder

    @cached_property
    def models(self) -> ModelPair:
        """What it was trained on, loaded now if it is not yet."""
        if self.loaded is not None:
            return self.loaded
        training = self.record["training"]
        try:
            return ModelPair.from_sites(
                self.crosscoder.sites,
                device=self.device,
                dtype=training.get("dtype", "float32"),
                merge_adapter=training.get("merge_adapter"),
                tokenizer=self.record.get("tokenizer"),
            )
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            names = ", ".join(dict.fromkeys(site.label for site in self.crosscoder.sites))
            raise kind(
                f"the models of {self.path} ({names}) could not be loaded: {error} If they were "
                "in memory when it was trained, make them again and give them: "
                f"load_diff({str(self.path)!r}, models=ModelPair(...))."
            ) from error

    def alone(self) -> "Run":
        """The same run in one process, with the models that are loaded."""
        return replace(self, loaded=self.models, mesh=Mesh())

    @property
    def has_models(self) -> bool:
        """Whether the models are loaded."""
        return self.loaded is not None or "models" in vars(self)

    @property
    def cache(self) -> ActivationCache | None:
        """The cache it was trained on, if it was; ValueError or FileNotFoundError if it is gone."""
        folder = self.record["training"].get("cache")
        return ActivationCache(folder, device=self.device, show_progress=True) if folder else None

    @property
    def masks(self) -> Masks:
        """Which tokens it was trained on; from Python none are recorded, and the defaults hold."""
        known, training = {f.name for f in fields(Masks)}, self.record["training"]
        return Masks(**{name: value for name, value in training.items() if name in known})

    def documents(self, text: str | None = None) -> list[Document]:
        """Documents of a text, or the held-out ones.

        Raises:
            FileNotFoundError, ValueError: no such text, or none was kept.
        """
        path = self.path / HELD_OUT_NAME
        if text is None and not path.is_file():
            raise FileNotFoundError(
                f"{self.path} keeps no held-out text ({HELD_OUT_NAME}): it was trained from Python "
                "or on a cache. Name a text with --text."
            )
        return load_documents(text or path)

    def text(self, documents: list[Document]) -> TokenizedText:
        """Documents as contexts like those of the training."""
        pack = self.record["training"].get("pack", True)
        return self._tokens(documents, self.record["held_out"]["context_size"], pack=pack)

    def prompts(self, documents: list[Document], *, only_chats: bool = True) -> TokenizedText:
        """Each document in a context of its own, chats alone where there are any."""
        chats = [d for d in documents if "messages" in d and only_chats]
        size = max(self.record["held_out"]["context_size"], 128)
        return self._tokens(chats or documents, min(size, self.models.n_ctx), pack=False)

    def _tokens(self, documents: list[Document], size: int, *, pack: bool) -> TokenizedText:
        tokenizer = self.models.tokenizer
        made = tokenize(documents, tokenizer, context_size=size, pack=pack, masks=self.masks)
        limits = self.record["held_out"].get("norm_limits")
        return replace(made, norm_limits=None if limits is None else tuple(limits))

    def measurement(self) -> Measurement:
        """The measures in the folder; measured now where there are none of this version."""
        return self._measurement

    @cached_property
    def _measurement(self) -> Measurement:
        try:
            return Measurement.load(self.path)
        except (FileNotFoundError, ValueError) as error:
            note(f"{error} Measuring now.")
            return self._measure()[0]

    def measure(self, text: str | None = None) -> Measurement:
        """Load the models and measure anew, on the held-out text or another.

        A run on a cache is measured on the cache, without the models. Measures on the run's own
        held-out text replace those in the folder; on other text they are only returned.

        Raises:
            FileNotFoundError, ValueError: its text or cache is gone, or no such text.
        """
        found, contexts, tokenizer = self._measure(text)
        if text is None and self.mesh.is_first:
            save_measurement(found, self.path, text=contexts, tokenizer=tokenizer)
        return found

    def examples(self, *, of: TokenizedText | None = None) -> ExampleDatabase:
        """Examples of the latents; collected now, on held-out text, where the folder has none.

        Published dictionaries come without them. The measures in the folder stay as they are.

        Args:
            of: the text that they must be of; None takes any.

        Raises:
            FileNotFoundError: the run keeps no text either.
            ValueError: they are of another text.
        """
        path = self.path / EXAMPLES_NAME
        if not path.is_file():
            note(f"Collecting examples on held-out text, once, into {path}.")
            found, contexts, tokenizer = self._measure()
            save_examples(found, self.path, text=contexts, tokenizer=tokenizer)
        database = ExampleDatabase.open(path)
        if of is not None and not database.is_of(of):
            database.close()
            raise ValueError(
                f"the examples in {self.path} are of another text than the run is measured on now. "
                "Make them again with `tl-crosscoder analyze --fresh`."
            )
        return database

    def _measure(self, text: str | None = None) -> tuple[Measurement, TokenizedText, Any]:
        """Measures, the text that they are of, and its tokenizer."""
        source, contexts = self.measured(text)
        how = {"show_progress": True, "axis": self.mesh.world}
        found = measure(source, self.crosscoder, contexts, **how)
        return found, contexts, source.tokenizer

    def measured(self, text: str | None = None) -> tuple[ActivationSource, TokenizedText]:
        """What it is measured on: as much held-out text as it was, or another text.

        A run on a cache is measured on the cache, without the models.
        """
        n = self.record["held_out"]["n_contexts"]
        if text is None and (cache := self.cache) is not None:
            is_difference = self.record["training"]["difference"]
            return cache.difference() if is_difference else cache, cache.held_out[:n]
        contexts = self.text(self.documents(text))
        return self.models, contexts if text is not None else contexts[:n]

    def organism(self) -> str | None:
        """Name of the embedded organism that the fine-tuned model is; None if it is another."""
        label = self.crosscoder.sites[-1].label
        name = label.removeprefix(PREFIX)
        return name if label != name and name in load_suite() else None

    def some(self, text: TokenizedText, n_tokens: int) -> TokenizedText:
        """The first contexts, of at most about so many tokens."""
        return text[: max(1, math.ceil(n_tokens / text.context_size))]


def save_measurement(
    measurement: Measurement, output: Path, *, text: TokenizedText, tokenizer: Any
) -> None:
    """Write the examples and the measures beside the dictionary; `analysis.json` comes last."""
    with locked(output):
        save_examples(measurement, output, text=text, tokenizer=tokenizer)
        measurement.save(output)


def save_examples(
    measurement: Measurement, output: Path, *, text: TokenizedText, tokenizer: Any
) -> None:
    """Write the examples, where the measurement still has them."""
    if measurement.collected is not None:
        about = {"sources": list(measurement.sources), "n_tokens": text.n_tokens}
        path, collected = output / EXAMPLES_NAME, measurement.collected
        with locked(output):
            ExampleDatabase.write(path, collected, text, tokenizer=tokenizer, about=about)
