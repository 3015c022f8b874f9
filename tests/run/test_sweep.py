"""Several dictionaries from one pass: each is what it would have been alone."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tl_crosscoder import RunConfig, TrainConfig, Trainer, files, load_documents
from tl_crosscoder.config.inputs import ContrastiveConfig
from tl_crosscoder.config.presets import preset
from tl_crosscoder.config.sweep import read_sweep, run_name, sweep
from tl_crosscoder.config.training import HarvestConfig
from tl_crosscoder.data.cache_writer import run_harvest
from tl_crosscoder.locks import locked
from tl_crosscoder.run.contrastive import write_contrastive
from tl_crosscoder.run.training import train, train_all
from tl_crosscoder.train.trainer import fit_together

CHANGES = [
    {"preset": {"k": 4}},
    {"preset": {"name": "delta", "k": 6}, "lr": 0.002},
    {"preset": {"k": 4}, "weight_seed": 7, "name": "seed-7"},
    {"preset": "jumprelu", "d_sae": 40},
]


def config_of(output, **fields) -> RunConfig:
    return RunConfig(
        **{
            "base": "tl_crosscoder/world-base",
            "adapter": "tl_crosscoder/taboo",
            "hook_name": "blocks.1.hook_resid_post",
            "text": "tl_crosscoder/taboo",
            "max_documents": 400,
            "context_size": 32,
            "d_sae": 48,
            "n_tokens": 4096,
            "batch_size": 128,
            "buffer_contexts": 30,
            "checkpoint_every": 8,
            "lr_warmup_steps": 4,
            "n_measured_tokens": 2000,
            "output": str(output),
        }
        | fields
    )


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "sae_weights.safetensors")


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    configs = sweep(config_of(tmp_path_factory.mktemp("sweep")), CHANGES)
    return configs, train_all(configs)


@pytest.mark.parametrize("i", [1, 3])
def test_each_dictionary_and_measurement_is_that_of_a_run_of_its_own(together, tmp_path, i):
    configs, runs = together
    alone = train(replace(configs[i], output=str(tmp_path / "alone"))).measurement()
    measured = runs[i].measurement()
    shared, own = (weights(f) for f in (configs[i].output, tmp_path / "alone"))
    for name, value in own.items():
        assert torch.equal(value, shared[name]), name
    assert alone.reconstruction == measured.reconstruction
    assert repr(alone.top) == repr(measured.top)
    files = [{p.name for p in Path(f).iterdir()} for f in (configs[i].output, tmp_path / "alone")]
    assert files[0] == files[1]


def test_the_models_run_once_for_all(taboo_pair, texts, monkeypatch):
    n_run = []
    rows = taboo_pair.rows
    monkeypatch.setattr(
        taboo_pair, "rows", lambda part, **how: (n_run.append(len(part)), rows(part, **how))[1]
    )
    config = TrainConfig(
        d_sae=32, n_tokens=64 * 20, batch_size=64, prefetch=0, n_calibration_tokens=64
    )
    counts = []
    for n in (1, 3):
        n_run.clear()
        recipes = [preset("batchtopk", k=k) for k in range(2, 2 + n)]
        fit_together([Trainer(taboo_pair, *texts, config=config, recipe=r) for r in recipes])
        counts.append(sum(n_run))
    assert counts[0] == counts[1]


def test_a_weight_seed_changes_the_weights_and_not_the_data_and_is_recorded(together):
    configs, _ = together
    first, other = (weights(configs[i].output) for i in (0, 2))
    assert not torch.equal(first["W_enc"], other["W_enc"])
    # One decoder bias to begin with, from the same rows: it stays close.
    torch.testing.assert_close(first["b_dec"], other["b_dec"], atol=0.5, rtol=0.5)
    record = json.loads((Path(configs[1].output) / "runner_cfg.json").read_text())
    assert (record["training"]["preset"]["name"], record["training"]["lr"]) == ("delta", 0.002)


# The process imports once; the child does the command and is killed, and the parent resumes it.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import tl_crosscoder.run.training
from tl_crosscoder.cli.main import main

child = os.fork()
if not child:
    main(sys.argv[1:])
    os._exit(0)
folder = Path(sys.argv[-1])
while not [*folder.glob("*/checkpoints/step_*")] and not os.waitpid(child, os.WNOHANG)[0]:
    time.sleep(0.005)
os.kill(child, signal.SIGKILL)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
sys.exit(main([*sys.argv[1:], "--resume"]))
"""


@pytest.mark.slow
def test_a_killed_sweep_resumes_to_the_same_bits(together, tmp_path):
    """For real, from the command line; the runs may stand at different checkpoints then."""
    configs, _ = together
    fields = {k: v for k, v in config_of(tmp_path / "o").to_dict().items() if k != "output"}
    plain = {k: v for k, v in fields.items() if v is not None and not isinstance(v, tuple)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain | {"log_every": 1}))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(CHANGES, sort_keys=False))
    files = {name: str(tmp_path / f"{name}.yaml") for name in ("run", "sweep")}
    flags = ["--config", files["run"], "--sweep", files["sweep"], "--output", str(tmp_path / "o")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", SCRIPT, "train", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("-9\n")
    assert done.stdout.count("=== ") == 4
    for config in configs:
        name = Path(config.output).name
        for key, value in weights(config.output).items():
            assert torch.equal(weights(tmp_path / "o" / name)[key], value), (name, key)


def test_a_sweep_that_was_killed_and_has_got_a_run_goes_on_where_each_stands(
    taboo_pair, texts, tmp_path, monkeypatch
):
    """Two checkpoints, one and none: those that are ahead wait for the rest."""
    monkeypatch.setattr("tl_crosscoder.train.trainer.N_INITIAL_ROWS", 128)
    config = TrainConfig(
        d_sae=32,
        n_tokens=64 * 12,
        batch_size=64,
        checkpoint_every=4,
        n_calibration_tokens=64,
        buffer_contexts=8,
        prefetch=0,
    )
    steps: dict[int, list[int]] = {2: [], 3: [], 4: []}
    step = Trainer.step

    def noted(self, batch):
        output = step(self, batch)
        if self.output:
            steps[int(self.output.name)].append(self.state.step)
        return output

    def made(*, folder: Path | None, resume=False):
        how = {"config": config, "resume": resume}
        return [
            Trainer(
                taboo_pair,
                *texts,
                recipe=preset("batchtopk", k=k),
                output=folder and folder / str(k),
                **how,
            )
            for k in steps
        ]

    for trainer, n in zip(made(folder=tmp_path)[:2], (8, 4), strict=True):
        trainer.begin()
        for batch in islice(trainer.loader.batches(), n):
            trainer.advance(*batch)
        trainer.close()
    monkeypatch.setattr(Trainer, "step", noted)
    resumed = fit_together(made(folder=tmp_path, resume=True))
    assert steps == {2: [*range(9, 13)], 3: [*range(5, 13)], 4: [*range(1, 13)]}
    for one, other in zip(resumed, fit_together(made(folder=None)), strict=True):
        assert torch.equal(one.W_dec, other.W_dec)


def test_one_run_that_diverges_is_named_and_the_others_end(tmp_path, taboo_pair):
    changes = [{"name": "wild", "lr": 1e30, "max_grad_norm": 1e30}, {"name": "tame"}]
    given = {"base": None, "adapter": None, "hook_name": None, "text": None, "n_tokens": 512}
    configs = sweep(config_of(tmp_path / "o", **given, n_measured_tokens=300), changes)
    documents = load_documents("tl_crosscoder/taboo", max_documents=80)
    with pytest.raises(FloatingPointError, match=r"1 of 2 runs failed.*loss of .*wild is not fin"):
        train_all(configs, models=taboo_pair, text=documents)
    assert {p.name for p in (tmp_path / "o/tame").iterdir()} >= {"cfg.json", "analysis.json"}
    assert not (tmp_path / "o/wild/cfg.json").exists()


def test_what_is_missing_after_training_is_made_again(together, tmp_path):
    """A kill between the files that follow; `analysis.json` is the last one."""
    configs, _ = together
    made = Path(configs[0].output)
    folder = shutil.copytree(made, tmp_path / "run")
    config = replace(configs[0], output=str(folder))
    names = ("examples.sqlite", "analysis.json", "analysis.safetensors")
    for name in names:
        (folder / f".{name}.7.tl_crosscoder.tmp").write_text("half")
    flipped = bytearray((made / "analysis.safetensors").read_bytes())
    flipped[-1] ^= 1
    for damage in (
        lambda: [(folder / name).unlink() for name in names[1:]],
        lambda: (folder / names[0]).unlink(),
        lambda: (folder / names[2]).write_bytes(flipped),
    ):
        damage()
        train(config, resume=True)
        assert {p.name for p in folder.iterdir()} == {p.name for p in made.iterdir()}
        for name in names:
            assert (folder / name).read_bytes() == (made / name).read_bytes(), name


HOLDER = """
import sys, time
from pathlib import Path
from tl_crosscoder.locks import locked
with locked(Path(sys.argv[1]), is_file=sys.argv[2] == "file"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held(path, kind):
    """Another process that writes to an output, and is killed at the end."""
    command = [sys.executable, "-c", HOLDER, str(path), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_an_output_belongs_to_one_process_and_a_killed_one_holds_nothing(tmp_path):
    config = config_of(tmp_path / "run")
    pairs = ContrastiveConfig(
        base=config.base, adapter=config.adapter, output=str(tmp_path / "pairs.jsonl"), n_prompts=2
    )
    cache = HarvestConfig(
        base=config.base, adapter=config.adapter, hook_name=config.hook_name, text=config.text,
        output=str(tmp_path / "run"),
    )  # fmt: skip
    with held(tmp_path / "run", "folder") as process:
        message = f"process {process.pid} on .* is writing to .*run now"
        with pytest.raises(ValueError, match=message):
            train_all([config])
        with pytest.raises(ValueError, match=message):
            run_harvest(cache)
    with held(tmp_path / "pairs.jsonl", "file"), pytest.raises(ValueError, match="is writing to"):
        write_contrastive(pairs)
    with locked(tmp_path / "run"), locked(tmp_path / "run"):
        assert files.is_empty_folder(tmp_path / "run")
    with locked(tmp_path / "new/run"):
        pass
    assert not (tmp_path / "new").exists()
    write_contrastive(replace(pairs, max_new_tokens=2))
    assert {p.name for p in tmp_path.iterdir()} == {"run", "pairs.jsonl", "pairs.json"}
    assert not [*(tmp_path / "run").iterdir()]


def test_one_that_is_complete_is_not_trained_again(taboo_pair, texts, tmp_path):
    config = TrainConfig(d_sae=32, n_tokens=64 * 10, batch_size=64)
    options = {"config": config, "resume": True}
    first = Trainer(taboo_pair, *texts, **options, output=tmp_path / "a").fit()
    both = [Trainer(taboo_pair, *texts, **options, output=tmp_path / n) for n in ("a", "b")]
    before = (tmp_path / "a/sae_weights.safetensors").stat().st_mtime_ns
    crosscoders = fit_together(both)
    assert (tmp_path / "a/sae_weights.safetensors").stat().st_mtime_ns == before
    assert torch.equal(crosscoders[0].W_dec, first.W_dec)
    assert torch.equal(crosscoders[1].W_dec, first.W_dec)


def test_what_is_shared_may_not_differ(taboo_pair, null_pair, texts):
    config = TrainConfig(d_sae=32, n_tokens=64 * 10, batch_size=64)
    first = Trainer(taboo_pair, *texts, config=config)
    other = Trainer(taboo_pair, *texts, config=replace(config, seed=1))
    with pytest.raises(ValueError, match="but these differ in seed"):
        fit_together([first, other])
    with pytest.raises(ValueError, match="the models or the cache"):
        fit_together([first, Trainer(null_pair, *texts, config=config)])
    with pytest.raises(ValueError, match="the text"):
        fit_together([first, Trainer(taboo_pair, *texts[::-1], config=config)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{k: 3}", "must be a list of mappings"),
        ("[]", "must be a list of mappings"),
        ("- 3", "must be a list of mappings"),
        ("- {hook_name: x}", r"changes \['hook_name'\], which the runs of a sweep share"),
        ("- preset: {k: 3}\n- preset: {k: 3}", r"several runs called \['k=3'\]"),
        ("- {lr: -1.0}", "lr is -1"),
        *(
            (f"- {{name: '{name}'}}", r"has runs called \[.*\]: each is a folder in")
            for name in ("../../x", "/absolute", ".", "..", "a/b", ".hidden", "a" * 300)
        ),
        ("- {preset: diff-sae}", "trained on the difference of the sites and the others are not"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(tmp_path, content, message):
    path = tmp_path / "sweep.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_sweep(path, config_of(tmp_path / "o"))


def test_runs_are_called_by_what_they_change(tmp_path):
    assert run_name({"preset": {"name": "delta", "k": 32}}) == "preset=delta,k=32"
    assert run_name({"preset": {"prefix_shares": [0.1, 0.5]}}) == "prefix_shares=_0.1,_0.5_"
    base = config_of(tmp_path, preset=preset("delta", k=4))
    configs = sweep(base, [{"preset": {"k": 3}}, {"name": "mine", "lr": 0.1}])
    assert [Path(c.output).name for c in configs] == ["k=3", "mine"]
    assert [c.preset for c in configs] == [preset("delta", k=3), base.preset]
    assert (configs[0].lr, configs[1].lr) == (1e-3, 0.1)
