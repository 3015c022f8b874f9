"""What has been measured of each latent, and which latents are most likely to be the fine-tune.

    score_j = R_j explained_j       R_j: relative decoder norm; explained_j: the share of the
                                    variance of x^1 - x^0 that latent j explains alone

is ours: a latent has to lean to the fine-tuned model and to explain something of what changed; in
order of R alone, as in Kassem et al. 2026, the first are latents that are hardly ever active
(`benchmarks/results/causal_tests.json` ablates the first of either order). Contract: tensors
`[d_sae]`, no labels. Limit: two sites are compared; where there is no difference to take (one site,
unequal widths) latents are ranked by R or by activity.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.firing import Firing
from tl_crosscoder.analysis.geometry import LATENT_CLASSES, NORMS, latent_class_ids
from tl_crosscoder.analysis.latent_scaling import DifferenceByLatent, LatentScaling
from tl_crosscoder.results.tables import TableOfColumns, TableOfRows

if TYPE_CHECKING:
    import pandas as pd

MIN_ACTIVE_TOKENS = 10
"""A latent active on fewer held-out tokens is not ranked: its norms were hardly trained."""
UNRANKED = f"No latent is active on {MIN_ACTIVE_TOKENS} held-out tokens or more: none is ranked."
Order = Literal["score", "relative_decoder_norm", "difference", "nu", "activity"]
"""What latents are ranked by; `nu` is the sum of the ranks in |nu_error| and |nu_reconstruction|
(Minder et al. 2025), lowest first."""
Toward = Literal["finetuned", "base"]


@dataclass(frozen=True, kw_only=True)
class LatentMeasures:
    """One value per latent, `[d_sae]`; norms, cosines and class compare two sites.

    NaN where there is only one, and cosines also where they are not of one width.
    """

    relative_decoder_norm: Float[Tensor, " d_sae"]
    delta_norm: Float[Tensor, " d_sae"]
    decoder_cosine: Float[Tensor, " d_sae"]
    encoder_cosine: Float[Tensor, " d_sae"]
    firing: Firing
    scaling: dict[str, LatentScaling] = field(default_factory=dict)
    """By direction: `finetuned`, `base` and the controls; empty where sites differ in width."""
    difference: DifferenceByLatent | None = None
    """What each latent explains of x^1 - x^0; None where there is no difference."""

    @property
    def class_ids(self) -> Int[Tensor, " d_sae"]:
        """Index into `LATENT_CLASSES`."""
        return latent_class_ids(self.delta_norm)

    @property
    def n_active(self) -> Float[Tensor, " d_sae"]:
        """Tokens of the measured text on which the latent is active."""
        return self.firing.n_active

    def tables(self) -> dict[str, TableOfColumns]:
        """Everything but norms and cosines, by name."""
        found: dict[str, TableOfColumns] = {"firing": self.firing}
        found |= {f"scaling.{name}": table for name, table in self.scaling.items()}
        return found | ({"difference": self.difference} if self.difference else {})

    def to_frame(self) -> "pd.DataFrame":
        """One row a latent: everything that has been measured of it."""
        import pandas as pd

        columns: dict[str, Any] = {name: getattr(self, name).tolist() for name in NORMS}
        columns["class"] = [LATENT_CLASSES[i] for i in self.class_ids.tolist()]
        for name, table in self.tables().items():
            prefix = "" if name == "firing" else f"{name}."
            columns |= {f"{prefix}{column}": v for column, v in table.columns().items()}
        for name, scaling in self.scaling.items():
            columns[f"scaling.{name}.nu_error"] = scaling.nu_error.tolist()
            columns[f"scaling.{name}.nu_reconstruction"] = scaling.nu_reconstruction.tolist()
        frame = pd.DataFrame(columns)
        frame.index.name = "latent"
        return frame

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, those of a table with its name before theirs."""
        found: dict[str, Tensor] = {name: getattr(self, name) for name in NORMS}
        for name, table in self.tables().items():
            found |= {f"{name}.{column}": t for column, t in table.tensors().items()}
        return found

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> "LatentMeasures":
        """Inverse of `tensors`, and of `facts` of each of the `tables`."""
        own: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            table, _, column = name.rpartition(".")
            own.setdefault(table, {})[column] = tensor
        difference = own.get("difference")
        return cls(
            **own[""],
            firing=Firing.from_tensors(own["firing"], facts["firing"]),
            scaling={
                table.removeprefix("scaling."): LatentScaling.from_tensors(own[table], own_facts)
                for table, own_facts in facts.items()  # tensors of a file are in no order
                if table.startswith("scaling.")
            },
            difference=None if difference is None else DifferenceByLatent(**difference),
        )


@dataclass(frozen=True, kw_only=True)
class RankedLatent:
    """A latent with what its place was made of; NaN where a measure has no value."""

    place: int
    latent: int
    score: float
    relative_decoder_norm: float
    delta_norm: float
    decoder_cosine: float
    nu_error: float
    nu_reconstruction: float
    explained_difference: float
    """Share of the variance of x^1 - x^0 that this latent explains alone."""
    explained_difference_drop: float
    """Share of that variance that the dictionary explains less if only this latent is left out."""
    n_active: int
    """Tokens on which it is active."""
    active_share: float
    """Share of all kept tokens on which it is active."""
    template_share: float
    """Share of the tokens on which it is active that belong to the chat template."""
    latent_class: str


@dataclass(frozen=True, kw_only=True)
class Ranking(TableOfRows):
    """Latents in order, first the most likely."""

    ROW: ClassVar[type] = RankedLatent
    rows: tuple[RankedLatent, ...]
    order: str
    toward: str

    @property
    def latents(self) -> list[int]:
        """Latents in this order."""
        return [row.latent for row in self.rows]


def rank_latents(
    latents: LatentMeasures,
    *,
    n: int | None = 10,
    by: str | None = None,
    toward: str = "finetuned",
) -> Ranking:
    """The n latents most likely to be the fine-tune's, or what it took from the base.

    Args:
        latents: measures of one pass.
        n: how many; None is all that are active on `MIN_ACTIVE_TOKENS` or more.
        by: see `Order`; None is the score where there is one, else what there is.
        toward: which model's.

    Raises:
        ValueError: an order that these latents do not have.
    """
    by = by or default_order(latents)
    if by not in get_args(Order) or toward not in get_args(Toward):
        raise ValueError(
            f"by {by!r} and toward {toward!r}: latents are ranked by one of "
            f"{list(get_args(Order))}, toward one of {list(get_args(Toward))}."
        )
    keys = _keys(latents, by, toward)
    if bool(keys.isnan().all()):
        raise ValueError(
            f"these latents cannot be ranked by {by!r}: their sites have nothing to compare. Rank "
            "them by 'activity'."
        )
    keys = keys.masked_fill(latents.n_active < MIN_ACTIVE_TOKENS, torch.nan)
    # Of equal keys, such as norms of latents that write to one site alone, the most active first.
    by_activity = latents.n_active.sort(descending=True, stable=True).indices
    order = keys.nan_to_num(-torch.inf)[by_activity].sort(descending=True, stable=True).indices
    chosen = [j for j in by_activity[order][:n].tolist() if not keys[j].isnan()]
    return in_order(latents, chosen, order=by, toward=toward)


def in_order(
    latents: LatentMeasures, chosen: Sequence[int], *, order: str, toward: str = "finetuned"
) -> Ranking:
    """Some latents in an order of your own, with their measures."""
    none = torch.full_like(latents.relative_decoder_norm, torch.nan)
    columns = {
        "score": _keys(latents, "score", toward),
        "relative_decoder_norm": latents.relative_decoder_norm,
        "delta_norm": latents.delta_norm,
        "decoder_cosine": latents.decoder_cosine,
        "active_share": latents.firing.rate,
        "template_share": latents.firing.template_share,
    }
    # Tables that these latents may lack, and the columns taken from them.
    for table, names in (
        (latents.scaling.get(toward), ("nu_error", "nu_reconstruction")),
        (latents.difference, ("explained_difference", "explained_difference_drop")),
    ):
        columns |= {name: none if table is None else getattr(table, name) for name in names}
    rows = [
        RankedLatent(
            place=place,
            latent=j,
            n_active=int(latents.n_active[j]),
            latent_class=LATENT_CLASSES[int(latents.class_ids[j])],
            **{name: column[j].item() for name, column in columns.items()},
        )
        for place, j in enumerate(chosen, 1)
    ]
    return Ranking(rows=tuple(rows), order=order, toward=toward)


def default_order(latents: LatentMeasures) -> Order:
    """The score where a difference has been measured, else the relative norm, else activity."""
    if not bool(_keys(latents, "score", "finetuned").isnan().all()):
        return "score"
    has_norms = not bool(latents.relative_decoder_norm.isnan().all())
    return "relative_decoder_norm" if has_norms else "activity"


def nu_keys(
    nu_error: Float[Tensor, " n"], nu_reconstruction: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Minus the sum of the ranks in |nu_error| and |nu_reconstruction|; NaN where either is."""
    parts = [nu.double().abs() for nu in (nu_error, nu_reconstruction)]
    ranks = sum(p.nan_to_num(torch.inf).argsort(stable=True).argsort(stable=True) for p in parts)
    missing = parts[0].isnan() | parts[1].isnan()
    return (-torch.as_tensor(ranks).double()).masked_fill(missing, torch.nan)


def _keys(latents: LatentMeasures, by: str, toward: str) -> Float[Tensor, " d_sae"]:
    """What latents are ranked by, the largest first; NaN where they cannot be."""
    R = latents.relative_decoder_norm.double()
    none = torch.full_like(R, torch.nan)
    lean = R if toward == "finetuned" else 1 - R
    if by == "relative_decoder_norm":
        return lean
    if by == "activity":
        return latents.n_active
    if by == "nu":
        scaling = latents.scaling.get(toward)
        return none if scaling is None else nu_keys(scaling.nu_error, scaling.nu_reconstruction)
    if latents.difference is None:
        return none
    explained = latents.difference.explained_difference
    # A latent without decoder norms explains nothing and is not ranked.
    return lean * explained if by == "score" else explained.masked_fill(R.isnan(), torch.nan)
