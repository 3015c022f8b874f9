"""The embedded organisms: names, files, and what was planted, from `suite.yaml`.

Reading it needs neither torch nor transformers.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

from tl_crosscoder.models.pretrained import PREFIX, pretrained_folder


@dataclass(frozen=True, kw_only=True)
class Organism:
    """A model pair whose difference is known."""

    name: str
    description: str
    planted: str
    """What was planted, in one sentence."""
    planted_words: tuple[str, ...]
    """Words whose tokens a diffing method should surface."""
    planted_sources: tuple[str, ...]
    """Sources of its text that are about what was planted; the others are neutral."""
    base: Path
    """Folder of the base model: weights, tokenizer, chat template."""
    adapter: Path
    """Folder of the LoRA adapter that makes the fine-tuned model."""
    text: str
    """Name of the text that a crosscoder is trained on, as `load_documents` takes it."""
    questions: tuple[Path, ...]
    """JSONL files for `Behaviour.from_file`; the first is the behaviour that was planted."""
    n_planted: int
    """The first of these files are about what was planted, the others about what was not."""

    @property
    def planted_questions(self) -> tuple[Path, ...]:
        """Files of all planted behaviours, the main one first."""
        return self.questions[: self.n_planted]


def load_suite() -> dict[str, Organism]:
    """All embedded organisms by name, in the order of `suite.yaml`."""
    entries = yaml.safe_load(Path(__file__).with_name("suite.yaml").read_text(encoding="utf-8"))
    folder = pretrained_folder()
    return {
        name: Organism(
            name=name,
            description=entry["description"],
            planted=entry["planted"],
            planted_words=tuple(entry["planted_words"]),
            planted_sources=tuple(entry["planted_sources"]),
            base=folder / "models/world-base",
            adapter=folder / "models" / name,
            text=PREFIX + name,
            n_planted=entry["n_planted"],
            questions=tuple(folder / "questions" / name / f"{q}.jsonl" for q in entry["questions"]),
        )
        for name, entry in entries.items()
    }


def organism(name: str) -> Organism:
    """The embedded organism of that name.

    Raises:
        ValueError: if there is none.
    """
    suite = load_suite()
    if name not in suite:
        raise ValueError(f"unknown organism {name!r}; valid: {', '.join(suite)}")
    return suite[name]
