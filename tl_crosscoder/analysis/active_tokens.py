"""`ActiveTokens`: every token of a text on which each latent is active, with its code.

Contract: entries (latent, position, code), `[nnz]`, sorted by latent and then by position, and
which tokens counted at all. Limit: all are in memory, 20 bytes an entry and three times that while
they are sorted: 0.6 GB for 200,000 tokens of a dictionary of L0 50. Name latents where few are
needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.activation_source import ActivationSource
from tl_crosscoder.activations.harvest import harvest
from tl_crosscoder.activations.text import TokenizedText
from tl_crosscoder.analysis.neighbours import checked_latents
from tl_crosscoder.crosscoder.checks import check_source
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.inference import sparse_codes


@dataclass(frozen=True, kw_only=True, eq=False)
class ActiveTokens:
    """Entries on the CPU, latent by latent."""

    latents: Int[Tensor, " nnz"]
    positions: Int[Tensor, " nnz"]
    """Index of the context in the text x context_size + position in it."""
    values: Float[Tensor, " nnz"]
    """Codes, float32."""
    counted: Bool[Tensor, "contexts pos"]
    """Tokens that the dictionary is for; on the others no latent is active."""
    d_sae: int

    @property
    def context_size(self) -> int:
        """Positions a context."""
        return self.counted.shape[1]

    @cached_property
    def _ends(self) -> Int[Tensor, " d_sae_plus_1"]:
        return torch.searchsorted(self.latents, torch.arange(self.d_sae + 1))

    def of(self, latent: int) -> "tuple[Int[Tensor, ' n'], Float[Tensor, ' n']]":
        """Positions and codes of one latent; none where it is silent or was not asked for."""
        own = slice(int(self._ends[latent]), int(self._ends[latent + 1]))
        return self.positions[own], self.values[own]


@torch.no_grad()
def find_active(
    source: ActivationSource,
    crosscoder: Crosscoder,
    text: TokenizedText,
    *,
    latents: Sequence[int] | None = None,
    batch_size: int = 32,
    show_progress: bool = False,
) -> ActiveTokens:
    """Run the models over a text once and keep where latents are active.

    Args:
        source: what the dictionary was trained on, models or cache.
        crosscoder: the dictionary.
        text: of at least one context.
        latents: only these; None is all.
        batch_size: contexts a forward pass.
        show_progress: with a progress bar.

    Raises:
        ValueError: another source than the dictionary's, or a latent that it does not have.
    """
    check_source(source, crosscoder)
    d_sae, size = crosscoder.cfg.d_sae, text.context_size
    wanted = torch.ones(d_sae, dtype=torch.bool)
    if latents is not None:
        wanted.zero_()[checked_latents(latents, crosscoder).cpu()] = True
    counted = torch.zeros(len(text) * size, dtype=torch.bool)
    none = torch.zeros(0, dtype=torch.long)
    found = [(none, none, torch.zeros(0))]
    for part in harvest(
        source, text, batch_size=batch_size, description="Encoding" if show_progress else None
    ):
        own, codes = part.positions(size), sparse_codes(crosscoder, part.rows)
        counted[own] = True
        ids, tokens = codes.pattern.latents.cpu().long(), codes.pattern.tokens.cpu().long()
        keep = wanted[ids]
        found.append((ids[keep], own[tokens[keep]], codes.values.cpu().float()[keep]))
    ids, positions, values = (torch.cat(each) for each in zip(*found, strict=True))
    order = (ids * (len(text) * size) + positions).argsort()
    return ActiveTokens(
        latents=ids[order],
        positions=positions[order],
        values=values[order],
        counted=counted.view(len(text), size),
        d_sae=d_sae,
    )
