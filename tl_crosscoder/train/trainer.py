"""`Trainer`: the loop that turns a pair, or any other sites, and a text into a crosscoder.

In the output folder: `runner_cfg.json` (how it was made, written first), `metrics.jsonl` (a line
every `log_every` steps), `checkpoints/` while it runs, and at the end `cfg.json` with
`sae_weights.safetensors`.
A run that stops, however it stops, continues from its last checkpoint to the same final weights,
bit for bit on a CPU with the same number of threads. Limit: one process, one device.
"""

import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.config.presets import BatchTopK, Preset
from tl_crosscoder.config.training import TrainConfig
from tl_crosscoder.crosscoder.config import AuxK, CrosscoderTrainingConfig
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.training import CrosscoderTraining, StepLoss
from tl_crosscoder.data.harvest import harvest_rows
from tl_crosscoder.data.loader import ActivationLoader, Position
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.models.tokenizer import tokenizer_sha256
from tl_crosscoder.train.checkpoint import (
    TrainState,
    checkpoint_name,
    latest_checkpoint,
    load_checkpoint,
    open_run,
    run_record,
    save_checkpoint,
)
from tl_crosscoder.train.metrics import (
    MetricsLog,
    bar_text,
    row_factors,
    scales_of_rows,
    step_metrics,
)
from tl_crosscoder.train.presets import Recipe, recipe_of

N_INITIAL_ROWS = 8192
"""Activation pairs from which the site scales and the decoder bias are measured."""


class Trainer:
    """Trains one crosscoder; `fit` does everything, `step` one step.

    Args:
        source: models and their hook points (`ModelPair`, `ModelPair`), an `ActivationCache` of
            them, or the `difference()` of either.
        text: contexts to train on.
        held_out: contexts on which the inference threshold is calibrated.
        config: size, length and rates of the run.
        recipe: what the dictionary is made of: a preset, such as `preset("delta", k=16)`, or a
            `Recipe`; `preset("batchtopk")` by default.
        output: folder for the dictionary, metrics and checkpoints; None keeps nothing on disk.
        resume: continue the run in `output` from its last checkpoint, if it has one.

    Raises:
        ValueError: text too short for a batch, k above d_sae, or an output folder that holds
            another run; all before any long work.
    """

    def __init__(
        self,
        source: ActivationSource,
        text: TokenizedText,
        held_out: TokenizedText,
        *,
        config: TrainConfig | None = None,
        recipe: Recipe | Preset | None = None,
        output: str | Path | None = None,
        resume: bool = False,
    ) -> None:
        self.config = config = config or TrainConfig()
        self.source, self.held_out = source, held_out
        self.output = Path(output) if output is not None else None
        self.cfg = crosscoder_config(source, config, recipe or BatchTopK())
        if held_out.n_tokens == 0:
            raise ValueError("the held-out text is empty: the threshold is calibrated on it.")
        self.loader = ActivationLoader(
            source,
            text,
            batch_size=config.batch_size,
            buffer_contexts=config.buffer_contexts,
            harvest_batch_size=config.harvest_batch_size,
            seed=config.seed,
            prefetch=config.prefetch,
        )
        record = run_record(source, text, held_out, config, self.cfg)
        self.is_complete = self.output is not None and open_run(self.output, record, resume=resume)
        self._make_weights()
        self.state = self._resumed_state() if resume else None
        self._grad_norm = self._loss = torch.zeros(())
        self._log: MetricsLog | None = None

    def fit(self) -> Crosscoder:
        """Train to the end, calibrate, save, and return the dictionary for raw activations.

        Raises:
            FloatingPointError: the loss is not finite; the last checkpoint is intact.
            TrainingInterruptedError: Ctrl-C; a checkpoint of that very step is on disk.
        """
        from tl_crosscoder.train.loop import fit_together

        return fit_together([self])[0]

    def step(self, batch: Tensor) -> StepLoss:
        """One optimizer step on raw activations; returns the loss of the last accumulated part."""
        state, config = self._started(), self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(state.step)
        self.optimizer.zero_grad()
        output = self._accumulate(batch * self._scales(state), state)
        parameters = self.crosscoder.parameters()
        self._grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        self.optimizer.step()
        self._loss = output.loss.detach()
        state.step += 1
        return output

    def _accumulate(self, batch: Tensor, state: TrainState) -> StepLoss:
        """Gradients of a batch, part by part; counts the tokens since each latent fired."""
        is_dead, coefficients = self.is_dead(state), self._coefficients(state.step)
        state.tokens_since_fired += len(batch)
        n, output = self.config.n_accumulated, None
        for part in batch.split(len(batch) // n):
            output = self.crosscoder.step_loss(
                part, coefficients=coefficients, is_dead=is_dead, step=state.step
            )
            (output.loss / n).backward()
            state.tokens_since_fired[output.codes.fired()] = 0
        assert output is not None
        return output

    def is_dead(self, state: TrainState) -> Tensor:
        """Which latents have not fired for long; `[d_sae]`, bool."""
        limit = self.config.dead_after_tokens
        if limit is None:
            limit = min(10_000_000, self.config.n_tokens // 10)
        return state.tokens_since_fired >= limit

    def save(self) -> Path | None:
        """Write a checkpoint now; None without an output folder.

        Raises FloatingPointError where the loss is not finite: nothing is overwritten then.
        """
        self._check_finite()
        if self.output is None:
            return None
        folder = self.output / "checkpoints"
        return save_checkpoint(folder, self.crosscoder, self.optimizer, self._started())

    def begin(self, sample: Float[Tensor, "batch *row"] | None) -> None:
        """Make the first state from activations, unless there is one, and open the log."""
        if self.state is None:
            assert sample is not None
            self.state = self._initial_state(sample)
        self._log = MetricsLog(self.output, self.config, self.state)

    def advance(
        self, batch: Float[Tensor, "batch *row"], position: Position, *, is_last: bool = False
    ) -> str | None:
        """A step, with what is due after it: a log line, whose text is returned, a checkpoint."""
        state, config = self._started(), self.config
        output = self.step(batch)
        state.position = position
        text = None
        if is_last or state.step == 1 or state.step % config.log_every == 0:
            text = self._write_log(state, output)
        if is_last or state.step % config.checkpoint_every == 0:
            self.save()
        return text

    def close(self) -> None:
        """Close the log."""
        if self._log:
            self._log.close()

    def _write_log(self, state: TrainState, output: StepLoss) -> str:
        self._check_finite()
        metrics = step_metrics(
            output,
            sites=self.cfg.sites,
            scales=self._scales(state),
            is_dead=self.is_dead(state),
        )
        metrics["grad_norm"] = self._grad_norm.item()
        metrics["lr"] = self.optimizer.param_groups[0]["lr"]
        if self._log:
            state.metrics_bytes = self._log.write(state.step, metrics)
        return bar_text(metrics)

    def _check_finite(self) -> None:
        """Adam spreads one NaN to all weights at once, so the weights tell of every step before."""
        if self._loss.isfinite() and all(p.isfinite().all() for p in self.crosscoder.parameters()):
            return
        kept = latest_checkpoint(self.output / "checkpoints") if self.output else None
        raise FloatingPointError(
            f"the loss is not finite at step {self._started().step} (it is {self._loss.item()}). "
            f"Lower the learning rate (lr, now {self.config.lr:g}) or check the activations for "
            f"NaN. The last good checkpoint is {kept or 'not there: none had been written'}."
        )

    def _initial_state(self, sample: Float[Tensor, "batch *row"]) -> TrainState:
        """Scales and decoder bias from the first rows, which training then sees again."""
        sites = self.source.sites
        scales = scales_of_rows(sample, sites) if self.config.normalize else (1.0,) * len(sites)
        state = TrainState(
            position=Position(),
            tokens_since_fired=torch.zeros(
                self.cfg.d_sae, dtype=torch.int64, device=self.crosscoder.device
            ),
            scales=scales,
        )
        self.crosscoder.initialize_b_dec_(sample * self._scales(state))
        return state

    def first_rows(self) -> Float[Tensor, "batch *row"]:
        """The rows from which scales and decoder bias are measured: the first batches."""
        n_batches = -(-N_INITIAL_ROWS // self.config.batch_size)
        with closing(self.loader.batches()) as batches:
            return torch.cat([rows for rows, _ in islice(batches, n_batches)])

    def return_to(self, step: int) -> None:
        """Go back to the checkpoint of a step, or to the start; later checkpoints are deleted.

        Raises ValueError where there is no such checkpoint.
        """
        assert self.output is not None
        folder = self.output / "checkpoints"
        path = folder / checkpoint_name(step)
        if step and not path.is_dir():
            raise ValueError(
                f"{self.output} has no checkpoint of step {step:,}, at which the other runs of the "
                "sweep are. Start the sweep again in another folder."
            )
        self._make_weights()
        self.state = load_checkpoint(path, self.crosscoder, self.optimizer) if step else None
        for later in folder.glob("step_*"):
            if later.name > path.name:
                shutil.rmtree(later)

    def _make_weights(self) -> None:
        config = self.config
        with torch.random.fork_rng():
            torch.manual_seed(config.seed if config.weight_seed is None else config.weight_seed)
            self.crosscoder = CrosscoderTraining(self.cfg)
        self.optimizer = torch.optim.Adam(self.crosscoder.parameters(), lr=config.lr, fused=True)

    def _resumed_state(self) -> TrainState | None:
        path = latest_checkpoint(self.output / "checkpoints") if self.output else None
        return load_checkpoint(path, self.crosscoder, self.optimizer) if path else None

    def _started(self) -> TrainState:
        if self.state is None:
            self.state = self._initial_state(self.first_rows())
        return self.state

    def _scales(self, state: TrainState) -> Float[Tensor, "..."]:
        return row_factors(state.scales, self.source.sites).to(self.crosscoder.device)

    def _coefficients(self, step: int) -> dict[str, float]:
        schedule = self.cfg.sparsity_coefficients()
        return {
            n: c.value * min(1.0, (step + 1) / max(1, c.warm_up_steps)) for n, c in schedule.items()
        }

    def calibration_rows(self) -> Iterator[Float[Tensor, "batch *row"]]:
        """The held-out rows on which the inference threshold is set."""
        tokens_per_context = self.held_out.n_tokens / len(self.held_out)
        n_contexts = math.ceil(self.config.n_calibration_tokens / tokens_per_context)
        harvested = harvest_rows(
            self.source, self.held_out[:n_contexts], batch_size=self.config.harvest_batch_size
        )
        for part in harvested:
            yield from part.split(self.config.batch_size)

    def finish(self, rows: Iterable[Tensor]) -> Crosscoder:
        """Calibrate the threshold on held-out rows, fold the scales, and save."""
        state = self._started()
        self.crosscoder.calibrate_threshold_(x * self._scales(state) for x in rows)
        crosscoder = self.crosscoder.to_inference()
        crosscoder.fold_site_scales_(state.scales)
        if self.output:
            crosscoder.save(self.output)
            shutil.rmtree(self.output / "checkpoints")
        return crosscoder

    def finished(self) -> Crosscoder:
        """The dictionary of a run that is complete, from its folder."""
        assert self.is_complete
        assert self.output
        shutil.rmtree(self.output / "checkpoints", ignore_errors=True)
        return Crosscoder.load(self.output, device=self.cfg.device)


def crosscoder_config(
    source: ActivationSource, config: TrainConfig, recipe: Recipe | Preset
) -> CrosscoderTrainingConfig:
    """The dictionary that these sites and settings ask for."""
    recipe = recipe_of(recipe, n_steps=config.n_steps)
    cfg = CrosscoderTrainingConfig(
        d_in=sum(s.d_model for s in source.sites),
        d_sae=config.d_sae or config.expansion * source.d_model,
        device=str(source.device),
        sites=source.sites,
        sparsity=recipe.sparsity,
        partitions=recipe.partitions,
        delta_loss=recipe.delta_loss,
        matryoshka=recipe.matryoshka,
        kernels=config.kernels,
        compute_dtype=config.compute_dtype,
        compile=config.compile,
        auxk=AuxK(weight=config.auxk_weight) if config.auxk_weight else None,
        reconstruction=config.reconstruction,
    )
    cfg.metadata.hook_name = source.sites[-1].hook_name
    cfg.metadata.model_name = source.sites[-1].model_name
    cfg.metadata.weight_processing = source.weight_processing
    cfg.metadata.tokenizer_sha256 = tokenizer_sha256(source.tokenizer)
    return cfg
