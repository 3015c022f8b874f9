"""`Trainer`: turns a pair, or any other sites, and a text into a crosscoder.

In the output folder: `runner_cfg.json` (how it was made, written first), `metrics.jsonl` (a line
every `log_every` steps), `checkpoints/` while it runs, and at the end `cfg.json` with
`sae_weights.safetensors`. A run that stops, however it stops, continues from its last checkpoint to
the same final weights, bit for bit on a CPU with the same number of threads. Limit: one process
and device; `train.parallel` has several.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.config.presets import BatchTopK, Preset
from tl_crosscoder.config.training import TrainConfig
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.sparse.codes import Codes
from tl_crosscoder.crosscoder.training import CrosscoderTraining, StepLoss
from tl_crosscoder.data.harvest import harvest_rows
from tl_crosscoder.data.loader import ActivationLoader, Position
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.locks import locked
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.progress import progress
from tl_crosscoder.train.checkpoint import (
    TrainingInterruptedError,
    TrainState,
    checkpoints,
    interruptible,
    load_last_checkpoint,
    open_run,
    record_weights,
    remove_checkpoints,
    run_record,
    save_checkpoint,
)
from tl_crosscoder.train.metrics import (
    MetricsLog,
    bar_text,
    check_rows,
    row_factors,
    scales_of_rows,
    step_metrics,
)
from tl_crosscoder.train.presets import Recipe, crosscoder_config, plan_of

N_INITIAL_ROWS = 8192
"""Activation pairs from which the site scales and the first biases are measured."""
SHARED = (
    "n_tokens", "batch_size", "buffer_contexts", "harvest_batch_size", "checkpoint_every", "seed",
    "n_calibration_tokens",
)  # fmt: skip
"""Settings that trainers have in common where they share batches."""


class Trainer:
    """Trains one crosscoder; `fit` does everything, `step` one step.

    Args:
        source: models and their hook points, an `ActivationCache` of them, or the `difference()`
            of either.
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

    n_data: int = 1
    """Processes that a batch is shared out to."""

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
        config, recipe = config or TrainConfig(), recipe or BatchTopK()
        self.plan = plan = plan_of(source, text, config, recipe)
        self.config = config = replace(config, **asdict(plan))
        self.source, self.held_out = source, held_out
        self.output = files.user_path(output) if output is not None else None
        self.cfg = crosscoder_config(source, config, recipe)
        self.cfg.metadata.context_size = text.context_size
        if held_out.n_tokens == 0:
            raise ValueError("the held-out text is empty: the threshold is calibrated on it.")
        self.loader = self._new_loader(text)
        record = run_record(source, text, held_out, config, self.cfg)
        self.is_complete = self._claim(record, resume=resume)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed if config.weight_seed is None else config.weight_seed)
            self.crosscoder = self._new_dictionary()
        self.optimizer = torch.optim.Adam(self.crosscoder.parameters(), lr=config.lr, fused=True)
        self.state: TrainState | None = None
        if self.output and resume and not self.is_complete:
            self.state = self._load()
        self._grad_norm = self._loss = torch.zeros(())
        self._log: MetricsLog | None = None

    # What several processes do in another way; see `train.parallel`.

    def _new_loader(self, text: TokenizedText) -> ActivationLoader:
        return ActivationLoader(self.source, text, **self._loading())

    def _loading(self) -> dict[str, Any]:
        """How a loader deals the batches of this run."""
        config = self.config
        return {
            "batch_size": self.plan.batch_size,
            "buffer_contexts": config.buffer_contexts,
            "harvest_batch_size": config.harvest_batch_size,
            "seed": config.seed,
            "prefetch": config.prefetch,
        }

    def _claim(self, record: dict[str, Any], *, resume: bool) -> bool:
        """Begin or continue the run in its folder; whether it is complete there."""
        return self.output is not None and open_run(self.output, record, resume=resume)

    def _new_dictionary(self) -> CrosscoderTraining:
        return CrosscoderTraining(self.cfg)

    def _load(self) -> TrainState | None:
        assert self.output
        return load_last_checkpoint(self.output, self.crosscoder, self.optimizer, cfg=self.cfg)

    def _save(self, output: Path) -> Path:
        return save_checkpoint(output, self.crosscoder, self.optimizer, self.begin())

    def _fired(self, codes: Codes) -> Bool[Tensor, " d_sae"]:
        return codes.fired()

    def _finish_gradients(self) -> None:
        """Called when the gradients of a batch are there."""

    def _clip(self) -> Float[Tensor, ""]:
        """Clip the gradients; returns their norm."""
        norms = [norm_of(grad) for grad in self._gradients().values()]
        return self._clipped(torch.linalg.vector_norm(torch.stack(norms)))

    def _gradients(self) -> dict[str, Tensor]:
        named = self.crosscoder.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None}

    def _clipped(self, norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
        factor = (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in self._gradients().values():
            grad.mul_(factor)
        return norm

    def _metrics(self, output: StepLoss, state: TrainState) -> dict[str, float]:
        """What is logged of a step."""
        return step_metrics(
            output,
            sites=self.cfg.sites,
            scales=self._scales(state),
            is_dead=self.is_dead(state),
            auxk_fve=self.crosscoder.auxk_fve(output),
        )

    def _new_log(self, state: TrainState) -> MetricsLog:
        return MetricsLog(self.output, self.config, state)

    def lock(self) -> AbstractContextManager[None]:
        """Keep other processes from the output."""
        return locked(self.output) if self.output else nullcontext()

    def is_stopped(self, flag: bool) -> bool:
        """Whether the run stops after this step, given whether this process was interrupted."""
        return flag

    def fit(self) -> Crosscoder:
        """Train to the end, calibrate, save, and return the dictionary for raw activations.

        Raises:
            FloatingPointError: the loss is not finite; the last checkpoint is intact.
            TrainingInterruptedError: Ctrl-C; a checkpoint of that very step is on disk.
        """
        return fit_together([self])[0]

    def begin(self, sample: Float[Tensor, "batch *row"] | None = None) -> TrainState:
        """The state of the run; the first one is made from rows that training then sees again.

        Args:
            sample: rows for the scales and the decoder bias; `first_rows` by default.
        """
        if self.state is None:
            sample, sites = self.first_rows() if sample is None else sample, self.source.sites
            check_rows(sample, sites)
            self.state = TrainState(
                position=Position(),
                tokens_since_fired=torch.zeros_like(self.crosscoder.b_enc, dtype=torch.int64),
                scales=scales_of_rows(sample, sites)
                if self.config.normalize
                else (1.0,) * len(sites),
            )
            self.crosscoder.initialize_from_(sample * self._scales(self.state))
        return self.state

    def first_rows(self) -> Float[Tensor, "batch *row"]:
        """Rows of the first batches, from which scales and decoder bias are measured."""
        n_batches = -(-N_INITIAL_ROWS // self.plan.batch_size)
        with closing(self.loader.batches()) as batches:
            return torch.cat([rows for rows, _ in islice(batches, n_batches)])

    def step(self, batch: Float[Tensor, "batch *row"]) -> StepLoss:
        """One optimizer step on raw activations; returns the loss of the last accumulated part."""
        state = self.begin()
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate(state.step)
        self.optimizer.zero_grad()
        output = self._accumulate(batch * self._scales(state), state)
        self._finish_gradients()
        self._grad_norm = self._clip()
        self.optimizer.step()
        self._loss = output.loss.detach()
        state.step += 1
        return output

    def _accumulate(self, batch: Tensor, state: TrainState) -> StepLoss:
        """Gradients of a batch, part by part; counts the tokens since each latent fired."""
        is_dead = self.is_dead(state)
        coefficients = self.cfg.sparsity.coefficients_at(state.step)
        state.tokens_since_fired += len(batch) * self.n_data
        n, output = self.config.n_accumulated, None
        for part in batch.split(len(batch) // n):
            output = self.crosscoder.step_loss(
                part, coefficients=coefficients, is_dead=is_dead, step=state.step
            )
            (output.loss / n).backward()
            state.tokens_since_fired[self._fired(output.codes)] = 0
        assert output is not None
        return output

    def is_dead(self, state: TrainState) -> Bool[Tensor, " d_sae"]:
        """Which latents have not fired for long."""
        limit = self.config.dead_after_tokens
        if limit is None:
            limit = min(10_000_000, self.plan.n_tokens // 10)
        return state.tokens_since_fired >= limit

    def advance(
        self, batch: Float[Tensor, "batch *row"], position: Position, *, is_last: bool = False
    ) -> str | None:
        """A step, with what is due after it: a log line, whose text is returned, a checkpoint."""
        state, config, text = self.begin(), self.config, None
        log = self._log = self._log or self._new_log(state)
        output = self.step(batch)
        state.position = position
        if is_last or state.step == 1 or state.step % config.log_every == 0:
            self._check_finite()
            metrics = self._metrics(output, state)
            metrics["grad_norm"] = self._grad_norm.item()
            metrics["lr"] = self.optimizer.param_groups[0]["lr"]
            state.metrics_bytes = log.write(state.step, metrics)
            text = bar_text(metrics)
        if is_last or state.step % config.checkpoint_every == 0:
            self.save()
        return text

    def close(self) -> None:
        """Close the log."""
        if self._log:
            self._log.close()

    def save(self) -> Path | None:
        """Write a checkpoint now; None without an output folder.

        Raises FloatingPointError where the loss is not finite: nothing is overwritten then.
        """
        self._check_finite()
        if self.output is None:
            return None
        return self._save(self.output)

    def _check_finite(self) -> None:
        """Adam spreads one NaN to all weights at once, so the weights tell of every step before."""
        if self._loss.isfinite() and all(p.isfinite().all() for p in self.crosscoder.parameters()):
            return
        kept = checkpoints(self.output)[-1:] if self.output else []
        raise FloatingPointError(
            f"the loss{f' of {self.output}' if self.output else ''} is not finite at step "
            f"{self.begin().step} (it is {self._loss.item()}). Lower the learning rate (lr, now "
            f"{self.config.lr:g}) or check the activations for NaN. The last good checkpoint is "
            f"{kept[0] if kept else 'not there: none had been written'}."
        )

    def _scales(self, state: TrainState) -> Float[Tensor, "..."]:
        return row_factors(state.scales, self.source.sites).to(self.crosscoder.device)

    def calibration_rows(self) -> Iterator[Float[Tensor, "batch *row"]]:
        """Held-out rows on which the inference threshold is set."""
        text, size = self._calibration_text(), self.config.harvest_batch_size
        harvested = harvest_rows(self.source, text, batch_size=size)
        for part in harvested:
            yield from part.split(self.plan.batch_size)

    def _calibration_text(self) -> TokenizedText:
        tokens_per_context = self.held_out.n_tokens / len(self.held_out)
        return self.held_out[: math.ceil(self.config.n_calibration_tokens / tokens_per_context)]

    def finish(self, rows: Iterable[Tensor]) -> Crosscoder:
        """Calibrate the threshold on held-out rows, fold the scales, and save.

        A run that is complete is read from its folder instead.
        """
        if self.is_complete:
            assert self.output
            crosscoder = Crosscoder.load(self.output, device=self.cfg.device)
        else:
            self._calibrate(rows)
            crosscoder = self._saved(self.crosscoder)
        self._tidy()
        return crosscoder

    def _calibrate(self, rows: Iterable[Tensor]) -> None:
        scales = self._scales(self.begin())
        self.crosscoder.calibrate_threshold_(x * scales for x in rows)

    def _saved(self, trained: CrosscoderTraining) -> Crosscoder:
        """The dictionary for raw activations, which is also in the output."""
        crosscoder = trained.to_inference()
        crosscoder.fold_site_scales_(self.begin().scales)
        if self.output:
            crosscoder.save(self.output)
        return crosscoder

    def _tidy(self) -> None:
        """Leave only what a complete run has."""
        if self.output:
            record_weights(self.output)
            remove_checkpoints(self.output)


def norm_of(values: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Norm of a tensor by those of its rows: over ten million values at once float32 errs by 2e-4.

    That is what `clip_grad_norm_` does on a CPU; row by row it takes as long.
    """
    norm = torch.linalg.vector_norm
    if values.ndim < 2:
        return norm(values)
    return norm(norm(values if values.is_contiguous() else values.mT, dim=-1))


def fit_together(trainers: Sequence[Trainer]) -> list[Crosscoder]:
    """Train all to the end on the same batches, calibrate, save, and return the dictionaries.

    Each ends with the weights, bit for bit on a CPU, that it would have alone; the models run once
    for all. Runs that are complete are not trained again.

    Raises:
        ValueError: trainers of other sites, text, batch size, length or seed; or another process
            writes to an output.
        FloatingPointError: a loss is not finite. The other runs are trained to the end first, and
            the last checkpoints of this one are intact.
        TrainingInterruptedError: Ctrl-C; checkpoints of that very step are on disk.
    """
    made = fit_each(trainers)
    for one in made:
        if isinstance(one, FloatingPointError):
            raise one
    return [one for one in made if isinstance(one, Crosscoder)]


def fit_each(trainers: Sequence[Trainer]) -> list[Crosscoder | FloatingPointError]:
    """`fit_together`, with the error of a run in the place of its dictionary."""
    left = [trainer for trainer in trainers if not trainer.is_complete]
    rows: Iterable[Tensor] = []
    failed: dict[Trainer, FloatingPointError] = {}
    with ExitStack() as stack:
        for trainer in trainers:
            stack.enter_context(trainer.lock())
        if left:
            _check_shared(left)
            failed = _train(left)
            rows = left[0].calibration_rows()
            # Several read the held-out rows, which are harvested once; one has them as they come.
            rows = [*rows] if len(left) - len(failed) > 1 else rows
        return [failed.get(trainer) or trainer.finish(rows) for trainer in trainers]


def _train(trainers: Sequence[Trainer]) -> dict[Trainer, FloatingPointError]:
    """Bring all to the last step; the errors of those that did not get there."""
    running, failed = [*trainers], dict[Trainer, FloatingPointError]()
    is_new = any(trainer.state is None for trainer in trainers)
    sample = trainers[0].first_rows() if is_new else None
    with ExitStack() as stack:
        for trainer in trainers:
            stack.callback(trainer.close)
            trainer.begin(sample)
        del sample
        # Those that are ahead, as in a sweep that has got another run, wait there for the rest.
        first = min(trainers, key=lambda trainer: trainer.begin().step)
        step, size, n_steps = first.begin().step, first.plan.batch_size, first.plan.n_steps
        interrupted = stack.enter_context(interruptible())
        batches = stack.enter_context(closing(first.loader.batches(first.begin().position)))
        how = {"desc": "Training", "unit": "tok", "unit_scale": True}
        bar = stack.enter_context(progress(total=n_steps * size, initial=step * size, **how))
        while step < n_steps and running:
            batch, position = next(batches)
            active = [trainer for trainer in running if trainer.begin().step == step]
            step += 1
            for trainer in active:
                try:
                    text = trainer.advance(batch, position, is_last=step == n_steps)
                except FloatingPointError as error:
                    failed[trainer] = error
                    running.remove(trainer)
                else:
                    if text and trainer is active[0]:
                        bar.set_postfix_str(text)
            bar.update(size)
            if trainers[0].is_stopped(interrupted.is_set()):
                raise _interrupted([t for t in running if t.begin().step == step], step)
    return failed


def _interrupted(trainers: Sequence[Trainer], step: int) -> TrainingInterruptedError:
    """Save those that stand at this step; what is to be raised."""
    saved: list[Path | None] = []
    for trainer in trainers:
        with suppress(FloatingPointError):  # nothing good to save: an earlier one is kept
            saved.append(trainer.save())
    path = next((path for path in saved if path), None)
    where = f"saved {path}; continue with --resume" if path else "nothing was saved"
    return TrainingInterruptedError(f"interrupted after step {step}: {where}.")


def _check_shared(trainers: Sequence[Trainer]) -> None:
    first = trainers[0]
    for trainer in trainers[1:]:
        differing = [n for n in SHARED if getattr(trainer.config, n) != getattr(first.config, n)]
        if trainer.source is not first.source:
            differing.append("the models or the cache")
        if not torch.equal(trainer.loader.text.tokens, first.loader.text.tokens):
            differing.append("the text")
        if differing:
            raise ValueError(
                f"dictionaries that are trained together share their batches, but these differ in "
                f"{', '.join(differing)}. Train them apart, or give them the same."
            )
