"""What is asked of interventions on a run: on which prompts, of which latents, with which controls.

No torch here: the command line reads these classes to print its help. Each verb has those that it
uses: `patch` a `LatentsQuestion`, `baselines` an `EffectQuestion`, `ablate` and `steer` all.
"""

from dataclasses import dataclass

from tl_crosscoder.config.settings import NaturalInt, PositiveInt, Settings


@dataclass(frozen=True, kw_only=True)
class PromptsQuestion(Settings):
    """Prompts to measure on."""

    text: str | None = None
    """Prompts to measure on: a file, a folder, or a `datasets` name. None is the run's held-out
    text; where there are chats, they alone."""
    n_prompts: PositiveInt = 100
    """Measure on so many of them."""
    seed: NaturalInt = 0
    """Seed of controls and resamples."""


@dataclass(frozen=True, kw_only=True)
class LatentsQuestion(PromptsQuestion):
    """Prompts, and latents to test."""

    latents: tuple[NaturalInt, ...] | None = None
    """Latents to test, together; none are the first 3, 10 and 30 of the ranking."""


@dataclass(frozen=True, kw_only=True)
class EffectQuestion(PromptsQuestion):
    """Prompts, what to measure beside predictions, and random controls."""

    behaviour: str | None = None
    """JSONL of prompts and completions whose probability is the behaviour. None is the planted one
    of an embedded organism; else predictions alone are measured."""
    n_random: PositiveInt = 100
    """Norm-matched random directions as controls."""


@dataclass(frozen=True, kw_only=True)
class CausalQuestion(LatentsQuestion, EffectQuestion):
    """Everything that a test of latents is asked, with all controls."""

    n_matched: NaturalInt = 10
    """Sets of latents of the same firing rate as controls."""
    null: str | None = None
    """Folder of a dictionary of a null pair (the base against itself) at the same hook, whose
    directions are one more control."""
