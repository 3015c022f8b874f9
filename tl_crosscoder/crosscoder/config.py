"""What a crosscoder is: its sites, its size, and for training how it is made sparse.

Both configs are SAELens configs, so `cfg.json` is read by `SAE.load_from_disk`. They are mutable
because SAELens moves devices and dtypes by assignment. Limit: SAELens writes `metadata` as it is,
so everything in it stays plain JSON.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, get_args

from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from sae_lens.saes.sae import SAEConfig, SAEMetadata, TrainingSAEConfig

from tl_crosscoder.crosscoder.sparsity import (
    BatchTopK,
    Sparsity,
    sparsity_from_dict,
    sparsity_to_dict,
)
from tl_crosscoder.pair import Site

ARCHITECTURE = "tl_crosscoder"

Reconstruction = Literal["sum", "mean", "norm"]


@dataclass(frozen=True, kw_only=True)
class AuxK:
    """Dead latents learn to reconstruct what the living left over (Gao et al. 2024, A.2)."""

    weight: float = 1 / 32
    """Of the loss, which is the squared error of the residual over the residual's variance."""
    k: int | None = None
    """Dead latents a token; None is half of d_in, and never more than are dead."""


def _as_sites(sites: object, d_in: int) -> tuple[Site, ...]:
    """Sites from objects or dicts; without any, one site as wide as the input (an SAE)."""
    given = cast("list[Site | dict[str, Any]]", sites or [])
    found = tuple(s if isinstance(s, Site) else Site.from_dict(s) for s in given)
    found = found or (Site(name="site_0", d_model=d_in, hook_name="", model_name=""),)
    widths = [s.d_model for s in found]
    if sum(widths) != d_in:
        raise ValueError(
            f"d_in is {d_in}, but the sites {[s.name for s in found]} have widths {widths}, "
            f"together {sum(widths)}. d_in is the sum of the site widths."
        )
    if len({s.name for s in found}) < len(found):
        raise ValueError(f"site names must differ, got {[s.name for s in found]}.")
    return found


@dataclass
class CrosscoderConfig(JumpReLUSAEConfig):
    """An inference crosscoder: a JumpReLU SAE over the concatenation of its sites."""

    apply_b_dec_to_input: bool = False
    sites: tuple[Site, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sites = _as_sites(self.sites, self.d_in)
        if isinstance(self.metadata, dict):  # as SAELens's from_dict passes it
            self.metadata = SAEMetadata.from_dict(self.metadata)
        self.metadata.sites = [s.to_dict() for s in self.sites]

    @classmethod
    def architecture(cls) -> str:
        """The name under which SAELens finds this class."""
        return ARCHITECTURE

    def to_dict(self) -> dict[str, Any]:
        """JSON form; sites stand in the config and, for exports, in the metadata."""
        return super().to_dict() | {"sites": [s.to_dict() for s in self.sites]}


@dataclass(kw_only=True)
class CrosscoderTrainingConfig(TrainingSAEConfig):
    """A crosscoder in training.

    Defaults follow Minder et al. 2025: the decoder's bias is not subtracted from the input, the
    decoder starts with rows of norm 1.0 (BatchTopK) or 0.05 (L1) at each site.
    """

    apply_b_dec_to_input: bool = False
    decoder_init_norm: float | None = None
    """Norm of each decoder row at each site; None is the sparsity's own."""
    sites: tuple[Site, ...] = ()
    sparsity: Sparsity = field(default_factory=BatchTopK)
    auxk: AuxK | None = field(default_factory=AuxK)
    """Helps dead latents; None switches it off. L1 never uses it."""
    reconstruction: Reconstruction = "sum"
    """Reduction of the squared error of a token: its sum over dimensions, its mean, or the norm
    (unsquared) that some public crosscoders train with. Sites are summed in every case."""

    def __post_init__(self) -> None:
        self.sites = _as_sites(self.sites, self.d_in)
        if isinstance(self.sparsity, Mapping):
            self.sparsity = sparsity_from_dict(self.sparsity)
        if isinstance(self.auxk, Mapping):
            self.auxk = AuxK(**self.auxk)
        if isinstance(self.sparsity, BatchTopK) and self.sparsity.k > self.d_sae:
            raise ValueError(
                f"k is {self.sparsity.k:g}, but the dictionary has only {self.d_sae} latents "
                "(d_sae). Choose a smaller k or a larger dictionary."
            )
        if self.reconstruction not in get_args(Reconstruction):
            raise ValueError(
                f"reconstruction is {self.reconstruction!r}; it is one of "
                f"{', '.join(get_args(Reconstruction))}."
            )
        if self.normalize_activations not in ("none", "expected_average_only_in"):
            raise ValueError(
                f"normalize_activations={self.normalize_activations!r} mixes the sites or depends "
                "on the token; a crosscoder takes 'none' (the trainer of this package scales each "
                "site by itself) or SAELens's 'expected_average_only_in'."
            )
        super().__post_init__()
        self.metadata.sites = [s.to_dict() for s in self.sites]

    @classmethod
    def architecture(cls) -> str:
        """The name under which SAELens finds this class."""
        return ARCHITECTURE

    def get_inference_config_class(self) -> type[SAEConfig]:
        """What a trained crosscoder is saved as."""
        return CrosscoderConfig

    def _objects_as_dicts(self) -> dict[str, Any]:
        return {
            "sites": [s.to_dict() for s in self.sites],
            "sparsity": sparsity_to_dict(self.sparsity),
            "auxk": asdict(self.auxk) if self.auxk else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return super().to_dict() | self._objects_as_dicts()

    def get_training_architecture_details(self) -> dict[str, Any]:
        """JSON form of the fields that matter in training only; kept in the metadata."""
        details = super().get_training_architecture_details()
        return details | {k: v for k, v in self._objects_as_dicts().items() if k in details}

    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        """JSON form of the inference config."""
        return super().get_inference_sae_cfg_dict() | {"sites": [s.to_dict() for s in self.sites]}
