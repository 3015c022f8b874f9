"""The rows of `training_step.py`: our step, those of public trainers, and products alone.

A row is a function from a `Shape` to a step, which takes a batch `[batch, d_in]`. Each does what
its own trainer does a step, its count of how long latents have not fired included. The same for
all: float32, fused Adam, gradients dropped after the update, no latent dead, so that AuxK is idle.
Left out for all: clipping of gradients (SAELens and we clip, sparsify does not), scaling of the
input, schedules and logging. Limit: sparsify has no BatchTopK, so its row keeps the k largest of
each token, which is less work than the k * batch largest of a batch. The products are a measure
and no bound: where bfloat16 is fast (AMX) our selection looks at all latents in bfloat16 and takes
the float32 product only where a latent may be kept, with the same result; a row without shows what
other machines get.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor, nn

from tl_crosscoder.crosscoder.config import CrosscoderTrainingConfig
from tl_crosscoder.crosscoder.sparsity import Sparsity
from tl_crosscoder.crosscoder.topk import BatchTopK
from tl_crosscoder.crosscoder.training import CrosscoderTraining
from tl_crosscoder.models.pair import Site

DEAD_AFTER_TOKENS = 10_000_000
LR = 1e-3
"""The default peak of our trainer; the selection must follow weights that move so fast."""
N_BATCHES = 5
"""Different ones, seen in turn, as in training: our selection begins from the limit of the batch
before and scans a second time where that was too high. On one batch repeated, which the weights
overfit, it did so in most steps; on different ones in none of 10 (bfloat16) and 3 of 10."""

Step = Callable[[Tensor], object]
"""One step on a batch `[batch, d_in]`."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of a step."""

    d_sae: int
    n_sites: int = 2
    d_model: int = 512
    k: int = 32
    batch: int = 2048

    @property
    def d_in(self) -> int:
        """Width of the concatenated sites."""
        return self.n_sites * self.d_model

    @property
    def memory_budget(self) -> int:
        """Bytes: parameters, gradients, two moments, and one dense buffer `[batch, d_sae]`."""
        n_parameters = 2 * self.d_in * self.d_sae + self.d_in + self.d_sae
        return 4 * (4 * n_parameters + self.batch * self.d_sae)

    def __str__(self) -> str:
        return (
            f"{self.n_sites} x {self.d_model} -> {self.d_sae:,}, k = {self.k}, batch {self.batch:,}"
        )


SHAPES = (Shape(d_sae=4096), Shape(d_sae=16384))
TINY = Shape(d_sae=256, d_model=16, k=4, batch=64)


def activations(shape: Shape) -> list[Tensor]:
    """Batches of sums of k planted directions, centred, of mean squared norm d_in.

    The r-th direction is drawn with a weight of 1 / (r + 10), so that some latents fire far more
    often than others, as in real dictionaries: sparse gradients are slower where they collide.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(shape.d_sae, shape.d_in, generator=generator)
    weights = (1 / (torch.arange(shape.d_sae) + 10.0)).expand(N_BATCHES * shape.batch, -1)
    drawn = torch.multinomial(weights, shape.k, generator=generator)
    sizes = torch.rand(drawn.shape, generator=generator)
    x = nn.functional.embedding_bag(drawn, directions, per_sample_weights=sizes, mode="sum")
    x = x - x.mean(dim=0)
    x = x * (shape.d_in / x.pow(2).sum(dim=-1).mean()).sqrt()
    return [part.clone() for part in x.split(shape.batch)]


def adam_step(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    *,
    before_update: Callable = lambda: None,
    lr: float = LR,
) -> Step:
    """Loss, backward, fused Adam, gradients dropped."""
    optimizer = torch.optim.Adam(module.parameters(), lr=lr, fused=True)

    def step(batch: Tensor) -> None:
        loss(batch).backward()
        before_update()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_crosscoder(shape: Shape, sparsity: Sparsity, **fields: Any) -> CrosscoderTraining:
    """Ours at this size, with further fields of the config."""
    sites = tuple(
        Site(name=f"site_{m}", d_model=shape.d_model, hook_name="", model_name="")
        for m in range(shape.n_sites)
    )
    return CrosscoderTraining(
        CrosscoderTrainingConfig(
            d_in=shape.d_in, d_sae=shape.d_sae, sites=sites, sparsity=sparsity, **fields
        )
    )


def our_step(crosscoder: CrosscoderTraining, *, lr: float = LR, device: str = "cpu") -> Step:
    """One step as `Trainer.step` does it."""
    tokens_since_fired = torch.zeros(crosscoder.cfg.d_sae, dtype=torch.int64, device=device)

    def loss(batch: Tensor) -> Tensor:
        output = crosscoder.step_loss(batch, is_dead=tokens_since_fired >= DEAD_AFTER_TOKENS)
        tokens_since_fired.add_(len(batch))
        tokens_since_fired[output.codes.fired()] = 0
        return output.loss

    return adam_step(crosscoder, loss, lr=lr)


def ours(
    sparsity: Callable[[Shape], Sparsity] = lambda shape: BatchTopK(k=shape.k), **fields: Any
) -> Callable[[Shape], Step]:
    """A row of ours; `kernels="dense"` is the dense reference of the sparse step."""
    return lambda shape: our_step(our_crosscoder(shape, sparsity(shape), **fields))


def ours_without_bfloat16(shape: Shape) -> Step:
    """The fast step as on machines without fast bfloat16."""
    crosscoder = our_crosscoder(shape, BatchTopK(k=shape.k))
    crosscoder._sparse_step.prefilter = False
    return our_step(crosscoder)


def saelens(shape: Shape) -> Step:
    """`SAETrainer._train_step` of SAELens on its BatchTopK, over the concatenated sites."""
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(d_in=shape.d_in, d_sae=shape.d_sae, k=shape.k)
    )
    steps_since_fired, n_fired = torch.zeros(shape.d_sae), torch.zeros(shape.d_sae)

    def loss(batch: Tensor) -> Tensor:
        is_dead = steps_since_fired > 1000
        output = sae.training_forward_pass(TrainStepInput(batch, {}, is_dead, 0, False))
        with torch.no_grad():
            firing = output.feature_acts.bool().float()
            steps_since_fired.add_(1)
            steps_since_fired[firing.sum(-2).bool()] = 0
            n_fired.add_(firing.sum(0))
        return output.loss

    return adam_step(sae, loss)


def sparsify(shape: Shape) -> Step:
    """What the `Trainer` of EleutherAI's sparsify does a step, on its defaults but for Adam.

    The defaults: TopK of each token, FVU, no AuxK, the decoder's rows of norm 1 before a step and
    its gradient's parallel part removed after it. Its own default optimizer is schedule-free
    signum.
    """
    # Its Triton decoder is chosen wherever Triton is installed, and needs CUDA tensors.
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(shape.d_in, SparseCoderConfig(num_latents=shape.d_sae, k=shape.k))
    tokens_since_fired = torch.zeros(shape.d_sae, dtype=torch.int64)

    def loss(batch: Tensor) -> Tensor:
        coder.set_decoder_norm_to_unit_norm()
        output = coder(x=batch, y=batch, total_variance=(batch - batch.mean(0)).pow(2).sum())
        tokens_since_fired.add_(len(batch))
        tokens_since_fired[output.latent_indices.flatten()] = 0
        return output.fvu

    remove = coder.remove_gradient_parallel_to_decoder_directions
    return adam_step(coder, loss, before_update=remove)


def products(n_products: int) -> Callable[[Shape], Step]:
    """The encoder's product, or as many of its size as a dense step makes: five."""

    def build(shape: Shape) -> Step:
        W_enc = torch.randn(shape.d_in, shape.d_sae)

        def step(batch: Tensor) -> None:
            for _ in range(n_products):
                batch @ W_enc

        return step

    return build


ENCODER = "encoder product"
PRODUCTS = {ENCODER: products(1), "five dense products": products(5)}
TRAINERS: dict[str, Callable[[Shape], Step]] = {
    "ours, batchtopk": ours(),
    "ours, batchtopk, no bf16": ours_without_bfloat16,
    "ours, batchtopk, dense": ours(kernels="dense"),
    "SAELens, batchtopk": saelens,
    "sparsify, topk": sparsify,
}
PEERS = ("SAELens, batchtopk", "sparsify, topk")
