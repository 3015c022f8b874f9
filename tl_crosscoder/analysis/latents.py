"""What has been measured of each latent: norms and cosines, firing, scaling, the difference.

Contract: tensors `[d_sae]`; `tensors` and `facts` are all of it, and make it again. Limit: two
sites are compared, see `site.compared_sites`.

Which latents are most likely to be the fine-tune, from measures alone, without labels.

    score_j = R_j alone_j      R_j: relative decoder norm; alone_j: the share of the variance of
                               x^1 - x^0 that goes when only latent j speaks

is ours: a latent has to lean to the fine-tuned model and to say something of what changed. By R
alone, as in Kassem et al. 2026, come latents that hardly fire on anything that matters: what
ablating the first of either order does is in `benchmarks/results/causal_tests.json`. Towards the
base it is (1 - R_j) alone_j. Limit: where there is no difference to take (one site, unequal
widths), latents are ranked by R or by how often they fire.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.firing import Firing
from tl_crosscoder.analysis.latent_scaling import DifferenceByLatent, LatentScaling
from tl_crosscoder.analysis.norms import LATENT_CLASSES, latent_class_ids
from tl_crosscoder.results.tables import TableOfColumns, TableOfRows

if TYPE_CHECKING:
    import pandas as pd

EXPLAINED = ("explained_difference", "explained_difference_drop")
NORMS = ("relative_decoder_norm", "delta_norm", "decoder_cosine", "encoder_cosine")


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
    """What each latent says of x^1 - x^0; None where there is none."""

    @property
    def class_ids(self) -> Int[Tensor, " d_sae"]:
        """Index into `LATENT_CLASSES`."""
        return latent_class_ids(self.delta_norm)

    @property
    def n_active(self) -> Float[Tensor, " d_sae"]:
        """Tokens of the measured text on which the latent is active."""
        return self.firing.n_active

    @property
    def n_active_by_source(self) -> Float[Tensor, "n_sources d_sae"]:
        """The same for each source of the text."""
        return self.firing.n_active_by_source

    def parts(self) -> dict[str, TableOfColumns]:
        """The tables in it, by name."""
        found: dict[str, TableOfColumns] = {"firing": self.firing}
        found |= {f"scaling.{name}": table for name, table in self.scaling.items()}
        return found | ({"difference": self.difference} if self.difference else {})

    def norms(self) -> dict[str, Tensor]:
        """What is read off the weights alone."""
        return {name: getattr(self, name) for name in NORMS}

    def to_frame(self) -> "pd.DataFrame":
        """One row a latent: everything that has been measured of it."""
        import pandas as pd

        columns: dict[str, Any] = {name: t.tolist() for name, t in self.norms().items()}
        columns["class"] = [LATENT_CLASSES[i] for i in self.class_ids.tolist()]
        for name, part in self.parts().items():
            own = part.columns()
            prefix = "" if name == "firing" else f"{name}."
            columns |= {f"{prefix}{column}": values for column, values in own.items()}
        for name, table in self.scaling.items():
            columns[f"scaling.{name}.nu_error"] = table.nu_error.tolist()
            columns[f"scaling.{name}.nu_reconstruction"] = table.nu_reconstruction.tolist()
        frame = pd.DataFrame(columns)
        frame.index.name = "latent"
        return frame

    def tensors(self) -> dict[str, Tensor]:
        """Everything of one size, those of a part with its name before theirs."""
        found = self.norms()
        for name, part in self.parts().items():
            found |= {f"{name}.{column}": t for column, t in part.tensors().items()}
        return found

    def facts(self) -> dict[str, Any]:
        """What else the parts hold, by part."""
        return {name: part.facts() for name, part in self.parts().items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> "LatentMeasures":
        """Inverse of `tensors` and `facts`."""
        own: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, column = name.rpartition(".")
            own.setdefault(part, {})[column] = tensor
        difference = own.get("difference")
        return cls(
            **own[""],
            firing=Firing.from_tensors(own["firing"], facts["firing"]),
            scaling={
                part.removeprefix("scaling."): LatentScaling.from_tensors(own[part], own_facts)
                for part, own_facts in facts.items()  # tensors of a file are in no order
                if part.startswith("scaling.")
            },
            difference=None if difference is None else DifferenceByLatent(**difference),
        )


MIN_ACTIVE_TOKENS = 10
"""A latent active on fewer held-out tokens is not ranked: its norms were hardly trained."""
UNRANKED = f"No latent is active on {MIN_ACTIVE_TOKENS} held-out tokens or more: none is ranked."
Order = Literal["score", "relative_decoder_norm", "difference", "nu", "activity"]
"""What latents are ranked by; `nu` is the sum of the ranks in |nu_error| and |nu_reconstruction|
(Minder et al. 2025), lowest first."""
Toward = Literal["finetuned", "base"]


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
    """Share of it that is left unexplained besides if only this latent is silent."""
    n_active: int
    """Tokens on which it is active."""
    active_share: float
    """Share of all tokens on which it is."""
    template_share: float
    """Share of these that are tokens of the chat template."""
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
        """Their numbers."""
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
    keys = _KEYS[by](latents, toward)
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
    values = _ingredients(latents, toward)
    rows = [
        RankedLatent(
            place=place,
            latent=j,
            n_active=int(latents.n_active[j]),
            latent_class=LATENT_CLASSES[int(latents.class_ids[j])],
            **{name: value[j].item() for name, value in values.items()},
        )
        for place, j in enumerate(chosen, 1)
    ]
    return Ranking(rows=tuple(rows), order=order, toward=toward)


def default_order(latents: LatentMeasures) -> Order:
    """The score where a difference has been measured, else the relative norm, else activity."""
    if not bool(_score(latents, "finetuned").isnan().all()):
        return "score"
    has_norms = not bool(latents.relative_decoder_norm.isnan().all())
    return "relative_decoder_norm" if has_norms else "activity"


def _ingredients(latents: LatentMeasures, toward: str) -> dict[str, Float[Tensor, " d_sae"]]:
    none = torch.full_like(latents.relative_decoder_norm, torch.nan)
    found = dict.fromkeys(("nu_error", "nu_reconstruction", *EXPLAINED), none)
    if toward in latents.scaling:
        scaling = latents.scaling[toward]
        found |= {"nu_error": scaling.nu_error, "nu_reconstruction": scaling.nu_reconstruction}
    if latents.difference is not None:
        found |= {name: getattr(latents.difference, name) for name in EXPLAINED}
    return found | {
        "score": _score(latents, toward),
        "relative_decoder_norm": latents.relative_decoder_norm,
        "delta_norm": latents.delta_norm,
        "decoder_cosine": latents.decoder_cosine,
        "active_share": latents.firing.rate,
        "template_share": latents.firing.template_share,
    }


def _lean(latents: LatentMeasures, toward: str) -> Float[Tensor, " d_sae"]:
    R = latents.relative_decoder_norm.double()
    return R if toward == "finetuned" else 1 - R


def _score(latents: LatentMeasures, toward: str) -> Float[Tensor, " d_sae"]:
    if latents.difference is None:
        return torch.full_like(latents.relative_decoder_norm.double(), torch.nan)
    return _lean(latents, toward) * latents.difference.explained_difference


def _difference(latents: LatentMeasures, toward: str) -> Float[Tensor, " d_sae"]:
    del toward
    return _score(latents, "finetuned") + _score(latents, "base")


def _nu(latents: LatentMeasures, toward: str) -> Float[Tensor, " d_sae"]:
    if toward not in latents.scaling:
        return torch.full_like(latents.relative_decoder_norm.double(), torch.nan)
    scaling = latents.scaling[toward]
    return nu_keys(scaling.nu_error, scaling.nu_reconstruction)


def nu_keys(
    nu_error: Float[Tensor, " n"], nu_reconstruction: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Minus the sum of the ranks in |nu_error| and |nu_reconstruction|; NaN where either is."""
    parts = [nu.double().abs() for nu in (nu_error, nu_reconstruction)]
    ranks = sum(p.nan_to_num(torch.inf).argsort(stable=True).argsort(stable=True) for p in parts)
    missing = parts[0].isnan() | parts[1].isnan()
    return (-torch.as_tensor(ranks).double()).masked_fill(missing, torch.nan)


def _activity(latents: LatentMeasures, toward: str) -> Float[Tensor, " d_sae"]:
    del toward
    return latents.n_active


_KEYS: dict[str, Callable[[LatentMeasures, str], Float[Tensor, " d_sae"]]] = {
    "score": _score,
    "relative_decoder_norm": _lean,
    "difference": _difference,
    "nu": _nu,
    "activity": _activity,
}
