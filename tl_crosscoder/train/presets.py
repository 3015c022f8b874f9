"""What the presets are made of: sparsity, partitions, delta loss and nested prefixes.

A `Recipe` may as well be combined by hand; `Trainer` takes either. `crosscoder_config` puts recipe,
sites and settings together. Limit: a preset with site names (`DFC`, `Structured`) is for the sites
it names.
"""

from dataclasses import dataclass, replace

from tl_crosscoder.config import presets
from tl_crosscoder.config.presets import Preset
from tl_crosscoder.config.training import Plan, TrainConfig
from tl_crosscoder.crosscoder.config import AuxK, CrosscoderTrainingConfig, DeltaLoss, check_memory
from tl_crosscoder.crosscoder.partition import Partition
from tl_crosscoder.crosscoder.sparsity import L1, JumpReLU, Sparsity
from tl_crosscoder.crosscoder.topk import BatchTopK, TopK
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.saelens import PairView
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.models.tokenizer import own_bos_id, tokenizer_sha256


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a dictionary is made of, apart from its sites and its size."""

    sparsity: Sparsity
    partitions: tuple[Partition, ...] = ()
    delta_loss: DeltaLoss | None = None
    matryoshka: tuple[float, ...] = ()


def recipe_of(preset: Preset | Recipe, *, n_steps: int) -> Recipe:
    """The recipe of a preset in a run of `n_steps` steps; its schedules are shares of them.

    Raises:
        ValueError: an option that cannot be, such as a negative k.
    """
    match preset:
        case Recipe():
            return preset
        case presets.BatchTopK():
            return Recipe(sparsity=_batchtopk(preset, n_steps))
        case presets.TopK():
            return Recipe(sparsity=TopK(k=preset.k))
        case presets.L1():
            return Recipe(sparsity=_l1(preset, n_steps))
        case presets.JumpReLU():
            return Recipe(sparsity=_jumprelu(preset, n_steps))
        case presets.DSF():
            return Recipe(sparsity=_l1(preset, n_steps), partitions=_tied_and_free(preset))
        case presets.Matryoshka():
            return Recipe(sparsity=BatchTopK(k=preset.k), matryoshka=preset.prefix_shares)
        case presets.DFC():
            return Recipe(sparsity=BatchTopK(k=preset.k), partitions=_exclusive(preset))
        case presets.DiffSAE():
            return Recipe(sparsity=BatchTopK(k=preset.k))
        case presets.Structured():
            return _structured(preset)
        case presets.DeltaCompeting():  # and Delta
            return _delta(preset)
        case presets.DualK():
            return Recipe(sparsity=BatchTopK(k=preset.k), partitions=_own_k(preset))


def _batchtopk(preset: presets.BatchTopK, n_steps: int) -> BatchTopK:
    if preset.k_initial is None:
        return BatchTopK(k=preset.k)
    n = max(1, round(preset.k_anneal_share * n_steps))
    return BatchTopK(k=preset.k, k_initial=preset.k_initial, k_anneal_steps=n)


def _l1(preset: presets.L1 | presets.DSF, n_steps: int) -> L1:
    warm_up_steps = round(preset.warm_up_share * n_steps)
    return L1(coefficient=preset.coefficient, warm_up_steps=warm_up_steps)


def _jumprelu(preset: presets.JumpReLU, n_steps: int) -> JumpReLU:
    return JumpReLU(
        coefficient=preset.coefficient,
        bandwidth=preset.bandwidth,
        init_threshold=preset.threshold,
        warm_up_steps=round(preset.warm_up_share * n_steps),
    )


def _delta(preset: presets.DeltaCompeting) -> Recipe:
    loss = DeltaLoss(
        weight=preset.delta_loss_weight,
        partition="delta" if preset.delta_loss_masked else None,
        scale=preset.delta_loss_scale,
        with_bias=preset.delta_loss_bias,
    )
    if isinstance(preset, presets.Delta) and preset.dual_k:
        partitions = _own_k(preset)
    else:
        partitions = _one_k(preset.shared_share)
    return Recipe(sparsity=BatchTopK(k=preset.k), partitions=partitions, delta_loss=loss)


def _structured(preset: presets.Structured) -> Recipe:
    """x_hat^1 = x_hat^0 + sum_{j in delta} f_j d_j^1 + b^1 - b^0; all latents enter the loss."""
    shared, own = _own_k(preset) if preset.dual_k else _one_k(preset.shared_share)
    partitions = (replace(shared, tied=True), replace(own, writes=(preset.delta_site,)))
    loss = DeltaLoss(weight=preset.delta_loss_weight, partition=None, with_bias=True)
    return Recipe(sparsity=BatchTopK(k=preset.k), partitions=partitions, delta_loss=loss)


def _one_k(shared_share: float) -> tuple[Partition, Partition]:
    return Partition(name="shared", share=shared_share), Partition(
        name="delta", share=1 - shared_share
    )


def _own_k(preset: presets.DualK | presets.Delta) -> tuple[Partition, Partition]:
    k_delta = preset.k / (1 + preset.k_shared_multiple)
    shared, delta = _one_k(preset.shared_share)
    return replace(shared, k=preset.k - k_delta), replace(delta, k=k_delta)


def _tied_and_free(preset: presets.DSF) -> tuple[Partition, Partition]:
    share, scale = preset.shared_share, preset.shared_penalty_scale
    shared = Partition(name="shared", share=share, tied=True, penalty_scale=scale)
    return shared, Partition(name="free", share=1 - share)


def _exclusive(preset: presets.DFC) -> tuple[Partition, ...]:
    sites, share = preset.exclusive_sites, preset.exclusive_share
    own = (Partition(name=f"{s}_only", share=share, reads=(s,), writes=(s,)) for s in sites)
    return Partition(name="shared", share=1 - len(sites) * share), *own


def plan_of(
    source: ActivationSource,
    text: TokenizedText | None,
    config: TrainConfig,
    recipe: Recipe | Preset,
) -> Plan:
    """The numbers of a run on these sites and this text; None is a text of any length."""
    k = getattr(recipe.sparsity if isinstance(recipe, Recipe) else recipe, "k", 16)
    n_text_tokens = None if text is None else text.n_tokens
    return config.plan(d_model=source.d_model, n_text_tokens=n_text_tokens, k=k)


def crosscoder_config(
    source: ActivationSource, config: TrainConfig, recipe: Recipe | Preset
) -> CrosscoderTrainingConfig:
    """The dictionary that these sites and settings request."""
    plan = plan_of(source, None, config, recipe)
    recipe = recipe_of(recipe, n_steps=plan.n_steps)
    cfg = CrosscoderTrainingConfig(
        d_in=sum(s.d_model for s in source.sites),
        d_sae=plan.d_sae,
        device=str(source.device),
        sites=source.sites,
        sparsity=recipe.sparsity,
        partitions=recipe.partitions,
        delta_loss=recipe.delta_loss,
        matryoshka=recipe.matryoshka,
        encoder_init=config.encoder_init,
        kernels=config.kernels,
        compute_dtype=config.compute_dtype,
        compile=config.compile,
        auxk=AuxK(weight=config.auxk_weight) if config.auxk_weight else None,
        reconstruction=config.reconstruction,
    )
    check_memory(cfg, is_training=True)  # before a folder is claimed for the run
    # What an `ActivationsStore` of SAELens reads; a single site is at a hook of its own model.
    is_plain = len(source.sites) == 1 and source.sites[0].minus is None
    cfg.metadata.hook_name = source.sites[0].hook_name if is_plain else PairView.HOOK_NAME
    cfg.metadata.prepend_bos = own_bos_id(source.tokenizer) is not None
    cfg.metadata.model_name = source.sites[-1].model_name
    cfg.metadata.weight_processing = source.weight_processing
    cfg.metadata.tokenizer_sha256 = tokenizer_sha256(source.tokenizer)
    return cfg
