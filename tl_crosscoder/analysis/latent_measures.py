"""What has been measured of each latent: norms and cosines, firing, scaling, the difference.

Contract: tensors `[d_sae]`; `tensors` and `facts` are all of it, and make it again. Limit: two
sites are compared, see `site.compared_sites`.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.analysis.decoder_norms import LATENT_CLASSES, latent_class_ids
from tl_crosscoder.analysis.firing import Firing
from tl_crosscoder.analysis.latent_scaling import DifferenceByLatent, LatentScaling
from tl_crosscoder.tables import TableOfColumns

if TYPE_CHECKING:
    import pandas as pd

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
