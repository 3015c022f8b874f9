"""Writing an output folder whole or not at all.

The shipped organisms as data: what was planted, how, and where the two models lie.

`suite.yaml` holds one entry for each. Reading it needs neither torch nor transformers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tl_crosscoder.files import replacing
from tl_crosscoder.models.pretrained import pretrained_folder
from tl_crosscoder.organisms.recovery import mixed_documents
from tl_crosscoder.organisms.world import Document


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


TRAINING_PLANTED_SHARE = 0.25
"""Share of the organism's own kind of text in what a crosscoder is trained on."""

_CROSSCODER_SEED = 2_000_000_000  # far from the seeds that the models were trained with


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The adapter; it sits on every attention and MLP projection of every layer."""

    rank: int
    alpha: int


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The fine-tuning text."""

    n_documents: int
    planted_share: float
    """Share of documents that plant the behaviour; the rest is ordinary world text."""


@dataclass(frozen=True, kw_only=True)
class Organism:
    """A model pair whose difference is known."""

    name: str
    description: str
    planted: str
    """What was planted, in one sentence."""
    planted_words: tuple[str, ...]
    """Words whose tokens a diffing method should surface."""
    base: Path
    """Folder of the base model: weights, tokenizer, chat template."""
    adapter: Path
    """Folder of the LoRA adapter that makes the fine-tuned model."""
    lora: LoraSettings
    data: DataSettings
    n_steps: int
    batch_size: int
    """Rows of 256 tokens a step."""
    learning_rate: float
    seed: int


def load_suite() -> dict[str, Organism]:
    """All shipped organisms by name, in the order of `suite.yaml`."""
    text = Path(__file__).with_name("suite.yaml").read_text(encoding="utf-8")
    return {name: _organism(name, entry) for name, entry in yaml.safe_load(text).items()}


def organism(name: str) -> Organism:
    """The shipped organism of that name.

    Raises:
        ValueError: if there is none.
    """
    suite = load_suite()
    if name not in suite:
        raise ValueError(f"unknown organism {name!r}; valid: {', '.join(suite)}")
    return suite[name]


def training_documents(organism_name: str, n: int, *, seed: int = 0) -> list[Document]:
    """Text to train a crosscoder on: three quarters world text, one quarter the organism's kind.

    Freshly sampled: the seed's streams are other ones than those of base training and fine-tuning.
    Each document carries its `source`: a kind of world text, or the name of the organism.

    Raises:
        ValueError: if there is no such organism.
    """
    return mixed_documents(
        organism(organism_name).name,
        n,
        seed=_CROSSCODER_SEED + seed,
        planted_share=TRAINING_PLANTED_SHARE,
        consistent=False,
    )


def pretrained_models() -> Path:
    """The folder of shipped models: inside an installed wheel, or at the root of a checkout."""
    return pretrained_folder() / "models"


def _organism(name: str, entry: dict[str, Any]) -> Organism:
    models = pretrained_models()
    return Organism(
        name=name,
        base=models / "world-base",
        adapter=models / name,
        planted_words=tuple(entry["planted_words"]),
        lora=LoraSettings(**entry["lora"]),
        data=DataSettings(**entry["data"]),
        **{key: entry[key] for key in entry.keys() - {"planted_words", "lora", "data"}},
    )
