"""What a fine-tune does to predictions, as an effect that edits remove or induce: no labels needed.

    necessity     KL(p_base || p_edited): from KL(p_base || p_finetuned) down to 0
    sufficiency   -KL(p_finetuned || p_edited): from -KL(p_finetuned || p_base) up to 0

so that the share of a `trials` row is how far the edited model goes from one model to the other.
Sums over the predicted tokens of one kind, by context. Limit: predictions on given text, not what
a model writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.activations.text import TokenizedText
from tl_crosscoder.interventions.edits import Edit, Places
from tl_crosscoder.interventions.running import kinds_of, score_edits, unchanged
from tl_crosscoder.interventions.subject import Subject


@dataclass(frozen=True, eq=False, kw_only=True)
class Predictions:
    """Predictions of one kind of token of a text."""

    text: TokenizedText
    kind: str
    places: Places

    @classmethod
    def of(cls, text: TokenizedText) -> "Predictions":
        """What assistants say, where the text has chats, else every token."""
        kind, places = next(iter(kinds_of(text).items()))
        return cls(text=text, kind=kind, places=places)

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"predictions of {self.kind} tokens"

    @property
    def unit(self) -> str:
        """What its values are."""
        return "KL, nats a prompt"

    @property
    def n_prompts(self) -> int:
        """Contexts: the units that intervals are taken over."""
        return len(self.text)

    def scores(
        self,
        subject: Subject,
        edits: Sequence[Edit],
        *,
        is_necessity: bool = False,
        description: str | None = None,
    ) -> Float[Tensor, "n_edits n_prompts"]:
        """See the module; nats, summed over the tokens of each context."""
        found = score_edits(
            subject,
            self.text,
            edits,
            reference=unchanged(subject.base if is_necessity else subject.finetuned),
            kinds={self.kind: self.places},
            description=description,
        )
        kl = found.kl[:, 0]
        return kl if is_necessity else -kl
