"""Attribution on a run's folder, and rankings of its latents.

Contract: half of the documents, by a hash of their content, is for rankings and the other half for
causal tests; of a behaviour that is ranked by, half of its questions. `attribute_run` keeps its
result in the folder, and whatever ranks latents there reads it or computes it once. Limit: one
attribution a folder, the latest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from tl_crosscoder.analysis.latents import (
    LatentMeasures,
    RankedLatent,
    Ranking,
    in_order,
    rank_latents,
)
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.config.causal import AttributedText, AttributionQuestion, PromptsQuestion
from tl_crosscoder.data.documents import Document, halves
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.files import HELD_OUT_NAME, WATERFALL_NAME
from tl_crosscoder.interventions.attribution import attribution
from tl_crosscoder.interventions.attribution_result import Attribution, measured_text
from tl_crosscoder.interventions.behaviour import Behaviour, Effect, Predictions, Question
from tl_crosscoder.interventions.running import kinds_of, with_predictions
from tl_crosscoder.interventions.waterfall import Waterfall, waterfall
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.organisms.suite import organism
from tl_crosscoder.progress import note
from tl_crosscoder.run.run import Run

RANKING, TESTS = 0, 1
"""Halves of a text."""
PARTS = ("documents for ranking", "documents for tests")
T = TypeVar("T")


def attribute_run(run: Run, question: AttributionQuestion | None = None) -> Attribution:
    """Share the change out over the latents, on the documents for rankings; kept in the folder.

    Raises:
        FileNotFoundError, ValueError: no text, no behaviour, or models that pass no gradient.
    """
    question = question or AttributionQuestion()
    found = _attributed(run, question, _goal(run, question))
    if run.mesh.is_first:
        found.save(run.path)
    return found


def attribution_on(run: Run, question: AttributedText) -> Attribution:
    """That of the folder where it is of these predictions; else one that is computed now.

    It is kept, but for one of a behaviour in the folder, by which somebody ranks.
    """
    predictions = predictions_of(run, question, half=RANKING)
    try:
        there = Attribution.load(run.path)
    except (FileNotFoundError, ValueError):
        there = None
    if there is not None and _is_of(there, predictions, run, question):
        return there
    found = _attributed(run, question, predictions)
    if there is None or there.effect == found.effect:
        found.save(run.path)
    return found


def _is_of(
    found: Attribution, predictions: Predictions, run: Run, question: AttributedText
) -> bool:
    text = measured_text(predictions.text, n_predicted=0, part="")
    compared = compared_models(run, question.toward).compared_names
    own = (found.text.sha256, found.effect, found.compared, found.n_steps, found.at_base)
    return own == (
        text.sha256, predictions.name, compared, question.n_steps, question.at_base
    )  # fmt: skip


def _attributed(run: Run, question: AttributedText, effect: Effect) -> Attribution:
    return attribution(
        compared_models(run, question.toward),
        run.crosscoder,
        effect,
        settings=question,
        part=PARTS[RANKING],
        show_progress=True,
        axis=run.mesh.world,
    )


def waterfall_run(run: Run, question: AttributionQuestion | None = None) -> Waterfall:
    """How much passes the hook and what the latents hold of it, on the documents for tests."""
    question = question or AttributionQuestion()
    ranked = attribution_of(run, text=question.text, toward=question.toward)
    result = waterfall(
        compared_models(run, question.toward),
        run.crosscoder,
        predictions_of(run, question, half=TESTS),
        ranked=ranked.ranking(),
        order=f"attribution of {ranked.effect}",
        part=PARTS[TESTS],
        seed=question.seed,
        show_progress=True,
    )
    result.save(run.path / WATERFALL_NAME)
    return result


def attribution_of(run: Run, *, text: str | None = None, toward: str = "finetuned") -> Attribution:
    """The attribution in the folder; computed now, on a text, where there is none of this kind."""
    names = run.models.compared_names
    compared = names if toward == "finetuned" else names[::-1]
    try:
        found = Attribution.load(run.path)
        if found.compared == compared and found.by_role.shape[1] == run.crosscoder.cfg.d_sae:
            return found
        error = f"The attribution in {run.path} is toward the {found.compared[1]} model."
    except (FileNotFoundError, ValueError) as problem:
        error = str(problem).partition(" Compute it")[0]
    note(f"{error} Attributing now.")
    side = "finetuned" if toward == "finetuned" else "base"
    return attribute_run(run, AttributionQuestion(text=text, toward=side))


def ranking_at_hand(run: Run, *, n: int | None = 10) -> Ranking:
    """The ranking by an attribution of the folder, else the one of the measures; no model runs."""
    latents, found = run.measurement().latents, _kept(run)
    return rank_latents(latents, n=n) if found is None else attributed_ranking(found, latents, n=n)


def _kept(run: Run, toward: str = "finetuned") -> Attribution | None:
    """The attribution of the folder, where it is of these latents and toward this model."""
    try:
        found = Attribution.load(run.path)
    except (FileNotFoundError, ValueError):
        return None
    names = run.measurement().compared
    compared = names if toward == "finetuned" or not names else names[::-1]
    is_of_these = found.by_role.shape[1] == run.crosscoder.cfg.d_sae
    return found if is_of_these and found.compared == compared else None


def compared_models(run: Run, side: str) -> ModelPair:
    """The models, the compared sites exchanged where the base's predictions are explained."""
    if side == "finetuned":
        return run.models
    base, finetuned = run.models.compared_names
    return run.models.comparing(finetuned, base)


def _goal(run: Run, question: AttributionQuestion) -> Effect:
    if question.goal == "predictions":
        return predictions_of(run, question, half=RANKING)
    found = behaviours_of(run, question.behaviour)
    if not found or (question.behaviour is not None and len(found) > 1):
        raise ValueError(
            "the goal is a behaviour, and one is attributed at a time: name a JSONL file of "
            "prompts and completions with --behaviour"
            + (f", not {len(found)} of them." if found else "; none is known of this model.")
        )
    return half_of(found[0], run, RANKING)


# --- what is ranked on and what is tested on ------------------------------------------------------


def prompts_of(run: Run, question: PromptsQuestion, *, half: int = TESTS) -> TokenizedText:
    """Contexts with something to predict; whole chats where there are any."""
    documents = run.documents(question.text)
    chats = [d for d in documents if "messages" in d]
    text = run.prompts(halves(chats or documents)[half])
    return with_predictions(text, kinds_of(text))[: question.n_prompts]


def predictions_of(run: Run, question: AttributedText, *, half: int) -> Predictions:
    """Predictions of documents of one half, spread over it: of chats responses, of text all."""
    documents = halves(run.documents(question.text))[half]
    text = _with_predictions(run, spread(documents, question.n_prompts))
    if len(text) < question.n_prompts < len(documents):
        text = _with_predictions(run, documents)
        text = text[spread(range(len(text)), question.n_prompts)]
    return Predictions.of(text)


def _with_predictions(run: Run, documents: list[Document]) -> TokenizedText:
    text = run.prompts(documents, only_chats=False)
    return with_predictions(text, kinds_of(text))


def spread(each: Sequence[T], n: int) -> list[T]:
    """So many of a sequence at about equal distances, or all."""
    n = min(n, len(each))
    return [each[i * len(each) // n] for i in range(n)]


def behaviours_of(run: Run, named: str | Sequence[str] | None = None) -> list[Behaviour]:
    """Behaviours of JSONL files and folders; without any those planted in an embedded organism.

    The first one planted is the main one. Raises as `Behaviour.from_files` does.
    """
    if named is None:
        name = run.organism()
        named = [*map(str, organism(name).planted_questions)] if name else []
    return Behaviour.from_files(named, run.models.tokenizer, masks=run.masks)


def for_tests(behaviour: Behaviour, run: Run) -> Behaviour:
    """A behaviour for causal tests: the other half of the questions where it was ranked by."""
    try:
        is_ranked_by = Attribution.load(run.path).effect == behaviour.name
    except (FileNotFoundError, ValueError):
        is_ranked_by = False
    return half_of(behaviour, run, TESTS) if is_ranked_by else behaviour


def half_of(behaviour: Behaviour, run: Run, half: int) -> Behaviour:
    """A behaviour with the questions of one half."""
    documents = [
        {**_document(question), "place": i} for i, question in enumerate(behaviour.questions)
    ]
    chosen = [behaviour.questions[d["place"]] for d in halves(documents)[half]]
    return Behaviour.of(behaviour.name, chosen, run.models.tokenizer, masks=run.masks)


def _document(question: Question) -> Document:
    is_text = isinstance(question.prompt, str)
    return {"text": question.prompt} if is_text else {"messages": [*question.prompt]}


# --- rankings -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AttributedRow(RankedLatent):
    """A latent with what it carries of the change, beside its other measures."""

    attribution: float
    """Nats; see `Attribution`."""
    attribution_share: float
    """Share of the change."""


@dataclass(frozen=True, kw_only=True)
class AttributedRanking(Ranking):
    """Latents by what they carry of the change, first the most."""

    ROW: ClassVar[type] = AttributedRow
    rows: tuple[AttributedRow, ...]
    effect: str
    """What was shared out."""
    part: str
    """Documents that it was computed on."""


def ranking_of(
    run: Run,
    *,
    n: int | None = 10,
    order: str | None = None,
    toward: str = "finetuned",
    text: str | None = None,
    measurement: Measurement | None = None,
) -> Ranking:
    """The first latents in an order, with their measures.

    Args:
        run: a run's folder.
        n: how many; None is all.
        order: `attribution`, or one of `rank_latents`; None is attribution where the folder has it,
            or loaded models and text to make it, else the default of `rank_latents`.
        toward: which model's.
        text: what an attribution that is not in the folder is computed on; None is the held-out
            text.
        measurement: measures on another text than the run's own.

    Raises:
        ValueError: an order that these latents do not have.
    """
    latents = (measurement or run.measurement()).latents
    found = _kept(run, toward) if order in (None, "attribution") else None
    can_make = run.has_models and (run.path / HELD_OUT_NAME).is_file()
    if found is None and (order == "attribution" or (order is None and can_make)):
        found = attribution_of(run, text=text, toward=toward)
    if found is None:
        return rank_latents(latents, n=n, by=order, toward=toward)
    return attributed_ranking(found, latents, n=n, toward=toward)


def attributed_ranking(
    found: Attribution, latents: LatentMeasures, *, n: int | None = 10, toward: str = "finetuned"
) -> AttributedRanking:
    """The ranking of an attribution, with all other measures of its latents."""
    rows = found.rows(n)
    plain = in_order(latents, [r.latent for r in rows], order="attribution", toward=toward)
    own: list[dict[str, Any]] = [
        {"attribution": r.attribution, "attribution_share": r.attribution_share} for r in rows
    ]
    return AttributedRanking(
        rows=tuple(
            AttributedRow(**vars(row), **values)
            for row, values in zip(plain.rows, own, strict=True)
        ),
        order="attribution",
        toward=toward,
        effect=found.effect,
        part=found.text.part,
    )
