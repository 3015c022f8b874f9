"""`ActiveTokens`: every token of a text on which each latent is active, with its code.

Contract: entries (latent, position, code), `[nnz]`, sorted by latent and then by position, and
which tokens counted at all. Limit: all are in memory, 20 bytes an entry and three times that while
they are sorted: 0.6 GB for 200,000 tokens of a dictionary of L0 50. Name latents where few are
needed.

When latents fire: how often, how strongly, on whose words, where in the context.

Contract: counts `[n_names, d_sae]` of one streaming pass, which add up over batches. Limit: a
position is counted by powers of two, not one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.analysis.similarity import checked_latents
from tl_crosscoder.crosscoder.checks import check_source
from tl_crosscoder.crosscoder.crosscoder import Crosscoder, sparse_codes
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.data.harvest import harvest
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.results.tables import TableOfColumns


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


POSITIONS = ("0-1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127", "128-255", "256-")
"""Bins of positions in a context."""


@dataclass(frozen=True, kw_only=True)
class Firing(TableOfColumns):
    """Tokens on which each latent is active, in all and by what is known of the tokens."""

    n_tokens: int
    """Tokens of the text that count."""
    sources: tuple[str, ...]
    tokens_by_source: tuple[int, ...]
    """Tokens that count, of each source."""
    tokens_by_role: tuple[int, ...]
    """The same of each of `ROLES`."""
    tokens_by_position: tuple[int, ...]
    """The same of each of `POSITIONS`."""
    n_active: Float[Tensor, " d_sae"]
    n_active_by_source: Float[Tensor, "n_sources d_sae"]
    n_active_by_role: Float[Tensor, "n_roles d_sae"]
    n_active_by_position: Float[Tensor, "n_positions d_sae"]
    sum_of_codes: Float[Tensor, " d_sae"]
    max_code: Float[Tensor, " d_sae"]
    """0 where the latent never fires."""

    @property
    def rate(self) -> Float[Tensor, " d_sae"]:
        """Share of the tokens on which each latent is active."""
        return self.n_active / self.n_tokens

    @property
    def mean_code(self) -> Float[Tensor, " d_sae"]:
        """Mean over the tokens on which it is active; NaN where there are none."""
        return self.sum_of_codes / self.n_active

    @property
    def template_share(self) -> Float[Tensor, " d_sae"]:
        """Share of its activations that are on tokens of the chat template (Minder et al. 2025)."""
        return self.n_active_by_role[ROLES.index("template")] / self.n_active

    def rate_by_role(self, role: str) -> Float[Tensor, " d_sae"]:
        """Share of the tokens of a role on which each latent is active; NaN without any."""
        if role not in ROLES:
            raise ValueError(f"role {role!r} is not known; they are {list(ROLES)}.")
        i = ROLES.index(role)
        n = self.tokens_by_role[i]
        return self.n_active_by_role[i] / (n or float("nan"))


@dataclass(kw_only=True)
class FiringSums:
    """What the pass collects."""

    n_active: dict[str, Int[Tensor, "n_names d_sae"]]
    """By source, role and position."""
    tokens: dict[str, Int[Tensor, " n_names"]]
    codes: Float[Tensor, "2 d_sae"]
    """Sum and largest."""

    @classmethod
    def begin(cls, *, n_sources: int, d_sae: int, device: torch.device) -> "FiringSums":
        """Before any token."""
        sizes = {"source": n_sources, "role": len(ROLES), "position": len(POSITIONS)}
        return cls(
            n_active={k: torch.zeros(n, d_sae, dtype=torch.long, device=device)
                      for k, n in sizes.items()},
            tokens={k: torch.zeros(n, dtype=torch.long, device=device) for k, n in sizes.items()},
            codes=torch.zeros(2, d_sae, dtype=torch.float64, device=device),
        )  # fmt: skip

    def add(self, codes: SparseCodes, text: TokenizedText) -> None:
        """The tokens that count of some contexts, in the order of their mask."""
        latents, tokens = codes.pattern.latents.long(), codes.pattern.tokens.long()
        for name, ids in known_of_tokens(text).items():
            counted, n_seen = self.n_active[name], self.tokens[name]
            ids = ids.to(latents.device)
            n_seen += torch.bincount(ids, minlength=len(n_seen))
            flat = torch.bincount(
                ids[tokens] * codes.pattern.d_sae + latents, minlength=counted.numel()
            )
            counted += flat.view_as(counted)
        values = codes.values.double()
        self.codes[0] += torch.bincount(latents, weights=values, minlength=codes.pattern.d_sae)
        self.codes[1].scatter_reduce_(0, latents, values, reduce="amax")

    def result(self, sources: Sequence[str]) -> Firing:
        """As a table."""
        return Firing(
            n_tokens=int(self.tokens["role"].sum()),
            sources=tuple(sources),
            n_active=self.n_active["role"].sum(dim=0).double(),
            n_active_by_source=self.n_active["source"].double(),
            n_active_by_role=self.n_active["role"].double(),
            n_active_by_position=self.n_active["position"].double(),
            tokens_by_source=tuple(self.tokens["source"].tolist()),
            tokens_by_role=tuple(self.tokens["role"].tolist()),
            tokens_by_position=tuple(self.tokens["position"].tolist()),
            sum_of_codes=self.codes[0],
            max_code=self.codes[1],
        )


def known_of_tokens(text: TokenizedText) -> dict[str, Int[Tensor, " tokens"]]:
    """Source, role and position bin of the tokens that count."""
    mask = text.mask
    at = torch.arange(text.context_size).expand(mask.shape)[mask]
    bins = at.clamp(min=1).log2().floor().long().clamp(max=len(POSITIONS) - 1)
    return {
        "source": text.source_ids[mask].long(),
        "role": text.role_ids[mask].long(),
        "position": bins,
    }
