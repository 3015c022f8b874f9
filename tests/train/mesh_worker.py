"""One process of a mesh that `test_parallel` starts: every check against what one process does.

torchrun --nproc-per-node 4 tests/train/mesh_worker.py OUTPUT 2 2
"""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tl_crosscoder import (
    L1,
    BatchTopK,
    Crosscoder,
    CrosscoderTraining,
    JumpReLU,
    ModelPair,
    Site,
    TokenizedText,
    TopK,
    TrainConfig,
    Trainer,
    load_documents,
    split_documents,
    tokenize,
)
from tl_crosscoder.analysis.measurement import measure
from tl_crosscoder.config.presets import Preset, preset
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.crosscoder.config import AuxK, CrosscoderTrainingConfig, DeltaLoss
from tl_crosscoder.crosscoder.partition import Partition
from tl_crosscoder.crosscoder.sparse.selection import Scores, batch_topk, token_topk
from tl_crosscoder.interventions.attribution import attribution
from tl_crosscoder.interventions.behaviour import Behaviour, Predictions
from tl_crosscoder.mesh import Mesh, new_mesh
from tl_crosscoder.organisms.suite import organism
from tl_crosscoder.run.estimate import _sent_bytes, _step_memory
from tl_crosscoder.train.checkpoint import TrainingInterruptedError, checkpoints
from tl_crosscoder.train.parallel.dictionary import Place, Shard, SharedBatchTopK, SharedTopK
from tl_crosscoder.train.parallel.shards import latent_dim, latents_of
from tl_crosscoder.train.parallel.trainer import ParallelTrainer

D_IN, D_SAE, BATCH = 24, 64, 16
SITES = tuple(Site(name=n, d_model=12, hook_name="h", model_name=n) for n in ("base", "finetuned"))
TWO = (Partition(name="shared", share=0.75, k=3), Partition(name="delta", share=0.25, k=1))
KINDS = {
    "batchtopk": {"sparsity": BatchTopK(k=3)},
    "topk": {"sparsity": TopK(k=3)},
    "l1": {"sparsity": L1(coefficient=0.1)},
    "jumprelu": {"sparsity": JumpReLU()},
    "annealed": {"sparsity": BatchTopK(k=3, k_initial=40, k_anneal_steps=10)},
    "delta": {"sparsity": BatchTopK(k=4), "partitions": TWO, "delta_loss": DeltaLoss(weight=0.5)},
    "relative": {
        "sparsity": BatchTopK(k=4),
        "partitions": TWO,
        "delta_loss": DeltaLoss(scale="relative"),
    },
    "dfc": {
        "sparsity": BatchTopK(k=4),
        "partitions": (
            Partition(name="shared", share=0.5),
            Partition(name="base", share=0.25, reads=("base",), writes=("base",)),
            Partition(name="finetuned", share=0.25, reads=("finetuned",), writes=("finetuned",)),
        ),
    },
    "tied": {
        "sparsity": L1(coefficient=0.1),
        "partitions": (
            Partition(name="shared", share=0.5, tied=True, penalty_scale=0.2),
            Partition(name="free", share=0.5),
        ),
    },
    "matryoshka": {"sparsity": BatchTopK(k=4), "matryoshka": (0.25, 0.5)},
    "norm": {"sparsity": BatchTopK(k=4), "reconstruction": "norm"},
    "dense": {"sparsity": BatchTopK(k=4), "kernels": "dense"},
    "dense topk": {"sparsity": TopK(k=4), "kernels": "dense"},
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_selection(mesh: Mesh) -> None:
    """The kept set is that of one process, with ties within and across processes."""
    for seed in range(20):
        g = generator(seed)
        # Few distinct values: most of what is at the edge is tied.
        pre = torch.randint(-3, 4, (BATCH, D_SAE), generator=g).float()
        if seed % 2:
            pre += torch.randn(BATCH, D_SAE, generator=g).round(decimals=1)
        x, bias = torch.eye(BATCH), torch.zeros(D_SAE)
        whole = Scores(x=x, W=pre.T.contiguous(), bias=bias, scale=torch.ones(D_SAE))
        cfg = CrosscoderTrainingConfig(d_in=D_IN, d_sae=D_SAE, sites=SITES, sparsity=BatchTopK(k=2))
        latents = latents_of(cfg, mesh.latents.index, mesh.latents.size)
        rows = torch.arange(BATCH).chunk(mesh.data.size)[mesh.data.index]
        own = Scores(
            x=x[rows],
            W=pre.T[latents].contiguous(),
            bias=bias[latents],
            scale=torch.ones(len(latents)),
        )
        place = Place(mesh, latents, D_SAE)
        part = slice(0, len(latents))
        first = int(rows[0])
        for k in (0.5, 2, 7, 40):
            expected = batch_topk(whole, round(k * BATCH), slice(0, D_SAE))[0].positions
            sparsity = SharedBatchTopK(k=k, place=place)
            for guess in (None, 1.0, 5.0):
                found = sparsity.find(own, part, k=k, guess=guess)[0].positions
                tokens, columns = found // len(latents), found % len(latents)
                mine = (tokens + first) * D_SAE + latents[columns]
                assert torch.equal(mesh.world.gathered(mine).sort().values, expected), (seed, k)
            kept = sparsity.keep(pre[rows][:, latents].clamp(min=0), k, latents=part)
            mine = ((rows[:, None] * D_SAE + latents)[kept]).flatten()
            assert torch.equal(mesh.world.gathered(mine).sort().values, expected), (seed, k)
        for k in (1, 3):
            expected = token_topk(whole, k, slice(0, D_SAE)).positions.sort().values
            sparsity = SharedTopK(k=k, place=place)
            found = sparsity.find(own, part, k=k, guess=None)[0].positions
            mine = (found // len(latents) + first) * D_SAE + latents[found % len(latents)]
            assert torch.equal(mesh.world.gathered(mine).sort().values, expected), (seed, k)
            kept = sparsity.keep(pre[rows][:, latents].clamp(min=0), k, latents=part)
            mine = ((rows[:, None] * D_SAE + latents)[kept]).flatten()
            assert torch.equal(mesh.world.gathered(mine).sort().values, expected), (seed, k)


def check_step(mesh: Mesh, name: str, fields: dict) -> None:
    """Losses, codes, threshold and gradients of a step are those of one process."""
    cfg = CrosscoderTrainingConfig(d_in=D_IN, d_sae=D_SAE, sites=SITES, auxk=AuxK(k=4), **fields)
    torch.manual_seed(3)
    one = CrosscoderTraining(cfg)
    torch.manual_seed(3)
    shard = Shard(cfg, mesh)
    for model in (one, shard):
        model._sparse_step.max_density = float("inf")
    x = torch.randn(BATCH, D_IN, generator=generator(1))
    factor = one.initialize_from_(x)
    assert abs(shard.initialize_from_(x) - factor) < 1e-6, name
    latents = shard.place.latents
    rows = x.chunk(mesh.data.size)[mesh.data.index]
    is_dead = torch.rand(D_SAE, generator=generator(2)) < 0.3
    for step in range(3):
        outs = one.step_loss(x, is_dead=is_dead, step=step)
        outs.loss.backward()
        own = shard.step_loss(rows, is_dead=is_dead[latents], step=step)
        own.loss.backward()
        for term, loss in outs.losses.items():
            found = own.losses[term].detach()
            found = mesh.latents.reduced(found) if term in cfg.sparsity.coefficients() else found
            found = mesh.data.mean(found)
            assert torch.allclose(found, loss.detach(), rtol=1e-5, atol=1e-6), (
                name,
                term,
                found,
                loss,
            )
        dense = torch.zeros(BATCH, D_SAE)
        first = mesh.data.index * len(rows)
        dense[first : first + len(rows), latents] = own.codes.to_dense().detach()
        dense, expected = mesh.world.reduced(dense), outs.codes.to_dense().detach()
        assert torch.equal(dense > 0, expected > 0), (name, step)
        assert torch.allclose(dense, expected, atol=1e-5), (name, step)
        assert torch.allclose(shard.threshold, one.threshold[latents], atol=1e-5), name
        for parameter, whole in one.named_parameters():
            mine, theirs = shard.get_parameter(parameter), whole
            grad = mesh.data.mean(mine.grad)
            dim = latent_dim(parameter, theirs)
            expected = theirs.grad if dim is None else theirs.grad.index_select(dim, latents)
            assert torch.allclose(grad, expected, rtol=1e-4, atol=1e-6), (name, parameter, step)
            mine.grad, theirs.grad = None, None
    values = torch.randn(40, D_IN, generator=generator(5))
    one.calibrate_threshold_([values])
    shard.calibrate_threshold_([values[mesh.data.index :: mesh.data.size]])
    assert torch.allclose(shard.threshold, one.threshold[latents], atol=1e-5), name


def run(mesh: Mesh, output: Path) -> None:
    pair = ModelPair.from_pretrained(
        "tl_crosscoder/world-base",
        adapter="tl_crosscoder/taboo",
        hook_name="blocks.1.hook_resid_post",
    )
    documents = split_documents(load_documents("tl_crosscoder/taboo", max_documents=400))
    texts = [tokenize(d, pair.tokenizer, context_size=32) for d in documents]
    config = TrainConfig(
        d_sae=40, n_tokens=20 * 128, batch_size=128, lr=3e-3, lr_warmup_steps=5, log_every=10,
        checkpoint_every=10, buffer_contexts=30, dead_after_tokens=256, n_accumulated=2,
    )  # fmt: skip
    recipe = preset("delta", k=4, shared_share=0.8)
    if mesh.is_first:
        Trainer(pair, *texts, config=config, recipe=recipe, output=output / "one").fit()
    mesh.barrier()
    how = {"config": config, "recipe": recipe, "mesh": mesh}
    check_sent(ParallelTrainer(pair, *texts, output=output / "mesh", **how), config, recipe)
    together = ParallelTrainer(pair, *texts, output=output / "mesh", **how).fit()
    one = Crosscoder.load(output / "one")
    assert_close(one, together)
    if mesh.world.size > 1:
        check_measures(mesh, pair, one, texts[1])
    # Stopped after 13 steps, and continued by the same mesh and by one process.
    stopped_at_13(ParallelTrainer(pair, *texts, output=output / "resumed", **how))
    names = [p.name for p in checkpoints(output / "resumed")]
    assert names == ["step_00000010", "step_00000013"], names
    del how["mesh"]
    if mesh.is_first:
        shutil.copytree(output / "resumed", output / "alone")
        found = Trainer(pair, *texts, output=output / "alone", resume=True, **how).fit()
        assert_close(one, found)
        stopped_at_13(Trainer(pair, *texts, output=output / "joined", **how))
    mesh.barrier()
    how |= {"mesh": mesh, "resume": True}
    again = ParallelTrainer(pair, *texts, output=output / "resumed", **how).fit()
    for name, tensor in together.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert_close(one, ParallelTrainer(pair, *texts, output=output / "joined", **how).fit())
    logs = [
        [json.loads(line) for line in (output / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "mesh", "resumed")
    ]
    for expected, *found in zip(*logs, strict=True):
        for row in found:
            assert row.keys() == expected.keys()
            for key in row.keys() - {"tokens_per_s"}:
                # An FVE of the difference is of small numbers, a hundredth of the activations.
                value = expected[key]
                wanted = value if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)
                assert row[key] == wanted, (key, row, expected)


def check_measures(mesh: Mesh, pair: ModelPair, one: Crosscoder, text: TokenizedText) -> None:
    """Measures and attribution that are shared out are those of one process."""
    for size in (2, 32):  # and batches of one context where there are few
        part = text[: 8 * size // 2 + 1]
        how = {"batch_size": size, "n_examples": 3}
        alone, shared = measure(pair, one, part, **how), measure(
            pair, one, part, **how, axis=mesh.world
        )  # fmt: skip
        found, expected = shared.latents.tensors(), alone.latents.tensors()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, rtol=1e-4, equal_nan=True), name
        for name in ("latents", "quantiles", "ranks", "positions"):
            own, theirs = (getattr(m.collected, name) for m in (shared, alone))
            assert torch.equal(own, theirs), name
        assert torch.allclose(shared.collected.windows, alone.collected.windows, atol=1e-5)
        for name, value in alone.reconstruction.fve.items():
            assert shared.reconstruction.fve[name] == pytest.approx(value), name
        assert shared.reconstruction.l0 == alone.reconstruction.l0
    questions = Behaviour.from_files([str(organism("taboo").planted_questions[0])], pair.tokenizer)[
        0
    ].questions[:6]
    behaviour = Behaviour.of("hints", questions, pair.tokenizer)
    assert len(behaviour.text) > behaviour.n_prompts  # several answers, which are weighed
    for effect in (Predictions.of(text[:9]), behaviour):
        how = {"batch_size": 2, "keep_tokens": True}
        alone = attribution(pair, one, effect, **how)
        shared = attribution(pair, one, effect, **how, axis=mesh.world)
        for name in ("spans", "offsets", "passage_latents"):
            assert torch.equal(getattr(shared, name), getattr(alone, name)), name
        for name in ("by_role", "terms", "tokens", "passage_values"):
            own, theirs = getattr(shared, name), getattr(alone, name)
            assert torch.allclose(own, theirs, rtol=1e-4, atol=1e-6), name
        assert (shared.start, shared.end) == pytest.approx((alone.start, alone.end))
    with pytest.raises(ValueError, match="cannot be shared out"):
        measure(pair, one, text[: mesh.world.size - 1], axis=mesh.world)


def check_sent(trainer: ParallelTrainer, config: TrainConfig, recipe: Preset) -> None:
    """A dry run foretells the numbers that are held here, and what a step sends."""
    mesh = trainer.mesh
    n_data, n_latents = mesh.data.size, mesh.latents.size
    fields = asdict(config) | {"data_parallel": n_data, "latent_parallel": n_latents}
    run = RunConfig(**fields, preset=recipe, output="-", cache="no rows are sent")
    d_in = trainer.cfg.d_in
    held = sum(p.numel() for p in trainer.crosscoder.parameters())
    assert 16 * held == _step_memory(run, trainer.plan, d_in, 4)["crosscoder"]
    dealt = trainer.loader.batches()
    batch, sent, reduce = next(dealt)[0], [], dist.all_reduce
    trainer.begin()

    def counted(values, *args, group, **kwargs):
        n = dist.get_world_size(group)
        sent.append(2 * (n - 1) / n * values.numel() * values.itemsize)
        return reduce(values, *args, group=group, **kwargs)

    dist.all_reduce = counted
    trainer.step(batch)
    dist.all_reduce = reduce
    dealt.close()
    foretold = _sent_bytes(run, trainer.plan, d_in)
    foretold.pop("AuxK", None)  # no latent is dead yet
    assert sum(sent) == pytest.approx(sum(foretold.values()), rel=0.02), (sum(sent), foretold)


def stopped_at_13(trainer: Trainer) -> None:
    trainer.is_stopped = lambda _: trainer.begin().step == 13
    with pytest.raises(TrainingInterruptedError, match="step_00000013"):
        trainer.fit()


def assert_close(one: Crosscoder, other: Crosscoder) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.allclose(tensor, other.state_dict()[name], atol=1e-5), name


def main() -> None:
    output, meshes = Path(sys.argv[1]), [tuple(map(int, m.split("x"))) for m in sys.argv[2:]]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for n_data, n_latents in meshes:
        mesh = new_mesh(n_data, n_latents)
        check_selection(mesh)
        for name, fields in KINDS.items():
            check_step(mesh, name, fields)
        run(mesh, output / f"{n_data}x{n_latents}")
        if mesh.is_first:
            (output / f"{n_data}x{n_latents}/done").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
