"""`ParallelTrainer`: the trainer of one process of a mesh.

    torchrun --nproc-per-node 4 -m tl_crosscoder train --latent-parallel 2 ...

Every process takes its part of the very batches that one would take, so that the dictionary is the
same up to the order in which numbers are added. The first process writes what is written once;
checkpoints have a file for each shard of the latents, and continue on a mesh of any size. Limits:
one dictionary at a time; models are on every device.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.sparse.codes import Codes
from tl_crosscoder.crosscoder.training import CrosscoderTraining, StepLoss
from tl_crosscoder.data.harvest import batches_of, harvest_rows
from tl_crosscoder.data.loader import ActivationLoader
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.mesh import Mesh
from tl_crosscoder.models.site import row_shape
from tl_crosscoder.train.checkpoint import (
    TrainState,
    checkpoint_path,
    load_last_checkpoint,
    load_weights,
    remove_old,
    write_shard,
    write_state,
)
from tl_crosscoder.train.metrics import MetricsLog, step_metrics
from tl_crosscoder.train.parallel.dictionary import Shard
from tl_crosscoder.train.parallel.shards import latent_dim
from tl_crosscoder.train.trainer import Trainer, norm_of

MAX_ROW_SHARE = 0.5
"""Share of rows with a gradient up to which these rows alone are exchanged."""


class PartLoader(ActivationLoader):
    """Deals the rows of this process of each batch.

    From a cache it reads these alone. Live, each process runs the models on some of the contexts of
    a buffer, and the rows go to where they are dealt.
    """

    def __init__(self, *args: Any, mesh: Mesh, n_accumulated: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mesh, self.n_accumulated = mesh, n_accumulated

    def _chosen(self, n_rows: int, generator: torch.Generator) -> list[Tensor]:
        return [
            self._own(batch, self.mesh.data.index) for batch in super()._chosen(n_rows, generator)
        ]

    def _own(self, batch: Tensor, part: int) -> Tensor:
        """The rows of one part; of each of the accumulated batches its share."""
        return batch.view(self.n_accumulated, self.mesh.data.size, -1)[:, part].flatten()

    def _buffer(
        self, contexts: Tensor, generator: torch.Generator
    ) -> tuple[int, Callable[[int], Tensor]]:
        text = self.text[contexts]
        if self._reads(text) or self.mesh.world.size == 1:
            return super()._buffer(contexts, generator)
        rows, batches = self._exchanged(text, generator)
        return len(batches), lambda i: rows.index_select(0, batches[i].to(rows.device))

    def _exchanged(
        self, text: TokenizedText, generator: torch.Generator
    ) -> tuple[Tensor, list[Tensor]]:
        """Rows of a buffer that are dealt to this process, and their numbers by batch."""
        world, n_latents = self.mesh.world, self.mesh.latents.size
        parts = [part for _, part in batches_of(text, self.harvest_batch_size)]
        made = [self._rows_of(part) for part in parts[world.index :: world.size]]
        # Rows of each forward pass, in the order in which one process would have them.
        counts = torch.zeros(len(parts), dtype=torch.long, device=self.source.device)
        counts[world.index :: world.size] = torch.tensor(
            [len(m) for m in made], device=counts.device
        )
        counts = world.reduced(counts).cpu()
        owners = torch.arange(len(parts)).remainder(world.size).repeat_interleave(counts)
        batches = ActivationLoader._chosen(self, int(counts.sum()), generator)
        empty = torch.empty(0, *row_shape(self.source.sites), device=self.source.device)
        own = torch.cat([*made, empty])
        if not batches:
            return own, []
        place = torch.zeros(len(owners), dtype=torch.long)
        place[owners == world.index] = torch.arange(len(own))
        wanted = [
            torch.cat([self._own(batch, part) for batch in batches])
            for part in range(self.mesh.data.size)
        ]
        given = [w[owners[w] == world.index] for w in wanted for _ in range(n_latents)]
        mine = wanted[self.mesh.data.index]
        taken = [int((owners[mine] == rank).sum()) for rank in range(world.size)]
        sent = own[place[torch.cat(given)].to(own.device)].contiguous()
        got = torch.empty(len(mine), *sent.shape[1:], dtype=sent.dtype, device=sent.device)
        dist.all_to_all_single(got, sent, taken, [len(g) for g in given], group=world.group)
        # They come by owner; each owner's in the order in which they are dealt.
        order = owners[mine].argsort(stable=True)
        numbers = torch.empty_like(order)
        numbers[order] = torch.arange(len(order))
        return got, [*numbers.split(self.batch_size // self.mesh.data.size)]

    def _rows_of(self, part: TokenizedText) -> Tensor:
        return torch.cat([*harvest_rows(self.source, part, batch_size=self.harvest_batch_size)])


class ParallelTrainer(Trainer):
    """Trains its shard of a crosscoder; see `Trainer` for the arguments, which all processes share.

    Raises:
        ValueError: a batch that does not divide, or ranges of latents that do not; or no output.
    """

    def __init__(self, *args: Any, mesh: Mesh, **kwargs: Any) -> None:
        self.mesh, self.n_data = mesh, mesh.data.size
        self._touched: Tensor | None = None
        super().__init__(*args, **kwargs)

    def _new_loader(self, text: TokenizedText) -> ActivationLoader:
        if self.output is None:
            raise ValueError(
                "several processes put a dictionary together in its output folder: name one."
            )
        n_accumulated = self.config.n_accumulated
        n = self.n_data * n_accumulated
        if self.plan.batch_size % n:
            raise ValueError(
                f"batch_size {self.plan.batch_size} cannot be shared out to {self.n_data} "
                f"processes (data_parallel): choose a multiple of {n}."
            )
        if len(self.held_out) < self.mesh.world.size:
            raise ValueError(
                f"{len(self.held_out)} held-out contexts cannot be shared out to "
                f"{self.mesh.world.size} processes, which measure the dictionary together: hold "
                "more of the text out (held_out, --held-out), or start fewer."
            )
        how = self._loading()
        if not self.source.reads_by_row:
            how["prefetch"] = 0  # an exchange of rows that is made ahead would cross a step's
        how |= {"mesh": self.mesh, "n_accumulated": n_accumulated}
        return PartLoader(self.source, text, **how)

    def _claim(self, record: dict[str, Any], *, resume: bool) -> bool:
        return self.mesh.by_first(
            lambda: super(ParallelTrainer, self)._claim(record, resume=resume)
        )

    def _new_dictionary(self) -> CrosscoderTraining:
        return Shard(self.cfg, self.mesh)

    @property
    def _shard(self) -> Shard:
        assert isinstance(self.crosscoder, Shard)
        return self.crosscoder

    def _load(self) -> TrainState | None:
        assert self.output
        how = {"cfg": self.cfg, "latents": self._shard.place.latents}
        return load_last_checkpoint(self.output, self.crosscoder, self.optimizer, **how)

    def _save(self, output: Path) -> Path:
        """Write a file for each shard; none is there before all are."""
        state, mesh = self.begin(), self.mesh
        path, n_shards = checkpoint_path(output, state), mesh.latents.size
        with files.replacing(path) if mesh.is_first else nullcontext() as temporary:
            folder = mesh.from_first(temporary)
            assert folder is not None
            if mesh.data.index == 0:
                how = {"index": mesh.latents.index, "n_shards": n_shards}
                write_shard(folder, self.crosscoder, self.optimizer, state, **how)
            mesh.barrier()
            if mesh.is_first:
                write_state(folder, state, n_shards=n_shards)
        if mesh.is_first:
            remove_old(output)
        mesh.barrier()
        return path

    def _new_log(self, state: TrainState) -> MetricsLog:
        if self.mesh.is_first:
            return super()._new_log(state)
        return MetricsLog(None, replace(self.config, wandb_project=None), state)

    def lock(self) -> AbstractContextManager[None]:
        """By the first process."""
        return super().lock() if self.mesh.is_first else nullcontext()

    def is_stopped(self, flag: bool) -> bool:
        """Whether any process was interrupted."""
        asked = torch.tensor(int(flag), device=self.crosscoder.device)
        return bool(self.mesh.world.reduced(asked, "max"))

    def first_rows(self) -> Float[Tensor, "batch *row"]:
        """As one process has them, in every process."""
        size = self.plan.batch_size // self.n_data
        parts = super().first_rows().split(size)
        return torch.cat([self.mesh.data.gathered(part) for part in parts])

    def _fired(self, codes: Codes) -> Bool[Tensor, " d_sae"]:
        fired = self.mesh.data.reduced(codes.fired().byte(), "max").bool()
        self._touched = fired if self._touched is None else self._touched | fired
        return fired

    def _finish_gradients(self) -> None:
        """Make every gradient that of the whole batch.

        Rows of latents that neither fired nor are dead are zero everywhere, unless the sparsity
        learns thresholds, and are left out where they are many.
        """
        touched, self._touched = self._touched, None
        if self.n_data == 1:
            return
        assert touched is not None
        touched = touched | self.is_dead(self.begin())
        is_whole = bool(self.cfg.sparsity.parameters()) or bool(
            touched.float().mean() > MAX_ROW_SHARE
        )
        for name, parameter in self.crosscoder.named_parameters():
            grad = parameter.grad
            assert grad is not None
            dim = latent_dim(name, grad)
            rows = grad.T if dim == 1 else grad
            if is_whole or dim is None:
                rows.copy_(self.mesh.data.sum_(rows.contiguous()).div_(self.n_data))
            else:
                rows[touched] = self.mesh.data.sum_(rows[touched]).div_(self.n_data)

    def _clip(self) -> Float[Tensor, ""]:
        squares = {True: [], False: []}
        for name, grad in self._gradients().items():
            squares[latent_dim(name, grad) is not None].append(norm_of(grad).square())
        sharded, whole = (torch.stack(own).sum() for own in (squares[True], squares[False]))
        return self._clipped((self.mesh.latents.reduced(sharded) + whole).sqrt())

    def _metrics(self, output: StepLoss, state: TrainState) -> dict[str, float]:
        data, latents = self.mesh.data, self.mesh.latents
        penalties = self.cfg.sparsity.coefficients()
        losses = {
            name: data.mean(latents.reduced(loss) if name in penalties else loss.detach())
            for name, loss in output.losses.items()
        }
        metrics = step_metrics(
            replace(output, loss=torch.stack([*losses.values()]).sum(), losses=losses),
            sites=self.cfg.sites,
            scales=self._scales(state),
            is_dead=self.is_dead(state),
            auxk_fve=self._shard.auxk_fve(replace(output, losses=losses)),
            batch_mean=self._shard.batch_mean,
        )
        l0 = data.mean(latents.reduced(output.codes.l0().float()))
        dead = latents.mean(self.is_dead(state).float().mean())
        return metrics | {"l0": l0.item(), "dead_share": dead.item()}

    def _calibration_text(self) -> TokenizedText:
        text = super()._calibration_text()
        text = text if len(text) >= self.n_data else self.held_out
        return text[self.mesh.data.index :: self.n_data]

    def finish(self, rows: Iterable[Tensor]) -> Crosscoder:
        """Calibrate over all processes; the first puts the shards together, and all read them."""
        if not self.is_complete:
            self._calibrate(rows)
            self.save()
            self.mesh.by_first(self._put_together)
        self.mesh.by_first(self._tidy)
        assert self.output
        return Crosscoder.load(self.output, device=self.cfg.device)

    def _put_together(self) -> None:
        """Write the dictionary that one process would have written."""
        assert self.output
        with torch.random.fork_rng():
            whole = CrosscoderTraining(self.cfg)
        load_weights(checkpoint_path(self.output, self.begin()), whole, cfg=self.cfg)
        self._saved(whole)
