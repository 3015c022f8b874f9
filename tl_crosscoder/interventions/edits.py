"""Edits: what to put in the place of a model's activation at the hook.

Contract: an edit takes the `SiteActivations` of some contexts and gives the new activations of
one site, `[batch, pos, d_model]`; the site's model goes on from there. All are linear in the
activations, the codes and fixed directions, raw space. Written for base 0 and fine-tuned 1, as in
the papers.
Limit: one site is edited at a time.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.data.tokens import DROP_REASONS
from tl_crosscoder.interventions.context import InterventionContext, SiteActivations


class Edit(ABC):
    """Abstract: new activations of the site `site`, a position among the models' sites."""

    site: int

    @abstractmethod
    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos d_model"]:
        """The activations from which the model of the site goes on."""


class LocalEdit(Edit):
    """Abstract: an edit that asks for the activation of its own site and for nothing else."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ReplaceActivation(Edit):
    """The activation of a site as it is: of another site's model, or of its own."""

    site: int
    stream: int
    """Position of the site whose activation is taken."""

    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos d_model"]:
        """x^m."""
        return acts.x[self.stream]


def unchanged(site: int) -> ReplaceActivation:
    """The model of a site as it is."""
    return ReplaceActivation(site=site, stream=site)


@dataclass(frozen=True, eq=False, kw_only=True)
class AddLatents(Edit):
    """An activation plus what some latents add: x^m + sign sum_{j in S} f_j v_j.

    With v_j = d_j^1 - d_j^0 on the base activation this is h_S of Minder et al. 2025 (arXiv
    2504.02922), with sign -1 on the fine-tuned one the ablation; with random v_j, their control.
    """

    site: int
    stream: int
    """Position of the site whose activation is shifted."""
    latents: Int[Tensor, " n"]
    directions: Float[Tensor, "n d_model"]
    """v_j, raw space."""
    sign: float = 1.0

    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos d_model"]:
        """Shifted where latents of the set are active."""
        start = acts.x[self.stream]
        added = latent_contributions(acts, self.directions, self.latents)
        return start + self.sign * added.view_as(start).to(start)


@dataclass(frozen=True, eq=False, kw_only=True)
class ProjectOut(Edit):
    """An activation without its part in the span of some directions, or with that of another.

    x^m - Q Q' x^m, and + Q Q' x^other where a replacement is named (Minder et al. 2025, ADL 2025).
    """

    site: int
    stream: int
    directions: Float[Tensor, "n d_model"]
    replacement: int | None = None
    """Position of the site whose projection takes the place; None is nothing."""

    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos d_model"]:
        """Without its projection."""
        x = acts.x[self.stream]
        other = 0 if self.replacement is None else acts.x[self.replacement]
        Q = orthonormal(self.directions.to(x.device))
        return x - (x - other) @ Q @ Q.T


@dataclass(frozen=True, eq=False, kw_only=True)
class AddVector(Edit):
    """An activation plus the same vector at every token: steering."""

    site: int
    stream: int
    vector: Float[Tensor, "*rows d_model"]
    """`[d_model]`, or `[batch, 1, d_model]`: another vector in each row of the batch."""

    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos d_model"]:
        """Shifted everywhere."""
        x = acts.x[self.stream]
        return x + self.vector.to(x)


@dataclass(frozen=True, eq=False, kw_only=True)
class Together(Edit):
    """What several edits of one activation change, added up."""

    site: int
    edits: tuple[Edit, ...]

    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos d_model"]:
        """x^m + sum_i (edit_i(x)^m - x^m)."""
        x = acts.x[self.site]
        return x + torch.stack([edit(acts) - x for edit in self.edits]).sum(dim=0)


@dataclass(frozen=True, eq=False, kw_only=True)
class ReplaceWithReconstruction(Edit):
    """A reconstruction, and the error of a site or none: x̂^m + e^other.

    With the error of the other model this tells what the dictionary holds of the behaviour from
    what it leaves out (Minder et al. 2025). Tokens without codes, on which the dictionary was not
    trained, keep the activation of the reconstructed site.
    """

    site: int
    ctx: InterventionContext
    reconstruction: int
    """Position of the site whose reconstruction is taken."""
    error: int | None = None
    """Position of the site whose error x - x̂ is added."""

    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos d_model"]:
        """Reconstructed where there are codes."""
        new = reconstruction(self.ctx, acts, self.reconstruction)
        if self.error is not None:
            x = acts.x[self.error]
            new = new + x - reconstruction(self.ctx, acts, self.error)
        return torch.where(acts.counted[..., None], new, acts.x[self.reconstruction])


@dataclass(frozen=True, eq=False, kw_only=True)
class ErrorAndBias(Edit):
    """What the latents leave out of the difference: x^0 + (e^1 - e^0) + (b^1 - b^0).

    That is x^1 - sum_j f_j (d_j^1 - d_j^0).
    """

    site: int
    ctx: InterventionContext

    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos d_model"]:
        """Errors and biases of both on the base activation."""
        x = acts.x[self.ctx.finetuned]
        return x - latent_contributions(acts, self.ctx.difference).view_as(x)


@dataclass(frozen=True, eq=False, kw_only=True)
class EditAtTokens(Edit):
    """An edit at some tokens, and a site's activation at the others."""

    edit: Edit
    places: "TokenFilter"
    otherwise: int
    """Position of the site whose activation stands at the other tokens."""

    @property
    def site(self) -> int:  # type: ignore[override]
        """Site of the edit."""
        return self.edit.site

    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos d_model"]:
        """Edited at its tokens."""
        new, x = self.edit(acts), acts.x[self.otherwise]
        mask = self.places.mask(acts.text.role_ids, acts.text.dropped)
        return torch.where(mask.to(x.device)[..., None], new, x)


@dataclass(frozen=True, kw_only=True)
class TokenFilter:
    """Which tokens: of some roles, at the start of each run of them, at some positions."""

    roles: tuple[str, ...] | None = None
    """Roles among `ROLES`; None is every role."""
    first: int | None = None
    """Only the first so many tokens of each run of tokens of these roles."""
    positions: tuple[int, ...] | None = None
    """Only at these positions of a context."""

    def __post_init__(self) -> None:
        unknown = [r for r in self.roles or () if r not in ROLES]
        if unknown:
            raise ValueError(f"roles {unknown} are not known; they are {list(ROLES)}.")
        if self.first is not None and self.first < 1:
            raise ValueError(f"first is {self.first}; it is one token or more.")

    def mask(
        self, role_ids: Integer[Tensor, "batch pos"], dropped: Integer[Tensor, "batch pos"]
    ) -> Bool[Tensor, "batch pos"]:
        """True at these tokens of a text, by its `role_ids` and `dropped`; never at padding."""
        chosen = dropped != DROP_REASONS.index("padding")
        if self.roles is not None:
            ids = torch.tensor([ROLES.index(r) for r in self.roles])
            chosen = chosen & torch.isin(role_ids.long(), ids)
        if self.first is not None:
            chosen = chosen & (place_in_run(chosen) < self.first)
        if self.positions is not None:
            at = torch.zeros(chosen.shape[1], dtype=torch.bool)
            at[[p for p in self.positions if p < len(at)]] = True
            chosen = chosen & at
        return chosen


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenMask:
    """Tokens of one text, chosen one by one; for no other text."""

    chosen: Bool[Tensor, "contexts pos"]

    def mask(
        self,
        role_ids: Integer[Tensor, "contexts pos"],
        dropped: Integer[Tensor, "contexts pos"],  # noqa: ARG002
    ) -> Bool[Tensor, "contexts pos"]:
        """The tokens. Raises ValueError for a text of another shape."""
        if role_ids.shape != self.chosen.shape:
            raise ValueError(
                f"tokens were chosen in a text of shape {tuple(self.chosen.shape)}, not "
                f"{tuple(role_ids.shape)}: give the text that they were chosen in."
            )
        return self.chosen


Places = TokenFilter | TokenMask


def place_in_run(chosen: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """For each chosen token, how many chosen ones stand right before it; elsewhere 0."""
    n = torch.arange(chosen.shape[1]).expand(chosen.shape)
    last_gap = torch.where(chosen, -1, n).cummax(dim=1).values
    return torch.where(chosen, n - last_gap - 1, 0)


def latent_contributions(
    acts: SiteActivations,
    directions: Float[Tensor, "n d_model"],
    latents: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, "tokens d_model"]:
    """sum_{j in S} f_j v_j at every token; S is all latents where none are named."""
    assert acts.codes is not None, "latents need a dictionary"
    chosen = acts.codes if latents is None else only(acts.codes, latents)
    return chosen.times(directions.to(chosen.values))


def only(codes: SparseCodes, latents: Int[Tensor, " n"]) -> SparseCodes:
    """The codes of a set of latents, renumbered by their place in it."""
    place = torch.full((codes.pattern.d_sae,), -1, dtype=torch.int32, device=latents.device)
    place[latents] = torch.arange(len(latents), dtype=torch.int32, device=latents.device)
    places = place[codes.pattern.latents.long()]
    kept = codes.where(places >= 0)
    pattern = replace(kept.pattern, latents=places[places >= 0], d_sae=max(1, len(latents)))
    return replace(kept, pattern=pattern)


def is_active(acts: SiteActivations, latents: Int[Tensor, " n"]) -> Bool[Tensor, "batch pos"]:
    """Tokens on which one of these latents is active."""
    assert acts.codes is not None, "latents need a dictionary"
    chosen = only(acts.codes, latents)
    n = chosen.pattern.offsets.diff() > 0
    return n.view(acts.text.tokens.shape)


def reconstruction(
    ctx: InterventionContext, acts: SiteActivations, site: int
) -> Float[Tensor, "batch pos d_model"]:
    """x̂^m at every token."""
    added = latent_contributions(acts, ctx.decoder(site)).view_as(acts.x[site])
    return added + ctx.dictionary.decoder_bias(site).detach()


def orthonormal(directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "d_model rank"]:
    """An orthonormal basis of the span; directions within float error of the others add none."""
    U, S, _ = torch.linalg.svd(directions.double().T, full_matrices=False)
    return U[:, 1e-6 * S.max().clamp(min=1e-30) < S].to(directions.dtype)
