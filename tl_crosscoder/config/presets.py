"""Presets: the dictionaries of the papers, and ours, each with the options that it has.

The fields of a preset are the flags of `tl-crosscoder train NAME`, the keys of `preset:` in YAML
and the arguments of `preset(NAME, ...)`. `train.presets.recipe_of` says what each is made of. No
torch here: the command line reads these classes to print its help.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Union, get_args

from tyro.conf import subcommand

from tl_crosscoder.config.settings import (
    NonNegativeFloat,
    PositiveFloat,
    ProperShare,
    Settings,
    Share,
    from_mapping,
)

Reconstruction = Literal["sum", "mean", "norm"]
DeltaScale = Literal["absolute", "relative"]
Kernels = Literal["auto", "dense"]
EncoderInit = Literal["least_squares", "transposed"]
ComputeDtype = Literal["bfloat16"]


@dataclass(frozen=True, kw_only=True)
class _Selecting(Settings):
    k: PositiveFloat = 16
    """Mean number of active latents a token, all partitions together."""


@dataclass(frozen=True, kw_only=True)
class BatchTopK(_Selecting):
    """K latents a token on average, chosen over the batch (Minder et al. 2025; k = 100 there)."""

    k_initial: PositiveFloat | None = None
    """k of the first step, from which k falls linearly; None keeps k constant."""
    k_anneal_share: Share = 0.1
    """Share of the steps over which k falls from `k_initial`."""


@dataclass(frozen=True, kw_only=True)
class TopK(_Selecting):
    """K latents on every token (Gao et al. 2024)."""


@dataclass(frozen=True, kw_only=True)
class _Penalised(Settings):
    coefficient: NonNegativeFloat = 1.0
    """Weight of the penalty for active latents; larger is sparser."""
    warm_up_share: Share = 0.05
    """Share of the steps over which the weight rises linearly from 0."""


@dataclass(frozen=True, kw_only=True)
class L1(_Penalised):
    """ReLU codes and an L1 penalty (Lindsey et al. 2024); its L0 follows from the coefficient."""


@dataclass(frozen=True, kw_only=True)
class JumpReLU(_Penalised):
    """Learned thresholds and a tanh penalty (Anthropic, January 2025 update)."""

    warm_up_share: Share = 1.0
    """Share of the steps over which the weight rises linearly from 0."""
    bandwidth: PositiveFloat = 0.05
    """Width around a threshold within which pre-activations move it."""
    threshold: PositiveFloat = 0.01
    """Thresholds at the start."""


@dataclass(frozen=True, kw_only=True)
class Matryoshka(_Selecting):
    """BatchTopK whose first latents also reconstruct alone (Bussmann et al. 2025)."""

    prefix_shares: tuple[ProperShare, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Shares of the latents that reconstruct alone."""


@dataclass(frozen=True, kw_only=True)
class _Shared(Settings):
    shared_share: ProperShare = 0.2
    """Share of the latents that is shared."""


@dataclass(frozen=True, kw_only=True)
class DualK(_Shared, _Selecting):
    """Shared and delta latents, each with a BatchTopK, and no other difference.

    Source: Kassem et al. 2026. Of k, the delta latents get 1 / (1 + k_shared_multiple).
    """

    k_shared_multiple: PositiveFloat = 2.0
    """Active shared latents for each active delta latent."""


@dataclass(frozen=True, kw_only=True)
class DeltaCompeting(_Shared, _Selecting):
    """Delta-Crosscoder whose delta latents compete with the shared ones for one k (ours)."""

    delta_loss_weight: NonNegativeFloat = 0.005
    """Weight of the loss of the difference."""
    delta_loss_masked: bool = True
    """Whether delta latents alone must explain the difference."""
    delta_loss_scale: DeltaScale = "absolute"
    """relative divides the loss by the mean of ||x^1 - x^0||^2."""
    delta_loss_bias: bool = False
    """Whether the decoder bias helps to explain the difference."""


@dataclass(frozen=True, kw_only=True)
class Delta(DeltaCompeting, DualK):
    """Delta-Crosscoder: Dual-K and a loss that the delta latents explain x^1 - x^0.

    Source: Kassem et al. 2026: 20 % shared latents, k_delta = 200 and k_shared = 400, so k = 600;
    each piece can be switched off.
    """

    dual_k: bool = True
    """Whether shared and delta latents are selected apart."""


@dataclass(frozen=True, kw_only=True)
class DSF(_Penalised, _Shared):
    """Designated shared features: tied, with a smaller penalty (Anthropic, February 2025)."""

    shared_penalty_scale: NonNegativeFloat = 0.15
    """Penalty of the shared latents as a share of the others' (0.1 to 0.2 there)."""


@dataclass(frozen=True, kw_only=True)
class DFC(_Selecting):
    """Dedicated feature crosscoder: some latents belong to one site only (arXiv 2602.11729)."""

    exclusive_share: ProperShare = 0.05
    """Share of the latents that reads and writes one site alone, for each of `exclusive_sites`."""
    exclusive_sites: tuple[str, ...] = ("base", "finetuned")
    """Names of the sites that have exclusive latents."""


@dataclass(frozen=True, kw_only=True)
class DiffSAE(_Selecting):
    """BatchTopK SAE on x^1 - x^0; the usual size is twice d_model (`--expansion 2`)."""


@dataclass(frozen=True, kw_only=True)
class Structured(DualK):
    """Shared latents write the same to all sites, delta latents to the fine-tuned one (ours)."""

    shared_share: ProperShare = 0.8
    """Share of the latents that is shared."""
    dual_k: bool = True
    """Whether shared and delta latents are selected apart."""
    delta_loss_weight: NonNegativeFloat = 1.0
    """Weight of the loss of the difference."""
    delta_site: str = "finetuned"
    """Name of the site that delta latents write to."""


Preset = Union[  # noqa: UP007 (Annotated has no | before Python 3.11)
    Annotated[BatchTopK, subcommand("batchtopk")],
    Annotated[TopK, subcommand("topk")],
    Annotated[L1, subcommand("l1")],
    Annotated[JumpReLU, subcommand("jumprelu")],
    Annotated[Matryoshka, subcommand("matryoshka")],
    Annotated[DualK, subcommand("dual-k")],
    Annotated[Delta, subcommand("delta")],
    Annotated[DeltaCompeting, subcommand("delta-competing")],
    Annotated[DSF, subcommand("dsf")],
    Annotated[DFC, subcommand("dfc")],
    Annotated[DiffSAE, subcommand("diff-sae")],
    Annotated[Structured, subcommand("structured")],
]
PRESETS: dict[str, type] = {get_args(each)[1].name: get_args(each)[0] for each in get_args(Preset)}
_NAMES = {kind: name for name, kind in PRESETS.items()}


def preset(name: str, **options: Any) -> Preset:
    """The named preset with these options: `preset("delta", k=12)`.

    Raises:
        ValueError: another name, an option that this preset does not have, or a value that cannot
            be.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not known; it is one of {', '.join(PRESETS)}.")
    return from_mapping(PRESETS[name], options, name=f"preset {name!r}")


def preset_name(chosen: Preset) -> str:
    """The name under which `preset` makes it."""
    return _NAMES[type(chosen)]


def preset_from(given: Any, *, base: Preset | None = None) -> Preset:
    """A preset by its name, by a mapping of `name` and options, or as it is.

    A mapping without a name changes options of `base`, by default `batchtopk`. Raises ValueError.
    """
    if isinstance(given, str):
        return preset(given)
    if not isinstance(given, Mapping):
        if type(given) not in _NAMES:
            raise ValueError(
                f"preset is {given!r}; give preset(NAME, ...), NAME one of {', '.join(PRESETS)}."
            )
        return given
    options = dict(given)
    name = options.pop("name", None)
    if name is None and base is not None:
        return preset(preset_name(base), **(asdict(base) | options))
    return preset(name or "batchtopk", **options)


def preset_to_dict(chosen: Preset) -> dict[str, Any]:
    """The mapping that `preset_from` reads."""
    return {"name": preset_name(chosen), **asdict(chosen)}
