"""When latents are active: how often, how strongly, on whose words, where in the context.

Contract: `Firing` counts are `[n_names, d_sae]`, sums of one streaming pass; `find_active` keeps
every entry (latent, position, code), `[nnz]`, sorted by latent and then by position. Limits: a
position is counted by powers of two; entries are held in memory, 20 bytes each and three times
that while they are sorted, 0.6 GB for 200,000 tokens at L0 50: name latents where few are needed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.crosscoder.crosscoder import Crosscoder, sparse_codes
from tl_crosscoder.crosscoder.site_views import check_source, checked_latents
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.data.harvest import harvest
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.mesh import Axis
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.results.tables import TableOfColumns

POSITIONS = ("0-1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127", "128-255", "256-")
"""Bins of positions in a context."""


@dataclass(frozen=True, kw_only=True)
class Firing(TableOfColumns):
    """Tokens on which each latent is active, in all and by what is known of the tokens."""

    n_tokens: int
    """Kept tokens of the text; masked ones are left out everywhere."""
    sources: tuple[str, ...]
    tokens_by_source: tuple[int, ...]
    """Kept tokens of each source."""
    tokens_by_role: tuple[int, ...]
    """Kept tokens of each of `ROLES`."""
    tokens_by_position: tuple[int, ...]
    """Kept tokens of each of `POSITIONS`."""
    n_active: Float[Tensor, " d_sae"]
    n_active_by_source: Float[Tensor, "n_sources d_sae"]
    n_active_by_role: Float[Tensor, "n_roles d_sae"]
    n_active_by_position: Float[Tensor, "n_positions d_sae"]
    sum_of_codes: Float[Tensor, " d_sae"]
    max_code: Float[Tensor, " d_sae"]
    """0 where the latent is never active."""

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
        return self.n_active_by_role[i] / (self.tokens_by_role[i] or math.nan)


class FiringSums:
    """Counts over a text that make a `Firing`."""

    def __init__(self, *, n_sources: int, d_sae: int, device: torch.device) -> None:
        sizes = {"source": n_sources, "role": len(ROLES), "position": len(POSITIONS)}

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        self._n_active = {name: zeros(n, d_sae) for name, n in sizes.items()}
        self._n_tokens = {name: zeros(n) for name, n in sizes.items()}
        self._sum_of_codes = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self._max_code = torch.zeros_like(self._sum_of_codes)

    def add(self, codes: SparseCodes, text: TokenizedText) -> None:
        """Take the kept tokens of some contexts into account, in the order of their mask."""
        latents, tokens = codes.pattern.latents.long(), codes.pattern.tokens.long()
        d_sae, mask = codes.pattern.d_sae, text.mask
        positions = torch.arange(text.context_size).expand(mask.shape)[mask]
        bins = positions.clamp(min=1).log2().floor().clamp(max=len(POSITIONS) - 1)
        places = {"source": text.source_ids[mask], "role": text.role_ids[mask], "position": bins}
        for name, place in places.items():
            n_active, n_tokens = self._n_active[name], self._n_tokens[name]
            ids = place.long().to(latents.device)
            n_tokens += torch.bincount(ids, minlength=len(n_tokens))
            flat = torch.bincount(ids[tokens] * d_sae + latents, minlength=n_active.numel())
            n_active += flat.view_as(n_active)
        values = codes.values.double()
        self._sum_of_codes += torch.bincount(latents, weights=values, minlength=d_sae)
        self._max_code.scatter_reduce_(0, latents, values, reduce="amax")

    def gather(self, axis: Axis) -> None:
        """Add the counts of several processes."""
        self._n_active = {name: axis.reduced(own) for name, own in self._n_active.items()}
        self._n_tokens = {name: axis.reduced(own) for name, own in self._n_tokens.items()}
        self._sum_of_codes = axis.reduced(self._sum_of_codes)
        self._max_code = axis.reduced(self._max_code, "max")

    def result(self, sources: Sequence[str]) -> Firing:
        """The counts as a table."""
        n_active = {name: counts.double() for name, counts in self._n_active.items()}
        n_tokens = {name: tuple(n.tolist()) for name, n in self._n_tokens.items()}
        return Firing(
            n_tokens=sum(n_tokens["role"]),
            sources=tuple(sources),
            tokens_by_source=n_tokens["source"],
            tokens_by_role=n_tokens["role"],
            tokens_by_position=n_tokens["position"],
            n_active=n_active["role"].sum(dim=0),
            n_active_by_source=n_active["source"],
            n_active_by_role=n_active["role"],
            n_active_by_position=n_active["position"],
            sum_of_codes=self._sum_of_codes,
            max_code=self._max_code,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ActiveTokens:
    """Every token of a text on which each latent is active, on the CPU, latent by latent."""

    latents: Int[Tensor, " nnz"]
    positions: Int[Tensor, " nnz"]
    """Index of the context in the text x context_size + position in it."""
    values: Float[Tensor, " nnz"]
    """Codes, float32."""
    mask: Bool[Tensor, "contexts pos"]
    """Kept tokens; on the others no latent is active."""
    d_sae: int

    @property
    def context_size(self) -> int:
        """Positions a context."""
        return self.mask.shape[1]

    @cached_property
    def _ends(self) -> Int[Tensor, " d_sae_plus_1"]:
        return torch.searchsorted(self.latents, torch.arange(self.d_sae + 1))

    def of(self, latent: int) -> "tuple[Int[Tensor, ' n'], Float[Tensor, ' n']]":
        """Positions and codes of one latent; none where it is never active or not requested."""
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
    mask = torch.zeros(len(text) * size, dtype=torch.bool)
    none = torch.zeros(0, dtype=torch.long)
    found = [(none, none, torch.zeros(0))]
    description = "Encoding" if show_progress else None
    for part in harvest(source, text, batch_size=batch_size, description=description):
        own, codes = part.positions(size), sparse_codes(crosscoder, part.rows)
        mask[own] = True
        ids, tokens = codes.pattern.latents.cpu().long(), codes.pattern.tokens.cpu().long()
        keep = wanted[ids]
        found.append((ids[keep], own[tokens[keep]], codes.values.cpu().float()[keep]))
    ids, positions, values = (torch.cat(each) for each in zip(*found, strict=True))
    order = (ids * (len(text) * size) + positions).argsort()
    return ActiveTokens(
        latents=ids[order],
        positions=positions[order],
        values=values[order],
        mask=mask.view(len(text), size),
        d_sae=d_sae,
    )
