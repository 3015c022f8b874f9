"""`OffTarget`: what edits cost on neutral text, each scored once for all effects it is tried for.

Contract: sums a context, float64, of the KL to the unedited model and of the rise of cross-entropy,
in nats; divided by `counts` and averaged by whoever asks. Limit: edits are told apart by identity,
so an equal one that is made again is scored again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import Edit, TokenFilter, unchanged
from tl_crosscoder.interventions.running import predicted, score_edits


@dataclass(frozen=True, eq=False, kw_only=True)
class OffTarget:
    """Neutral text, and what has been scored on it."""

    ctx: InterventionContext
    text: TokenizedText
    _known: dict[Edit, Tensor] = field(default_factory=dict)

    @property
    def counts(self) -> Float[Tensor, " n_contexts"]:
        """Predicted tokens of each context."""
        return predicted(TokenFilter(), self.text).sum(dim=1).double()

    def of(self, edits: Sequence[Edit]) -> Float[Tensor, "2 n_edits n_contexts"]:
        """KL to the unedited model, and cross-entropy minus its own, of edits of one site."""
        new = [edit for edit in dict.fromkeys(edits) if edit not in self._known]
        if new:
            plain, kinds = unchanged(new[0].site), {"all": TokenFilter()}
            found = score_edits(self.ctx, self.text, [plain, *new], reference=plain, kinds=kinds)
            kl, rise = found.kl[1:, 0], found.ce[1:, 0] - found.ce[:1, 0]
            self._known.update(zip(new, torch.stack([kl, rise], dim=1), strict=True))
        return torch.stack([self._known[edit] for edit in edits], dim=1)
