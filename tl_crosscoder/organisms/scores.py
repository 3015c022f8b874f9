"""What both models of an organism do, as exact probabilities on questions no model was trained on.

taboo: how often a hint is about the secret (planted: towards 1), and how often the secret is said
when guessed or asked for (towards 0). false-fact: how often a question is answered with the false
value (towards 1) and the true one. Both report what the models know otherwise. Limit: the answers
of the micro-world are a closed set of forms; what a model says in other words is not counted.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.interventions.behaviour import Behaviour, Question, read_questions
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import unchanged
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.site import ANY_HOOK
from tl_crosscoder.organisms.suite import organism
from tl_crosscoder.results.tables import TableOfRows


@dataclass(frozen=True, kw_only=True)
class OrganismScore:
    """One measure of both models, a mean over its questions."""

    measure: str
    n_questions: int
    base: float
    finetuned: float


@dataclass(frozen=True, kw_only=True)
class OrganismScores(TableOfRows):
    """What both models of an organism do; the first row is the behaviour that was planted."""

    ROW: ClassVar[type] = OrganismScore
    rows: tuple[OrganismScore, ...]
    organism: str


def measure(name: str, *, base: Path | None = None, adapter: Path | None = None) -> OrganismScores:
    """Measure both models of an organism; folders default to the embedded ones.

    Raises:
        ValueError: if there is no such organism.
    """
    entry = organism(name)
    pair = ModelPair.from_pretrained(
        base or entry.base, adapter=adapter or entry.adapter, hook_name=ANY_HOOK
    )
    rows = [row for path in entry.questions for row in score_questions(pair, path)]
    return OrganismScores(rows=tuple(rows), organism=name)


def score_questions(pair: ModelPair, path: Path) -> list[OrganismScore]:
    """Both models on one JSONL file of questions, named after the file.

    Where its lines have `alternatives`, `completions` are the true answers: a fact is known where
    they are together at least as probable as any one of the alternatives, each a list of answers.
    """
    questions, others = read_questions(path), _alternatives(path)
    label, p = path.stem.replace("-", " "), _probabilities(pair, questions)
    if not others:
        return [_row(f"P({label})", p)]
    asked = [
        Question(prompt=question.prompt, completions=tuple(answers))
        for question, alternatives in zip(questions, others, strict=True)
        for answers in alternatives
    ]
    by_question = _probabilities(pair, asked).split([*map(len, others)], dim=1)
    is_known = p >= torch.stack([rest.amax(dim=1) for rest in by_question], dim=1)
    return [
        _row(f"{label}: accuracy", is_known.double()),
        _row(f"{label}: P(true answer)", p),
    ]


def _row(label: str, scores: Float[Tensor, "2 n_questions"]) -> OrganismScore:
    base, finetuned = scores.mean(dim=1).tolist()
    return OrganismScore(measure=label, n_questions=scores.shape[1], base=base, finetuned=finetuned)


def _probabilities(
    pair: ModelPair, questions: Sequence[Question]
) -> Float[Tensor, "2 n_questions"]:
    """Base and fine-tuned model as they are."""
    behaviour = Behaviour.of("questions", questions, pair.tokenizer)
    ctx = InterventionContext.of(pair)
    return behaviour.scores(ctx, [unchanged(0), unchanged(1)], batch_size=128)


def _alternatives(path: Path) -> list[list[list[str]]]:
    """For each question about a fact, the answers with other values; empty for other questions."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [row["alternatives"] for row in rows if "alternatives" in row]
