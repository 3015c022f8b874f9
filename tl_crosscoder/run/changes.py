"""Changes on a run's folder: what `tl-crosscoder changes` does, and `train` when it has measured.

Contract: groups are found on half of the documents and tested on the other half; the result is
kept in the folder (`changes.json`), with the waterfall beside it. Limit: one answer a folder, the
latest.
"""

from dataclasses import replace

from tl_crosscoder.config.causal import ChangesQuestion
from tl_crosscoder.files import CHANGES_NAME, HELD_OUT_NAME, WATERFALL_NAME
from tl_crosscoder.interventions.changes import CONTROLS, find_changes
from tl_crosscoder.interventions.changes_result import Changes
from tl_crosscoder.progress import note
from tl_crosscoder.run.attribution import (
    TESTS,
    attribution_on,
    compared_models,
    predictions_of,
    waterfall_run,
)
from tl_crosscoder.run.causal import neutral_text
from tl_crosscoder.run.run import Run

N_NEUTRAL_TOKENS = 1024
"""Neutral tokens on which the cost of each ablation is measured."""


def changes_run(run: Run, question: ChangesQuestion | None = None) -> Changes:
    """The changes, with their causes; kept in the folder.

    Raises:
        FileNotFoundError, ValueError: no text, nothing in it that is predicted, or models that
            pass no gradient.
    """
    question = question or ChangesQuestion()
    models = compared_models(run, question.toward)
    found = find_changes(
        models,
        run.crosscoder,
        attribution_on(run, question),
        predictions_of(run, question, half=TESTS),
        neutral=run.some(
            neutral_text(run, question.text, neutral=question.neutral), N_NEUTRAL_TOKENS
        ),
        latents=run.measurement().latents,
        settings=replace(CONTROLS, n_random=question.n_random, seed=question.seed),
        show_progress=True,
    )
    found.save(run.path / CHANGES_NAME)
    return found


def answer_run(run: Run) -> None:
    """Leave waterfall and changes in the folder, where they are not there yet.

    What keeps them from being found is said in one sentence, and the run stays as it is: it may
    have taken days to train.
    """
    if all((run.path / name).is_file() for name in (WATERFALL_NAME, CHANGES_NAME)):
        return
    reason = ""
    if not run.has_models:
        reason = "the models are not loaded."
    elif not (run.path / HELD_OUT_NAME).is_file():
        reason = "no text was kept to look on."
    try:
        if not reason:
            waterfall_run(run)
            changes_run(run)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
    if reason:
        how = "" if (run.path / HELD_OUT_NAME).is_file() else " --text TEXT"
        note(
            f"What changed was not found out: {reason} `tl-crosscoder changes {run.path}{how}` "
            "looks for it.",
            is_warning=True,
        )
