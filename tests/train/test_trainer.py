import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from tl_crosscoder import Crosscoder, Site, TrainConfig, Trainer
from tl_crosscoder.config.presets import preset
from tl_crosscoder.data.loader import Position
from tl_crosscoder.train.checkpoint import (
    TrainingInterruptedError,
    TrainState,
    check_weights,
    checkpoints,
    read_record,
)
from tl_crosscoder.train.metrics import MetricsLog, row_factors, scales_of_rows

PAIR = [Site(name=n, d_model=8, hook_name="h", model_name=n) for n in ("base", "finetuned")]
CONFIG = TrainConfig(
    d_sae=48,
    n_tokens=40 * 128,
    batch_size=128,
    lr=3e-3,
    lr_warmup_steps=5,
    log_every=10,
    checkpoint_every=15,
    buffer_contexts=30,
    dead_after_tokens=600,
)


def changed(**fields):
    return TrainConfig(**(vars(CONFIG) | fields))


SHORT = changed(n_tokens=15 * 128, checkpoint_every=5, log_every=5)


def new_trainer(pair, texts, output=None, *, config=CONFIG, resume=False, recipe=None):
    return Trainer(
        pair,
        *texts,
        config=config,
        recipe=recipe or preset("batchtopk", k=4),
        output=output,
        resume=resume,
    )


def weights(crosscoder):
    return {n: t.clone() for n, t in crosscoder.state_dict().items()}


def assert_equal_bits(one, other):
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def rows_of_log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(taboo_pair, texts, tmp_path_factory):
    """(folder, weights) of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    return folder, weights(new_trainer(taboo_pair, texts, folder).fit())


def test_a_run_leaves_a_dictionary_its_record_and_metrics(unbroken):
    folder, trained = unbroken
    assert {p.name for p in folder.iterdir()} == {
        "cfg.json",
        "sae_weights.safetensors",
        "runner_cfg.json",
        "metrics.jsonl",
    }
    assert_equal_bits(weights(Crosscoder.load(folder)), trained)
    record = json.loads((folder / "runner_cfg.json").read_text())
    assert record["training"]["lr"] == 3e-3
    assert record["sites"][1]["adapter"] == "tl_crosscoder/taboo"
    assert record["sparsity"]["kind"] == "batchtopk"
    assert record["sparsity"]["k"] == 4
    assert len(record["text"]["sha256"]) == 64
    rows = rows_of_log(folder)
    assert [r["step"] for r in rows] == [1, 10, 20, 30, 40]
    assert rows[-1]["n_tokens"] == 40 * 128
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["fve/base"] > 0.35
    assert {"fve/finetuned", "fve/difference", "l0", "dead_share", "lr", "tokens_per_s"} <= set(
        rows[0]
    )


def test_the_same_seed_gives_the_same_bits_and_another_does_not(taboo_pair, texts, unbroken):
    again = new_trainer(taboo_pair, texts)
    other = new_trainer(taboo_pair, texts, config=changed(seed=1))
    assert not torch.equal(again.crosscoder.W_dec, other.crosscoder.W_dec)
    assert_equal_bits(weights(again.fit()), unbroken[1])  # spec: T1


def test_the_dictionary_explains_raw_activations(taboo_pair, texts, unbroken):  # spec: C4 C5
    x = taboo_pair.activations(texts[1].tokens)[texts[1].mask]
    crosscoder = Crosscoder.load(unbroken[0])
    left = (crosscoder(x) - x).pow(2).sum(dim=(0, 2)) / (x - x.mean(0)).pow(2).sum(dim=(0, 2))
    assert (1 - left > 0.35).all()
    l0 = (crosscoder.encode(x) > 0).sum(dim=-1).double().mean().item()
    assert l0 == pytest.approx(4, rel=0.05)


def test_a_run_stopped_at_any_step_resumes_to_the_same_bits(  # spec: T2
    taboo_pair, texts, tmp_path, unbroken, monkeypatch
):
    """Stopped without warning at step 23: what came after the checkpoint of step 15 is gone."""

    class Killed(Exception):
        pass

    folder = tmp_path / "run"
    trainer = new_trainer(taboo_pair, texts, folder)
    step = trainer.step

    def step_until_killed(batch):
        if trainer.state.step == 23:
            raise Killed
        return step(batch)

    monkeypatch.setattr(trainer, "step", step_until_killed)
    with pytest.raises(Killed):
        trainer.fit()
    assert [p.name for p in checkpoints(folder)] == ["step_00000015"]
    resumed = new_trainer(taboo_pair, texts, folder, resume=True)
    assert resumed.state.step == 15
    assert_equal_bits(weights(resumed.fit()), unbroken[1])
    logs = [
        [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows_of_log(of)]
        for of in (folder, unbroken[0])
    ]
    assert logs[0] == logs[1]


SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[3])
torch.set_num_threads(int(sys.argv[4]))
from test_trainer import changed, new_trainer
from tl_crosscoder import ModelPair, load_documents, split_documents, tokenize
pair = ModelPair.from_pretrained(
    "tl_crosscoder/world-base", adapter="tl_crosscoder/taboo", hook_name="blocks.1.hook_resid_post"
)
documents = split_documents(load_documents("tl_crosscoder/taboo", max_documents=400))
texts = tuple(tokenize(d, pair.tokenizer, context_size=32) for d in documents)
config = changed(n_tokens=128 * int(sys.argv[2]), checkpoint_every=5)
new_trainer(pair, texts, Path(sys.argv[1]), config=config, resume=True).fit()
"""


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_bits(taboo_pair, texts, tmp_path):  # spec: T2 T3
    """For real: another process, killed once it has written a checkpoint."""
    n_steps, folder = 4000, tmp_path / "run"
    arguments = [folder, n_steps, Path(__file__).parent, torch.get_num_threads()]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *map(str, arguments)])
    while not checkpoints(folder) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    assert process.wait(timeout=60) != 0
    assert not (folder / "cfg.json").exists()
    reached = int(checkpoints(folder)[-1].name.removeprefix("step_"))
    # The rest of 4,000 steps would take long: compare the state after 20 more.
    config = changed(n_tokens=128 * n_steps, checkpoint_every=5)
    resumed = new_trainer(taboo_pair, texts, folder, config=config, resume=True)
    unbroken = new_trainer(taboo_pair, texts, config=config)
    for trainer, n in ((unbroken, reached + 20), (resumed, 20)):
        batches = trainer.loader.batches(trainer.begin().position)
        for _ in range(n):
            trainer.step(next(batches)[0])
    assert_equal_bits(weights(resumed.crosscoder), weights(unbroken.crosscoder))
    assert torch.equal(resumed.state.tokens_since_fired, unbroken.state.tokens_since_fired)


def test_an_interrupt_saves_a_checkpoint_of_the_very_step(taboo_pair, texts, tmp_path, monkeypatch):
    handler_before = signal.getsignal(signal.SIGINT)
    trainer = new_trainer(taboo_pair, texts, tmp_path / "run")
    step = trainer.step

    def step_and_interrupt(batch):
        output = step(batch)
        if trainer.state.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return output

    monkeypatch.setattr(trainer, "step", step_and_interrupt)
    with pytest.raises(
        TrainingInterruptedError, match=r"after step 7: saved .*step_00000007; .*--resume"
    ):
        trainer.fit()
    assert signal.getsignal(signal.SIGINT) is handler_before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_good_checkpoint(
    taboo_pair, texts, tmp_path, monkeypatch
):
    trainer = new_trainer(taboo_pair, texts, tmp_path / "run")
    step = trainer.step
    poisoned = lambda b: b * torch.nan if trainer.state.step == 22 else b  # noqa: E731
    monkeypatch.setattr(trainer, "step", lambda batch: step(poisoned(batch)))
    with pytest.raises(FloatingPointError, match=r"not finite at step 30 .*step_00000015"):
        trainer.fit()
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step_00000015"]
    resumed = new_trainer(taboo_pair, texts, tmp_path / "run", resume=True)
    assert all(t.isfinite().all() for t in weights(resumed.crosscoder).values())


@pytest.fixture(scope="module")
def stopped(taboo_pair, texts, tmp_path_factory):
    """A folder with checkpoints of steps 5 and 10, of a run that went on to step 12."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    trainer = new_trainer(taboo_pair, texts, folder, config=SHORT)
    trainer.begin()
    for batch in islice(trainer.loader.batches(), 12):
        trainer.advance(*batch)
    return folder


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "step"),
    [
        (lambda c: flipped(c[1] / "weights.safetensors"), 5),
        (lambda c: os.truncate(c[1] / "optimizer.safetensors", 100), 5),
        (lambda c: (c[1] / "state.json").write_text("[1]"), 5),
        (lambda c: (c[1] / "state.json").unlink(), 5),
        (lambda c: flipped(c[0] / "weights.safetensors"), 10),
        (lambda c: [flipped(p / "weights.safetensors") for p in c], None),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_said(
    taboo_pair, texts, stopped, tmp_path, capsys, damage, step
):
    folder = shutil.copytree(stopped, tmp_path / "run")
    damage(checkpoints(folder))
    if step is None:
        with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
            new_trainer(taboo_pair, texts, folder, config=SHORT, resume=True)
        return
    resumed = new_trainer(taboo_pair, texts, folder, config=SHORT, resume=True)
    assert resumed.state.step == step
    assert ("step_00000010 is damaged" in capsys.readouterr().err) == (step == 5)


def test_a_resume_sweeps_what_a_kill_left_and_keeps_what_somebody_put_there(
    taboo_pair, texts, stopped, tmp_path
):
    """Half of an old checkpoint, half of a new one, and a copy that the user made."""
    folder = shutil.copytree(stopped, tmp_path / "run")
    kept = shutil.copytree(checkpoints(folder)[0], folder / "checkpoints/step_mine")
    for name in ("step_00000001.7.tl_crosscoder.old", "step_00000015.7.tl_crosscoder.tmp"):
        (folder / f"checkpoints/.{name}").mkdir()
    (folder / ".metrics.jsonl.7.tl_crosscoder.tmp").write_text("half")
    trainer = new_trainer(taboo_pair, texts, folder, config=SHORT, resume=True)
    assert trainer.state.step == 10
    assert not [*folder.rglob(".*")]
    trainer.fit()
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_mine"]
    assert (kept / "state.json").is_file()


def test_a_complete_run_is_complete_whatever_is_left_of_its_checkpoints(
    taboo_pair, texts, unbroken, tmp_path
):
    folder = shutil.copytree(unbroken[0], tmp_path / "run")
    (folder / "checkpoints/step_00000040").mkdir(parents=True)
    trainer = new_trainer(taboo_pair, texts, folder, resume=True)
    assert_equal_bits(weights(trainer.fit()), unbroken[1])
    assert not (folder / "checkpoints").exists()


def test_metrics_that_have_lost_their_end_keep_whole_lines(stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    path = folder / "metrics.jsonl"
    first, *_ = whole = path.read_bytes().splitlines(keepends=True)
    assert len(whole) > 1
    path.write_bytes(first + whole[1][:9])
    state = TrainState(
        position=Position(),
        tokens_since_fired=torch.zeros(1, dtype=torch.int64),
        scales=(1.0,),
        metrics_bytes=5000,
    )
    MetricsLog(folder, replace(SHORT, batch_size=128), state)
    assert path.read_bytes() == first
    assert state.metrics_bytes == len(first)


def test_a_model_folder_that_was_trained_further_is_refused(
    taboo_pair, texts, tmp_path, monkeypatch
):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "notes.txt").write_text("not decisive")
    sites = tuple(replace(site, model_name=str(model)) for site in taboo_pair.sites)
    monkeypatch.setattr(type(taboo_pair), "sites", sites)
    new_trainer(taboo_pair, texts, tmp_path / "run").save()
    (model / "notes.txt").write_text("still not")
    new_trainer(taboo_pair, texts, tmp_path / "run", resume=True)
    (model / "model.safetensors").write_bytes(b"weights of another day")
    with pytest.raises(ValueError, match=r"another run: model_sha256\.base"):
        new_trainer(taboo_pair, texts, tmp_path / "run", resume=True)


def test_a_folder_with_another_run_is_refused_and_left_alone(taboo_pair, texts, unbroken):
    folder = unbroken[0]
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match="already holds a run"):
        new_trainer(taboo_pair, texts, folder)
    with pytest.raises(ValueError, match=r"training\.lr \(0.003 there, 0.5 now\)"):
        new_trainer(taboo_pair, texts, folder, config=changed(lr=0.5), resume=True)
    with pytest.raises(ValueError, match=r"text\.sha256"):
        new_trainer(taboo_pair, (texts[1], texts[1]), folder, resume=True)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_a_complete_run_is_loaded_instead_of_trained_again(taboo_pair, texts, unbroken):
    trainer = new_trainer(taboo_pair, texts, unbroken[0], resume=True)
    assert_equal_bits(weights(trainer.fit()), unbroken[1])


def test_a_run_that_saved_nothing_may_begin_anew_with_other_settings(taboo_pair, texts, tmp_path):
    """As after one whose batches were too large for the memory."""
    trainer = new_trainer(taboo_pair, texts, tmp_path / "run")
    trainer = new_trainer(taboo_pair, texts, tmp_path / "run", config=changed(lr=0.5))
    assert read_record(tmp_path / "run")["training"]["lr"] == 0.5
    trainer.save()
    with pytest.raises(ValueError, match="already holds a run"):
        new_trainer(taboo_pair, texts, tmp_path / "run")


def test_weights_that_are_not_those_of_the_record_are_refused(unbroken, tmp_path):
    folder = shutil.copytree(unbroken[0], tmp_path / "run")
    check_weights(folder, read_record(folder))
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="is damaged or was changed: its sha256"):
        check_weights(folder, read_record(folder))


def test_nothing_is_written_where_a_run_cannot_be(taboo_pair, texts, tmp_path):
    with pytest.raises(ValueError, match="k is 49, but the dictionary has only 48"):
        new_trainer(taboo_pair, texts, tmp_path / "run", recipe=preset("batchtopk", k=49))
    assert not (tmp_path / "run").exists()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not an empty folder and holds no run"):
        new_trainer(taboo_pair, texts, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_dead_latents_are_counted_in_tokens(taboo_pair, texts):  # spec: C9
    trainer = new_trainer(taboo_pair, texts)
    state = trainer.begin()
    with torch.no_grad():
        trainer.crosscoder.b_enc[5] = -1e6
    batches = trainer.loader.batches()
    for _ in range(4):
        trainer.step(next(batches)[0])
    assert state.tokens_since_fired[5] == 4 * 128
    assert not trainer.is_dead(state)[5]
    trainer.step(next(batches)[0])
    assert trainer.is_dead(state)[5]  # 640 tokens, the limit is 600
    assert state.tokens_since_fired.min() == 0


def test_by_default_latents_are_dead_after_a_tenth_of_the_run(taboo_pair, texts):
    """40 steps of 128 tokens: 512 tokens, and never a window that ends with the run."""
    trainer = new_trainer(taboo_pair, texts, config=changed(dead_after_tokens=None))
    fired = torch.tensor([511, 512])
    state = TrainState(position=Position(), tokens_since_fired=fired, scales=(1.0,))
    assert trainer.is_dead(state).tolist() == [False, True]


def test_site_scales_make_the_mean_squared_norm_the_width():  # spec: C4
    x = torch.randn(1000, 2, 8) * torch.tensor([[3.0], [0.1]])
    scaled = x * row_factors(scales_of_rows(x, PAIR), PAIR)
    torch.testing.assert_close(scaled.pow(2).sum(-1).mean(0), torch.full((2,), 8.0))


def test_the_penalty_warms_up_over_its_share_of_the_steps(taboo_pair, texts):
    recipe = preset("l1", coefficient=3.0, warm_up_share=0.25)
    sparsity = new_trainer(taboo_pair, texts, recipe=recipe).cfg.sparsity
    # A quarter of 40 steps: a tenth of it at the first one.
    weights = [sparsity.coefficients_at(step)["l1"] for step in (0, 4, 9, 39)]
    assert weights == pytest.approx([0.3, 1.5, 3.0, 3.0])


def test_metrics_go_to_wandb_too(taboo_pair, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = changed(wandb_project="test", n_tokens=256)
    new_trainer(taboo_pair, texts, tmp_path / "run", config=config).fit()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(taboo_pair, texts):
    """TopK selects token by token, so that parts of a batch choose as the batch does.

    Without a bound of the gradient's norm, which would hide a factor between them.
    """
    trained = []
    for n in (1, 4):
        config = replace(CONFIG, n_accumulated=n, max_grad_norm=1e9)
        trainer = new_trainer(taboo_pair, texts, config=config, recipe=preset("topk", k=4))
        batch, _ = next(trainer.loader.batches())
        trainer.step(batch)
        trained.append((dict(trainer.crosscoder.named_parameters()), trainer.state))
    (whole, state), (parts, state_of_parts) = trained
    for name, parameter in whole.items():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(
            parts[name].grad, parameter.grad, rtol=1e-3, atol=1e-4 * scale, msg=name
        )
    assert torch.equal(state.tokens_since_fired, state_of_parts.tokens_since_fired)
