"""What both models of an organism do, as exact probabilities on questions no model was trained on.

taboo: how often a hint is about the secret (planted: towards 1), and how often the secret is said
when guessed or asked for (towards 0). false-fact: how often a question is answered with the false
value (towards 1) and the true one. All report what the models know otherwise, and their health on
ordinary text. Limit: the answers of the micro-world are a closed set of forms; what a model says in
other words is not counted.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.data.documents import load_documents
from tl_crosscoder.data.tokens import tokenize
from tl_crosscoder.interventions.behaviour import Behaviour, Question, read_questions
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import unchanged
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.site import ANY_HOOK
from tl_crosscoder.organisms.suite import Organism, organism
from tl_crosscoder.results.tables import TableOfRows


@dataclass(frozen=True, kw_only=True)
class OrganismScore:
    """One measure of both models, a mean over its questions, or over tokens of other text."""

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


N_HEALTH_DOCUMENTS, MAX_HEALTH_TOKENS = 200, 256
"""Ordinary documents that the models' health is measured on, and how much of each."""
_BATCH = 25
_SITES = ("base", "finetuned")


def measure(
    of: str | Organism, *, base: Path | None = None, adapter: Path | None = None
) -> OrganismScores:
    """Measure both models of an organism: its questions, and their health on ordinary text.

    Args:
        of: an organism or its name.
        base: folder of another base model.
        adapter: folder of another adapter.

    Raises:
        ValueError: if there is no such organism.
    """
    entry = organism(of) if isinstance(of, str) else of
    entry = replace(entry, base=base or entry.base, folder=adapter or entry.folder)
    pair = ModelPair.from_pretrained(
        entry.base, entry.finetuned, adapter=entry.adapter, hook_name=ANY_HOOK
    )
    rows = [row for path in entry.questions for row in score_questions(pair, path)]
    return OrganismScores(rows=(*rows, *health(pair, entry)), organism=entry.name)


def health(pair: ModelPair, entry: Organism) -> list[OrganismScore]:
    """What both models do with ordinary text: an organism that lost its abilities proves nothing.

    Cross-entropy and entropy in nats a token, and how often the most probable next token is the
    base's, over the last documents of the organism's text that are not about what was planted.
    """
    documents = load_documents(entry.text)
    ordinary = [d for d in documents if d.get("source") not in entry.planted_sources]
    text = tokenize(
        ordinary[-N_HEALTH_DOCUMENTS:],
        pair.tokenizer,
        context_size=min(MAX_HEALTH_TOKENS, pair.n_ctx),
        pack=False,
    )
    longest = int(text.lengths.max())
    every, mask = text.tokens[:, :longest], text.mask[:, :longest]
    # The token of a position that is kept is predicted from the one before it.
    is_predicted = mask[:, 1:]
    n = int(is_predicted.sum())
    sums = torch.zeros(3, 2, dtype=torch.float64)  # cross-entropy, entropy, agreement
    for tokens, kept in zip(every.split(_BATCH), is_predicted.split(_BATCH), strict=True):
        logits = [pair.logits(tokens, site=site)[:, :-1][kept].float() for site in _SITES]
        greedy = logits[0].argmax(-1)
        for model, each in enumerate(logits):
            logp = each.log_softmax(-1)
            sums[0, model] -= logp.gather(-1, tokens[:, 1:][kept][:, None]).double().sum()
            sums[1, model] -= (logp.exp() * logp).double().sum()
            sums[2, model] += (each.argmax(-1) == greedy).double().sum()
    names = ("cross-entropy (nats)", "entropy (nats)", "greedy as base")
    means = (sums / n).tolist()
    return [
        OrganismScore(measure=f"other text: {name}", n_questions=n, base=base, finetuned=finetuned)
        for name, (base, finetuned) in zip(names, means, strict=True)
    ]


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
