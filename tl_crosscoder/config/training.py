"""Settings of a training run and of a harvest: the same in Python, on the command line and in YAML.

No torch here: the command line reads these classes to print its help.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tl_crosscoder.config.inputs import ModelsConfig, TextConfig
from tl_crosscoder.config.presets import (
    BatchTopK,
    ComputeDtype,
    DiffSAE,
    EncoderInit,
    Kernels,
    Preset,
    Reconstruction,
    preset_from,
    preset_to_dict,
)
from tl_crosscoder.config.settings import (
    NaturalInt,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Settings,
    Share,
)
from tl_crosscoder.config.yaml import YamlConfig, read_mapping

StoreDtype = Literal["float32", "bfloat16", "float16", "int8"]
MOST_TOKENS, MOST_PASSES = 2_000_000, 10
MOST_BATCH, LEAST_BATCH, LEAST_STEPS = 1024, 64, 500
MOST_EXPANSION, TOKENS_PER_LATENT = 16, 100


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers of a run, given or chosen from width and text; see `TrainConfig.plan`."""

    d_sae: int
    n_tokens: int
    batch_size: int
    lr: float
    lr_warmup_steps: int
    lr_decay_share: float

    @property
    def n_steps(self) -> int:
        """Training steps; tokens that do not fill a batch are not trained on."""
        return self.n_tokens // self.batch_size

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step (from 0): linear rise, plateau, linear fall to 0."""
        n_decay = round(self.lr_decay_share * self.n_steps)
        rise = (step + 1) / self.lr_warmup_steps if step < self.lr_warmup_steps else 1.0
        left = self.n_steps - step
        fall = left / (n_decay + 1) if left <= n_decay else 1.0
        return self.lr * min(rise, fall)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """How a crosscoder is trained. What is None is chosen from width and text; see `plan`."""

    d_sae: PositiveInt | None = None
    """Number of latents; None is `expansion` times the width of the widest site, and without that
    one for every 100 activation pairs, at most 16 times the width."""
    expansion: PositiveInt | None = None
    """Latents per dimension of the widest site, where `d_sae` is not given."""
    n_tokens: PositiveInt | None = None
    """Activation pairs to train on; the text is read again where it is shorter. None is ten passes
    over the text, at most 2 million."""
    batch_size: PositiveInt | None = None
    """Activation pairs a step; None is 1,024, and fewer where that gives less than 500 steps."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate of Adam."""
    lr_warmup_steps: NaturalInt | None = None
    """Steps over which the learning rate rises linearly from 0; None is a tenth of all, at most
    100."""
    lr_decay_share: Share = 0.2
    """Last share of the steps, over which the learning rate falls linearly to 0."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""
    dead_after_tokens: PositiveInt | None = None
    """A latent that has not fired for so many tokens is dead; None is 10 million or a tenth of
    the run, the smaller (Gao et al. 2024)."""
    auxk_weight: NonNegativeFloat = 1 / 32
    """Weight of the auxiliary loss that revives dead latents; 0 switches it off."""
    normalize: bool = True
    """Scale each site so that its mean squared norm is its width; folded in at save."""
    reconstruction: Reconstruction = "sum"
    """Reduction of a token's error; see `crosscoder.losses.reconstruction_loss`."""
    encoder_init: EncoderInit = "least_squares"
    """`least_squares` fits the scale of encoder and decoder to the first activations and centres
    pre-activations; `transposed` is the papers' start (Minder et al. 2025)."""
    kernels: Kernels = "auto"
    """`auto` takes the sparse training step where codes are sparse; `dense` never does."""
    compute_dtype: ComputeDtype | None = None
    """bfloat16 rounds activations and weights before they are multiplied, with float32 master
    weights, gradients and moments: faster on a GPU. None rounds nothing."""
    compile: bool = False
    """Put the terms of the loss through torch.compile: for GPUs; on a CPU it is slower."""
    n_accumulated: PositiveInt = 1
    """Parts of a batch that go through one after the other before the optimizer's step; a
    BatchTopK selects within each part. More need less memory."""
    n_calibration_tokens: PositiveInt = 65_536
    """Held-out tokens on which the inference threshold is set at the end."""
    buffer_contexts: PositiveInt = 256
    """Contexts whose activations are shuffled together."""
    harvest_batch_size: PositiveInt = 32
    """Contexts a forward pass of the models."""
    prefetch: NaturalInt = 2
    """Batches made ahead in a thread while the step before runs; 0 makes each when it is due."""
    log_every: PositiveInt = 50
    """Steps between two lines of metrics."""
    checkpoint_every: PositiveInt = 500
    """Steps between two checkpoints; a kill loses at most these."""
    seed: NaturalInt = 0
    """Seed of the initial weights, the split and the order of the data."""
    weight_seed: NaturalInt | None = None
    """Seed of the initial weights alone; None is `seed`."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size is not None and self.batch_size % self.n_accumulated:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {self.n_accumulated} equal "
                "parts (n_accumulated)."
            )
        if self.n_tokens and self.batch_size and self.n_tokens < self.batch_size:
            raise ValueError(
                f"n_tokens is {self.n_tokens:,}, less than one batch of {self.batch_size:,}."
            )

    def plan(self, *, d_model: int, n_text_tokens: int | None = None, k: float = 16) -> Plan:
        """Fill in what is not given, by rules of thumb that the fields state.

        Args:
            d_model: width of the widest site.
            n_text_tokens: kept tokens of the text; None is more than are trained on.
            k: active latents a token, of which a dictionary has at least four times as many.
        """
        n_tokens = self.n_tokens
        if n_tokens is None:
            n_text = MOST_TOKENS if n_text_tokens is None else n_text_tokens
            n_tokens = max(LEAST_BATCH, min(MOST_TOKENS, MOST_PASSES * n_text))
        batch_size = self.batch_size
        if batch_size is None:
            n = min(MOST_BATCH, n_tokens, max(LEAST_BATCH, n_tokens // LEAST_STEPS))
            batch_size = max(1, n // self.n_accumulated) * self.n_accumulated
        if self.n_tokens is None:
            n_tokens = max(n_tokens, batch_size)
        chosen = min(MOST_EXPANSION * d_model, max(round(4 * k), n_tokens // TOKENS_PER_LATENT))
        d_sae = self.d_sae or (chosen if self.expansion is None else self.expansion * d_model)
        warm_up = self.lr_warmup_steps
        return Plan(
            d_sae=d_sae,
            n_tokens=n_tokens,
            batch_size=batch_size,
            lr=self.lr,
            lr_warmup_steps=min(100, n_tokens // batch_size // 10) if warm_up is None else warm_up,
            lr_decay_share=self.lr_decay_share,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class RunConfig(YamlConfig, TrainConfig, TextConfig, ModelsConfig):
    """A whole run: which models, which hook point, which text, which dictionary, where to."""

    output: str
    """Folder for the dictionary and everything about the run; must be new or empty."""
    cache: str | None = None
    """Folder of activations that `tl-crosscoder harvest` wrote, in place of models and text; or the
    address of a copy that `fsspec` opens, such as s3://bucket/cache, which is read as needed."""
    n_measured_tokens: PositiveInt = 200_000
    """Held-out tokens to measure on, at most."""
    preset: Preset = field(default_factory=BatchTopK)
    """The dictionary: a named combination of sparsity, partitions and losses, with its options."""
    data_parallel: PositiveInt | None = None
    """Processes that share out the tokens of a batch; None is all that `torchrun` started, over
    latent_parallel."""
    latent_parallel: PositiveInt = 1
    """Processes that share out the latents, for a dictionary that one device cannot hold."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "preset", preset_from(self.preset))
        super().__post_init__()
        if isinstance(self.preset, DiffSAE):
            object.__setattr__(self, "difference", True)

    @classmethod
    def from_mapping(
        cls, given: Mapping[str, Any], *, name: str, default: Mapping[str, Any] | None = None
    ) -> "RunConfig":
        """Settings from a mapping; `preset` is a name, or a mapping of `name` and options."""
        if "preset" in given:
            given = {**given, "preset": preset_from(given["preset"])}
        return super().from_mapping(given, name=name, default=default)

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `from_mapping` reads, as plain JSON."""
        return super().to_dict() | {"preset": preset_to_dict(self.preset)}


@dataclass(frozen=True, kw_only=True)
class HarvestConfig(YamlConfig, TextConfig, ModelsConfig):
    """A cache of activations: which models, hook points and text, and how they are stored."""

    output: str
    """Folder for the cache; must be new or empty."""
    n_tokens: PositiveInt = 2_000_000
    """Tokens that count to harvest, held-out ones included; fewer where the text is shorter."""
    store: StoreDtype = "bfloat16"
    """Number format on disk. int8 has one scale for each row and site; its error is measured."""
    shard_tokens: PositiveInt = 65_536
    """Tokens a shard, about: what a kill loses, and at a time is written."""
    harvest_batch_size: PositiveInt = 32
    """Contexts a forward pass of the models."""
    seed: NaturalInt = 0
    """Seed of the split, the mixture and the order of the contexts."""

    @classmethod
    def from_yaml(
        cls, path: str | Path, *, default: Mapping[str, Any] | None = None
    ) -> "HarvestConfig":
        """Settings from a file of its own, or the models and text of a training run's file.

        The output of a run is not that of a cache, and has to be given. Raises as the other does.
        """
        given = without_run_fields(read_mapping(path), cls)
        return cls.from_mapping(given, name=str(path), default=default)


def without_run_fields(given: Mapping[str, Any], cls: type[Settings]) -> dict[str, Any]:
    """The fields of a file that settings of another kind share with a training run's.

    A file of their own stays as it is; of a run's the output is left out too, which is another.
    """
    of_run = {f.name for f in fields(RunConfig)} - {f.name for f in fields(cls)}  # type: ignore[arg-type]
    left_out = {*of_run, "output"} if of_run & given.keys() else set()
    return {name: value for name, value in given.items() if name not in left_out}
