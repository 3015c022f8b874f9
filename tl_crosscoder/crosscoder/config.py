"""What a crosscoder is: its sites, its size, and for training how it is made sparse.

Both configs are SAELens configs, so `cfg.json` is read by `SAE.load_from_disk`. They are mutable
because SAELens moves devices and dtypes by assignment. Limit: SAELens writes `metadata` as it is,
so everything in it stays plain JSON.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast, get_args

from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from sae_lens.saes.sae import SAEConfig, SAEMetadata, TrainingSAEConfig
from sae_lens.util import str_to_dtype

from tl_crosscoder.config.presets import (
    ComputeDtype,
    DeltaScale,
    EncoderInit,
    Kernels,
    Reconstruction,
)
from tl_crosscoder.config.settings import NonNegativeFloat, PositiveInt, Settings
from tl_crosscoder.crosscoder.partition import Partition, check_sites, placed, with_renamed_keys
from tl_crosscoder.crosscoder.sparsity import Groups, Sparsity
from tl_crosscoder.crosscoder.topk import BatchTopK
from tl_crosscoder.models.devices import memory_of
from tl_crosscoder.models.site import Site, subtracted_sites

ARCHITECTURE = "tl_crosscoder"


@dataclass(frozen=True, kw_only=True)
class AuxK(Settings):
    """Dead latents learn to reconstruct the residual of the others (Gao et al. 2024, A.2)."""

    weight: NonNegativeFloat = 1 / 32
    """Weight of the term: the squared error of the residual over the residual's variance."""
    k: PositiveInt | None = None
    """Dead latents a token; None is half of d_in, and never more than are dead."""


@dataclass(frozen=True, kw_only=True)
class DeltaLoss(Settings):
    """|| (x^1 - x^0) - sum_{j in partition} f_j (d_j^1 - d_j^0) ||^2, fine-tuned minus base site.

    Source: Kassem et al. 2026, whose masked form sums over the delta latents alone. Over all
    latents and with the bias it is ||e^1 - e^0||^2: the error of the difference.
    """

    weight: NonNegativeFloat = 0.005
    partition: str | None = "delta"
    """Latents that must explain the difference; None is all of them (unmasked)."""
    scale: DeltaScale = "absolute"
    """`relative` divides by a running mean of ||x^1 - x^0||^2, so that the weight does not depend
    on how large the difference is."""
    with_bias: bool = False
    """Whether b_dec^1 - b_dec^0 helps to explain the difference."""


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {choices}.")


def check_memory(cfg: SAEConfig, *, is_training: bool) -> None:
    """Raise ValueError for a dictionary that is larger than its device, before it is allocated.

    In training every weight has a gradient and the two moments of Adam beside it.
    """
    n_weights = (2 * cfg.d_in + 2) * cfg.d_sae * (4 if is_training else 1)
    n_bytes, there = n_weights * str_to_dtype(cfg.dtype).itemsize, memory_of(cfg.device)
    if there is not None and n_bytes > there:
        what = " with gradients and moments" if is_training else ""
        raise ValueError(
            f"a dictionary of d_sae {cfg.d_sae:,} on activations of width {cfg.d_in:,} takes "
            f"{n_bytes / 1e9:,.1f} GB{what}, but {cfg.device} has {there / 1e9:,.1f} GB. Choose a "
            f"d_sae (--d-sae) below {cfg.d_sae * there // n_bytes:,}, or another device."
        )


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
        details = getattr(self.metadata, "training_architecture_details", None)
        if details:
            self.metadata.training_architecture_details = with_renamed_keys(details)
        self.metadata.sites = [s.to_dict() for s in self.sites]

    @classmethod
    def architecture(cls) -> str:
        """Name under which SAELens finds this class."""
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
    """Norm of each decoder row at each site; None is that of the sparsity."""
    encoder_init: EncoderInit = "least_squares"
    """`least_squares` fits biases and scale to a first batch, `transposed` leaves the drawn weights
    as they are, as the papers have it. `Trainer` does so by `initialize_from_`, which SAELens's
    trainers do not call: with them the weights are those drawn, unless you call it."""
    sites: tuple[Site, ...] = ()
    sparsity: Sparsity = field(default_factory=BatchTopK)
    auxk: AuxK | None = field(default_factory=AuxK)
    """Helps dead latents; None switches it off. L1 never uses it."""
    partitions: tuple[Partition, ...] = ()
    """Ranges of latents with rules of their own; without any all latents are alike."""
    delta_loss: DeltaLoss | None = None
    """A term for the difference of fine-tuned and base site; None is none."""
    matryoshka: tuple[float, ...] = ()
    """Shares of the latents that must reconstruct by themselves, rising, below 1: each such prefix
    adds its own reconstruction loss (Bussmann et al. 2025, arXiv 2503.17547)."""
    kernels: Kernels = "auto"
    """`auto` takes the sparse step where it exists and codes are sparse enough; `dense` its
    reference implementation, plain autograd over the codes of all latents."""
    compute_dtype: ComputeDtype | None = None
    """`bfloat16` rounds activations and weights before they are multiplied and adds up in float32;
    weights, codes, gradients and Adam's moments stay as they are. For GPUs: half the memory to
    read. None rounds nothing."""
    compile: bool = False
    """Whether the terms of the loss go through torch.compile. For GPUs: on a CPU it was slower."""
    reconstruction: Reconstruction = "sum"
    """Reduction of the squared error of a token: its sum over dimensions, its mean, or the norm
    (unsquared) that some public crosscoders train with. Sites are summed in every case."""

    def __post_init__(self) -> None:
        self.sites = _as_sites(self.sites, self.d_in)
        if isinstance(self.sparsity, Mapping):
            self.sparsity = Sparsity.from_dict(self.sparsity)
        if isinstance(self.auxk, Mapping):
            self.auxk = AuxK(**self.auxk)
        if isinstance(self.delta_loss, Mapping):
            self.delta_loss = DeltaLoss(**self.delta_loss)
        self.partitions = tuple(
            p if isinstance(p, Partition) else Partition(**p) for p in self.partitions
        )
        self.matryoshka = tuple(self.matryoshka)
        check_sites(self.partitions, self.sites)
        self.selection_groups()
        if self.delta_loss is not None:
            self._check_delta_loss(self.delta_loss)
        shares = self.matryoshka
        if list(shares) != sorted(set(shares)) or any(not 0 < s < 1 for s in shares):
            raise ValueError(f"matryoshka shares rise and lie between 0 and 1, got {shares}.")
        _check_choice("compute_dtype", self.compute_dtype, (None, *get_args(ComputeDtype)))
        _check_choice("encoder_init", self.encoder_init, get_args(EncoderInit))
        _check_choice("kernels", self.kernels, get_args(Kernels))
        _check_choice("reconstruction", self.reconstruction, get_args(Reconstruction))
        if self.normalize_activations not in ("none", "expected_average_only_in"):
            raise ValueError(
                f"normalize_activations={self.normalize_activations!r} mixes the sites or depends "
                "on the token; a crosscoder takes 'none' (the trainer of this package scales each "
                "site by itself) or SAELens's 'expected_average_only_in'."
            )
        super().__post_init__()
        self.metadata.sites = [s.to_dict() for s in self.sites]

    def placed_partitions(self) -> list[tuple[Partition, slice]]:
        """Each partition with its range of latents; empty without partitions."""
        return placed(self.partitions, self.d_sae)

    def selection_groups(self) -> Groups:
        """Ranges of latents that compete with one another for a k; empty where none is selected."""
        return self.sparsity.groups(self.placed_partitions(), self.d_sae)

    def _check_delta_loss(self, delta: DeltaLoss) -> None:
        names = [p.name for p in self.partitions]
        if delta.partition not in (None, *names):
            raise ValueError(
                f"the delta loss is over the partition {delta.partition!r}, but the partitions are "
                f"{names}. Add it to `partitions`, or use partition=None for all latents."
            )
        compared = subtracted_sites(self.sites)
        if compared is None:
            raise ValueError(
                "the delta loss needs two sites of one width; the sites are "
                f"{[(s.name, s.d_model) for s in self.sites]}."
            )
        explaining = [p for p in self.partitions if delta.partition in (None, p.name)]
        sites = {self.sites[i].name for i in compared}
        can_differ = [not p.tied and (p.writes is None or sites & {*p.writes}) for p in explaining]
        if explaining and not any(can_differ):
            raise ValueError(
                f"the delta loss compares the sites {sorted(sites)}, but the partitions "
                f"{[p.name for p in explaining]} write the same to both: nothing can explain the "
                "difference. Let one of them write to one of these sites."
            )

    @classmethod
    def architecture(cls) -> str:
        """Name under which SAELens finds this class."""
        return ARCHITECTURE

    def get_inference_config_class(self) -> type[SAEConfig]:
        """Config of the saved dictionary."""
        return CrosscoderConfig

    def _objects_as_dicts(self) -> dict[str, Any]:
        return {
            "sites": [s.to_dict() for s in self.sites],
            "sparsity": self.sparsity.to_dict(),
            "auxk": asdict(self.auxk) if self.auxk else None,
            "partitions": [p.to_dict() for p in self.partitions],
            "delta_loss": asdict(self.delta_loss) if self.delta_loss else None,
            "matryoshka": list(self.matryoshka),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return super().to_dict() | self._objects_as_dicts()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "CrosscoderTrainingConfig":
        """Inverse of `to_dict`, also of what version 0.1.0 wrote."""
        return super().from_dict(with_renamed_keys(config_dict))

    def get_training_architecture_details(self) -> dict[str, Any]:
        """JSON form of the fields that matter in training only; kept in the metadata."""
        details = super().get_training_architecture_details()
        return details | {k: v for k, v in self._objects_as_dicts().items() if k in details}

    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        """JSON form of the inference config."""
        return super().get_inference_sae_cfg_dict() | {"sites": [s.to_dict() for s in self.sites]}
