"""How the noise floor of an answer is measured: which null pair, and how it is made.

No torch here: the command line reads these classes to print its help.
"""

from dataclasses import dataclass
from typing import Literal

from tl_crosscoder.config.settings import NaturalInt, PositiveFloat, PositiveInt, Settings

NullKind = Literal["self", "identical"]


@dataclass(frozen=True, kw_only=True)
class LoraTraining(Settings):
    """How a LoRA adapter is trained; the defaults are those of the embedded organisms."""

    n_steps: PositiveInt = 250
    """Optimizer steps of the adapter of kind `self`: as many as the fine-tune took, if you know."""
    batch_size: PositiveInt = 16
    """Texts a step."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate of AdamW, after a rise over 5 % of the steps and before a fall to 0."""
    rank: PositiveInt = 16
    """Rank on all linear layers of the blocks; where the fine-tuned model is a LoRA adapter, rank
    and layers are that adapter's."""
    seed: NaturalInt = 0
    """Seed of samples, adapter and order."""


@dataclass(frozen=True, kw_only=True)
class NullConfig(LoraTraining):
    """A pair that should show nothing."""

    kind: NullKind = "self"
    """`self` is the base against a LoRA fine-tune of it on its own samples, `identical` the base
    against itself: exact zeros, and nothing is fine-tuned."""
    n_samples: PositiveInt = 1_000
    """Texts that the base writes at temperature 1, after prompts of the run's own text; those that
    the run is measured on are left out."""
    max_prompt_tokens: PositiveInt = 16
    """Plain text is continued after so many tokens, a chat after its last user turn."""
    max_new_tokens: PositiveInt = 64
    """Tokens of a sample at most."""
    n_prompts: PositiveInt = 200
    """Documents of each half of the text, for attribution and changes of both pairs, at most; as
    many as the run's own changes were looked for on."""
