"""What the models add to a report: effect on the logits, samples, and whole texts with codes.

Contract: models are loaded once, before any long work; what cannot be had of these models, such as
samples of a single site, is left out and said. Limit: a few texts, and a few latents over them.
"""

from dataclasses import dataclass, field
from typing import Any

from tl_crosscoder.analysis.latents import UNRANKED
from tl_crosscoder.analysis.lens import LogitEffects
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.report.circuits import TokenPanel
from tl_crosscoder.report.html.latents import effects_on_logits
from tl_crosscoder.report.html.prompts import N_CANDIDATES, Samples, SampleSettings, sample_latents
from tl_crosscoder.report.tokens import latent_tokens
from tl_crosscoder.run.run import HELD_OUT_NAME, Run

N_LOGITS = 8
"""Tokens that a direction promotes, and as many that it suppresses."""
N_TEXTS, N_TEXT_LATENTS = 3, 10
"""Held-out contexts that are shown whole, with the codes of so many latents."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What goes into a report."""

    n_latents: int = 200
    """The first of the ranking."""
    samples: SampleSettings | None = field(default_factory=SampleSettings)
    """What the models are made to write; None runs them on no text."""
    models: bool = True
    """False does not load the models: no effect on the logits, no samples, no texts."""
    text: str | None = None
    """For samples and texts; None is the run's held-out text."""

    def __post_init__(self) -> None:
        if self.n_latents < 1:
            raise ValueError(f"n_latents is {self.n_latents}; a report has at least one latent.")


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Something that the report does not have."""

    what: str
    how: str
    """Why, and what makes it."""


@dataclass(frozen=True, kw_only=True)
class OfModels:
    """What the models say."""

    effects: LogitEffects | None = None
    samples: Samples | None = None
    texts: list[dict[str, Any]] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)


def load_models(run: Run) -> None:
    """Load the models now: one that is missing is not to be found after long work.

    Raises ValueError, with how to go on without them.
    """
    try:
        _ = run.models
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the models of this dictionary cannot be loaded: {error} A report without them has no "
            "effect on the logits, no samples and no texts: --no-models (models=False)."
        ) from error


def of_models(
    run: Run, latents: list[int], settings: ReportSettings, *, show_progress: bool = False
) -> OfModels:
    """Everything that the settings ask for and these models have.

    Raises:
        FileNotFoundError: samples, and no text to take them from.
        ValueError: prompts that are too long.
    """
    if not settings.models:
        how = "the models were not loaded (--no-models)."
        return OfModels(missing=[Missing(what="Effect on the logits, samples, texts", how=how)])
    missing: list[Missing] = []
    effects = _effects(run, latents, missing)
    samples, texts = None, []
    if settings.samples is None:
        missing.append(Missing(what="Samples and texts", how="left out (--no-samples)."))
    elif not latents:
        missing.append(Missing(what="Samples and texts", how=UNRANKED))
    elif _has_two_models(run, missing):
        _check_text(run, settings)
        how = {"text": settings.text, "show_progress": show_progress}
        samples = sample_latents(run, latents, settings.samples, **how)
        texts = _texts(run, latents[:N_TEXT_LATENTS], settings.text)
    return OfModels(effects=effects, samples=samples, texts=texts, missing=missing)


def _effects(run: Run, latents: list[int], missing: list[Missing]) -> LogitEffects | None:
    if not latents:
        return None
    try:
        return effects_on_logits(run, latents, n=N_LOGITS)
    except ValueError as error:
        missing.append(Missing(what="Effect on the logits", how=str(error)))
        return None


def _has_two_models(run: Run, missing: list[Missing]) -> bool:
    try:
        InterventionContext.of(run.models, run.crosscoder)
    except ValueError as error:
        missing.append(Missing(what="Samples and texts", how=str(error)))
        return False
    return True


def _check_text(run: Run, settings: ReportSettings) -> None:
    if settings.text is None and not (run.path / HELD_OUT_NAME).is_file():
        raise FileNotFoundError(
            f"{run.path} keeps no held-out text ({HELD_OUT_NAME}), and samples need one. Name a "
            "text with --text (text=...), or leave samples out with --no-samples (samples=None)."
        )


def _texts(run: Run, latents: list[int], text: str | None) -> list[dict[str, Any]]:
    """Of the first contexts those with the largest codes, most first."""
    contexts = run.prompts(run.documents(text))[:N_CANDIDATES]
    panels = latent_tokens(run.models, run.crosscoder, contexts, latents).panels
    most = sorted(panels, key=_sum_of_codes, reverse=True)[:N_TEXTS]
    return [panel.to_dict() for panel in most]


def _sum_of_codes(panel: TokenPanel) -> float:
    values = panel.props["values"]
    return sum(sum(v) if isinstance(v, list) else v for v in values)
