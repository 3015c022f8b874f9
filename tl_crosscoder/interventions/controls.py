"""Controls: edits that an edit is compared with, of which nothing in particular is expected.

    random       isotropic Gaussian directions
    covariance   Gaussian directions with the second moment of x^1 - x^0, its mean included
    shuffled     rows of other latents that are active about as often: latent j writes the row of
                 another one, never its own
    matched      other latents that are active about as often, with codes and rows of their own
    null         rows of a dictionary of a null pair, base against itself

Contract: all but `matched` keep the codes of the edit and the norms of its rows, and their shift of
the activation is scaled at every token to the norm of the edit's (`SameNorm`): a control that does
less is not one that was pushed less. Isotropic directions are the weakest: most of them point where
activations never go. Limit: of methods without latents there are `random` and `covariance` alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.analysis.resampling import N_DRAWS
from tl_crosscoder.config.causal import CONTROLS, MAX_CE_COST
from tl_crosscoder.config.settings import NaturalInt, Number, PositiveFloat, PositiveInt, Settings
from tl_crosscoder.data.harvest import harvest_rows
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.context import InterventionContext, SiteActivations
from tl_crosscoder.interventions.edits import Edit
from tl_crosscoder.interventions.latent_edits import random_like
from tl_crosscoder.models.site import site_parts

KINDS = (*CONTROLS, "null")
Rows = Float[Tensor, "n d_model"]
ENOUGH = 3
"""Controls of the first round that decide: of 10, a p-value of 0.36 or more."""


@dataclass(frozen=True, kw_only=True)
class ControlSettings(Settings):
    """How many controls, and of what kind."""

    controls: tuple[str, ...] = CONTROLS
    """Kinds of control; see `interventions.controls`. The time of a test grows with their number,
    as each is a pass of the layers above the hook; those below run once."""
    n_random: PositiveInt = 100
    """Controls of each kind but `matched`, of which the field asks for 100 at least."""
    n_matched: NaturalInt = 10
    """Random sets of latents of the same firing rate."""
    first_round: NaturalInt = 0
    """Run so many of each kind first, and then only the others of the strongest kind, unless
    `ENOUGH` of the first did as much as what is tested: a p-value that cannot become small needs no
    more (sequential Monte Carlo, Besag and Clifford 1991). 0 runs all of every kind."""
    alphas: tuple[Number, ...] = (0.5, 1.0, 2.0)
    """Strengths of steering, in units of the mean norm of the activation."""
    max_ce_cost: PositiveFloat = MAX_CE_COST
    """Nats a token of neutral text above which an edited model is called broken; 0.5 multiplies its
    perplexity by 1.65 (see `config.causal.MAX_CE_COST`)."""
    n_draws: PositiveInt = N_DRAWS
    seed: NaturalInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = set(self.controls) - set(CONTROLS)
        if unknown or not self.controls or not self.alphas:
            raise ValueError(
                f"controls are {list(self.controls)} and alphas {list(self.alphas)}: give one kind "
                f"or more among {list(CONTROLS)}, and one strength or more."
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class ShiftNorm:
    """Norm of what an edit does at every token, computed once for all controls of the edit."""

    edit: Edit
    stream: int
    """Position of the site whose activation is shifted."""
    _known: WeakKeyDictionary[SiteActivations, Tensor] = field(default_factory=WeakKeyDictionary)

    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos"]:
        """||edited - x||."""
        if acts not in self._known:
            self._known[acts] = (self.edit(acts) - acts.x[self.stream]).norm(dim=-1)
        return self._known[acts]


@dataclass(frozen=True, eq=False, kw_only=True)
class SameNorm(Edit):
    """An edit whose shift is scaled at every token to the norm of another's.

    Where it does nothing at all, it still does nothing.
    """

    edit: Edit
    norm: ShiftNorm

    @property
    def site(self) -> int:  # type: ignore[override]
        """Site of the edit."""
        return self.edit.site

    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos d_model"]:
        """Shifted along the edit as far as the other one shifts."""
        x = acts.x[self.norm.stream]
        shift = self.edit(acts) - x
        scale = self.norm(acts) / shift.norm(dim=-1).clamp(min=1e-30)
        return x + scale[..., None] * shift


def of_same_norm(
    own: Edit,
    drawn: Mapping[str, Sequence[Rows]],
    *,
    stream: int,
    make: Callable[[Rows], Edit],
) -> dict[str, list[Edit]]:
    """Controls by kind: edits along drawn rows, scaled to an edit token by token.

    Args:
        own: the edit.
        drawn: rows in the place of its own, by kind.
        stream: position of the site whose activation is shifted.
        make: an edit along rows.
    """
    norm = ShiftNorm(edit=own, stream=stream)
    return {
        kind: [SameNorm(edit=make(rows), norm=norm) for rows in each]
        for kind, each in drawn.items()
    }


def gaussian_rows(
    rows: Rows, *, n: int, seed: int, factors: Mapping[str, Tensor | None]
) -> dict[str, list[Rows]]:
    """Draws of Gaussian rows of the norms of some rows, by kind.

    Args:
        rows: an edit's own.
        n: draws of each kind.
        seed: of the draws; those of one kind do not depend on the other kinds.
        factors: F of the covariance F F' of each kind, None where it is isotropic; see
            `gaussian_factors`.
    """
    found = {}
    for kind, factor in factors.items():
        generator = torch.Generator().manual_seed(seed + KINDS.index(kind) * 2**32)
        found[kind] = [random_like(rows, generator, factor=factor) for _ in range(n)]
    return found


@torch.no_grad()
def gaussian_factors(
    ctx: InterventionContext, text: TokenizedText, kinds: Sequence[str], *, batch_size: int = 32
) -> dict[str, Tensor | None]:
    """What `gaussian_rows` draws with, of those of these kinds that are Gaussian.

    The text is run through the models where `covariance` is among them: F F' is then the sum of
    (x^1 - x^0)(x^1 - x^0)' over its tokens that count, in float64.
    """
    found: dict[str, Tensor | None] = {"random": None} if "random" in kinds else {}
    if "covariance" in kinds:
        source = ctx.models.side_by_side()
        d_model = source.sites[ctx.base].d_model
        moment = torch.zeros(d_model, d_model, dtype=torch.float64, device=source.device)
        for rows in harvest_rows(source, text, batch_size=batch_size):
            parts = site_parts(rows, source.sites)
            difference = (parts[ctx.finetuned] - parts[ctx.base]).double()
            moment.addmm_(difference.T, difference)
        values, vectors = torch.linalg.eigh(moment)
        found["covariance"] = vectors * values.clamp(min=0).sqrt()
    return found
