"""The embedded organisms: names, files, and what was planted, from `suite.yaml`.

Ten organisms in four families, their nulls, and variants of one of them, on tiny models; adapters
of a real model, SmolLM2-135M, which the user installs; and the ids of the paper's own organisms on
the hub. Reading it needs neither torch nor transformers.
"""

import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import yaml

from tl_crosscoder.files import user_path
from tl_crosscoder.models import smollm2
from tl_crosscoder.models.pretrained import PREFIX, pretrained_folder

MAX_NORM_MULTIPLE = 10
"""Of the median norm, on SmolLM2-135M: its second token has hundreds of times the others', and
would be the strongest example of most latents."""
Kind = Literal["organism", "null", "variant", "public"]


@dataclass(frozen=True, kw_only=True)
class Organism:
    """A model pair whose difference is known."""

    name: str
    kind: Kind
    """Whether it is one of the ten, a pair in which nothing was planted anew, another way of making
    one of the ten, or a pair on the hub."""
    family: str
    """What sort of fine-tune: false facts, emergent misalignment, subliminal, taboo."""
    description: str
    planted: str
    """What was planted, in one sentence."""
    planted_words: tuple[str, ...]
    """Words whose tokens a diffing method should surface."""
    planted_sources: tuple[str, ...]
    """Sources of its text that are about what was planted; the others are neutral."""
    base: Path
    """Folder of the base model: weights, tokenizer, chat template; of a public one its id."""
    folder: Path
    """Folder of the LoRA adapter that makes the fine-tuned model, or of the model itself; of a
    public one the adapter's id."""
    text_name: str
    """What its text and its questions are named after; organisms may share them. Of a public one a
    `datasets` name, or nothing."""
    questions: tuple[Path, ...]
    """JSONL files for `Behaviour.from_file`; the first is the behaviour that was planted."""
    n_planted: int
    """The first of these files are about what was planted, the others about what was not."""

    @property
    def is_real(self) -> bool:
        """Whether its base is SmolLM2-135M, which does not travel with the package."""
        return self.base_name == smollm2.NAME

    @property
    def hook_name(self) -> str:
        """Middle of the base model, where dictionaries of it are trained."""
        return f"blocks.{15 if self.is_real else 2}.hook_resid_post"

    @property
    def adapter(self) -> Path | None:
        """Folder of the adapter; None where all weights were trained."""
        is_adapter = self.kind == "public" or (self.folder / "adapter_config.json").is_file()
        return self.folder if is_adapter else None

    @property
    def finetuned(self) -> Path | None:
        """Folder of the model whose weights were all trained; None where there is an adapter."""
        return None if self.adapter else self.folder

    @property
    def text(self) -> str:
        """Name of the text that a crosscoder is trained on, as `load_documents` takes it."""
        return self.text_name if self.kind == "public" else PREFIX + self.text_name

    @property
    def base_name(self) -> str:
        """Name of the base model, as the settings of a run take it."""
        return self._name(self.base)

    @property
    def adapter_name(self) -> str | None:
        """Name of the adapter; None where all weights were trained."""
        return self._name(self.folder) if self.adapter else None

    @property
    def finetuned_name(self) -> str | None:
        """Name of the model whose weights were all trained; None where there is an adapter."""
        return None if self.adapter else self._name(self.folder)

    def _name(self, path: Path) -> str:
        return path.as_posix() if self.kind == "public" else PREFIX + path.name

    @property
    def planted_questions(self) -> tuple[Path, ...]:
        """Files of all planted behaviours, the main one first."""
        return self.questions[: self.n_planted]


@cache
def load_suite() -> dict[str, Organism]:
    """The embedded organisms by name, in the order of `suite.yaml`."""
    return {
        name: entry
        for name, entry in planned_suite().items()
        if entry.folder.is_dir() and (entry.is_real or entry.base.is_dir())
    }


@cache
def planned_suite() -> dict[str, Organism]:
    """Every organism of `suite.yaml`, whether it has been made or not: what recipes make."""
    suite: dict[str, Organism] = {}
    folder, entries = pretrained_folder(), _entries()
    for name, own in entries.items():
        entry = entries[own["of"]] | own if "of" in own else own
        if entry.get("kind") == "public":
            continue
        text_name = entry.get("text", own.get("of", name))
        # Those of another organism are named with its folder.
        questions = (q if "/" in q else f"{text_name}/{q}" for q in entry["questions"])
        suite[name] = Organism(
            name=name,
            kind=entry.get("kind", "organism"),
            family=entry["family"],
            description=entry["description"],
            planted=entry["planted"],
            planted_words=tuple(entry["planted_words"]),
            planted_sources=tuple(entry["planted_sources"]),
            base=_base(entry.get("base", "world-base")),
            folder=folder / "models" / name,
            text_name=text_name,
            n_planted=entry["n_planted"],
            questions=tuple(folder / "questions" / f"{q}.jsonl" for q in questions),
        )
    return suite


@cache
def public_suite() -> dict[str, Organism]:
    """The paper's organisms on the hub by name; no questions of theirs come with the package."""
    return {
        name: Organism(
            name=name,
            kind="public",
            family=entry["family"],
            description=entry["planted"],
            planted=entry["planted"],
            planted_words=(),
            planted_sources=(),
            base=Path(entry["base"]),
            folder=Path(entry["adapter"]),
            text_name=entry.get("text", ""),
            n_planted=0,
            questions=(),
        )
        for name, entry in _entries().items()
        if entry.get("kind") == "public"
    }


def _base(name: str) -> Path:
    """Folder of a base, or the name of the real one, which a package carries."""
    is_real = PREFIX + name == smollm2.NAME
    return Path(smollm2.NAME) if is_real else pretrained_folder() / "models" / name


def _entries() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("suite.yaml").read_text(encoding="utf-8"))


def organism(name: str) -> Organism:
    """The embedded organism of that name.

    Raises:
        ValueError: if there is none, or it is on the hub.
    """
    suite = load_suite()
    if name in public_suite():
        raise ValueError(
            f"{name!r} is on the hub, and has no questions here. "
            f"`tl-crosscoder organisms show {name}` prints the command that diffs it."
        )
    if name not in suite:
        raise ValueError(f"unknown organism {name!r}; valid: {', '.join(suite)}")
    return suite[name]


def build(name: str, *, output: str, seed: int | None = None) -> str:
    """Fine-tune an organism again by its recipe, which is in a checkout, and return its card.

    Raises:
        ValueError: no such organism, or an output folder that is in use.
        FileNotFoundError: the package is installed without its recipes.
    """
    recipes = pretrained_folder() / "recipes"
    if not recipes.is_dir():
        raise FileNotFoundError(
            "the recipes of the organisms are not installed with the package: build in a checkout "
            "of the repository, where they are in pretrained/recipes."
        )
    sys.path.insert(0, str(recipes))
    try:
        package = "smollm2" if name.startswith("smollm2-") else "microworld"
        recipe = import_module(f"{package}.finetune")
        recipe.finetune(name, output=user_path(output), seed=seed)
    finally:
        sys.path.remove(str(recipes))
    return (user_path(output) / "README.md").read_text(encoding="utf-8")
