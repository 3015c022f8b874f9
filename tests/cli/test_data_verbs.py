"""`harvest`, `inspect`, `contrastive` and `train` on what they make, as a user types them."""

import json
import re

import pytest
import yaml
from cli.small_run import BASE, HOOK, error_of, flags, printed

from tl_crosscoder import Crosscoder
from tl_crosscoder.cli.main import main
from tl_crosscoder.config.training import HarvestConfig
from tl_crosscoder.data.cache_writer import run_harvest
from tl_crosscoder.interventions.layer_scan_result import LayerScan
from tl_crosscoder.run.null import run_config
from tl_crosscoder.run.run import Run

MODELS = [*BASE, "--adapter", "tl_crosscoder/taboo"]
TEXT = ["--text", "tl_crosscoder/taboo", "--max-documents", "400", "--context-size", "32"]
DATA = [*MODELS, *HOOK, *TEXT]
SMALL = flags({"d_sae": 48, "k": 4, "n_tokens": 4096, "batch_size": 128, "n_measured_tokens": 1000})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "cache"
    size = ["--n-tokens", "9000", "--shard-tokens", "2000", "--output", str(folder)]
    assert main(["harvest", *DATA, *size]) == 0
    return folder


def test_inspect_prints_what_a_cache_holds(cache, capsys):
    assert main(["inspect", str(cache), "--verify"]) == 0
    out = capsys.readouterr().out
    assert re.search("finetuned .*tl_crosscoder/taboo .*blocks.1.hook_resid_post", out)
    n_tokens = int(re.search(r"tokens +([\d,]+) in", out)[1].replace(",", ""))
    assert 8900 <= n_tokens < 9100
    for expected in ("bfloat16", "bytes a token", "masked", "assistant", "first positions", "RMS"):
        assert expected in out


def test_train_measures_and_analyzes_on_a_cache_without_the_models(
    cache, tmp_path, capsys, monkeypatch
):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("tl_crosscoder.models.pair.ModelPair.from_sites", refuse)
    output = tmp_path / "run"
    assert main(["train", "--cache", str(cache), *SMALL, "--output", str(output)]) == 0
    printed = capsys.readouterr()
    assert "FVE of the" in printed.out
    assert "What changed was not found out: the models are not loaded." in printed.err
    assert Crosscoder.load(output).cfg.d_sae == 48
    assert main(["analyze", str(output)]) == 0
    saved = capsys.readouterr().out
    assert main(["analyze", str(output), "--fresh"]) == 0
    assert capsys.readouterr().out == saved
    capsys.readouterr()
    again = ["train", "--cache", str(cache), *SMALL, "--output", str(output), "--resume"]
    assert main([*again, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert "FVE of the" in quiet.out
    assert quiet.err.startswith("What changed was not found out")  # and nothing before it
    # A null pair is of the models and the text that the cache was made of.
    null = run_config(Run(path=output), text=None, output=tmp_path / "null")
    assert (null.base, null.cache, null.d_sae) == (MODELS[1], None, 48)
    assert (null.text, null.max_documents) == (TEXT[1], 400)


def test_scan_recommends_a_hook_point_and_draws_it(tmp_path, capsys):
    """From a run's file, of which hook point, output and dictionary are left out."""
    run = dict(zip(("base", "adapter", "text"), (MODELS[1], MODELS[3], TEXT[1]), strict=True))
    run |= {"max_documents": 60, "d_sae": 48, "output": "run", "hook_name": HOOK[1]}
    path, output = tmp_path / "run.yaml", tmp_path / "scan"
    path.write_text(yaml.safe_dump(run))
    args = ["--config", path, "--output", output, "--n-prompts", 4, "--layers", 1, 2]
    out = printed(capsys, "scan", *args)
    found = LayerScan.load(output / "layer_scan.json")
    assert out.startswith(str(found))
    assert [row.layer for row in found.rows] == [1, 2]
    assert found.text["n_contexts"] == 4
    assert out.rstrip().endswith(f"Saved in {output}: layer_scan.json, layer_scan.html")
    assert "Where the change passes" in (output / "layer_scan.html").read_text()
    assert not (tmp_path / "run").exists()
    assert "no text was given" in error_of(capsys, "scan", *MODELS)
    assert "exactly one of finetuned" in error_of(capsys, "scan", *BASE, *TEXT)


def test_one_file_serves_harvest_and_training(tmp_path, capsys):
    """The run's file with --output for the cache; then the same file with --cache."""
    run = dict(zip(("base", "adapter", "hook_name", "text"),
                   (MODELS[1], MODELS[3], HOOK[1], TEXT[1]), strict=True))  # fmt: skip
    run |= {"max_documents": 400, "context_size": 32, "n_first": 2, "n_tokens": 4096}
    run |= {
        "d_sae": 48,
        "batch_size": 128,
        "preset": {"name": "delta", "k": 4},
        "output": str(tmp_path / "run"),
    }
    path, cache = tmp_path / "run.yaml", tmp_path / "cache"
    path.write_text(yaml.safe_dump(run))
    harvest = HarvestConfig.from_yaml(path, default={"output": str(cache)})
    assert (harvest.output, harvest.n_first, harvest.n_tokens) == (str(cache), 2, 4096)
    run_harvest(harvest)
    assert main(["train", "--config", str(path), "--cache", str(cache)]) == 0
    assert "FVE of the" in capsys.readouterr().out


def test_a_diff_sae_trains_on_the_cache_of_the_pair(cache, tmp_path, capsys):
    args = ["--cache", str(cache), *SMALL, "--output", str(tmp_path / "run")]
    assert main(["train", "diff-sae", *args]) == 0
    assert "FVE" in capsys.readouterr().out
    assert main(["analyze", str(tmp_path / "run"), "--fresh"]) == 0


def test_a_cache_must_be_of_what_the_run_asks_for(cache, tmp_path, capsys):
    run = ["train", "--cache", cache, *SMALL, "--output", tmp_path / "run"]
    other = ["--adapter", "tl_crosscoder/false-fact"]
    error = error_of(capsys, *run, *MODELS[:2], *other, *HOOK)
    assert "holds activations of" in error
    assert "tl_crosscoder/world-base with tl_crosscoder/false-fact at blocks.1" in error
    layer = ["--hook-name", "blocks.2.hook_resid_post"]
    assert "at blocks.2.hook_resid_post" in error_of(capsys, *run, *MODELS, *layer)
    text = [*TEXT[:2], "--max-documents", "300"]
    assert "max_documents (400 there, 300 asked for)" in error_of(capsys, *run, *text)
    assert "dtype ('float32' there" in error_of(capsys, *run, "--dtype", "bfloat16")
    template = error_of(capsys, *run, *TEXT, "--drop-template")
    assert "drop_template (False there, True asked for)" in template
    missing = ["train", "--cache", tmp_path / "no", *SMALL, "--output", tmp_path / "run"]
    assert "is not an activation cache" in error_of(capsys, *missing)
    path = cache / "shards/00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "00001.safetensors is damaged" in error_of(capsys, *run)
    path.write_bytes(content)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--text": "COLUMN"}, "has no column 'text'"),
        ({"--text": "IDS"}, "holds token ids from "),
        ({"--hook-name": "blocks.9.hook_resid_post"}, "is not in the base model"),
    ],
)
def test_bad_input_to_a_harvest_is_refused_and_nothing_written(change, message, tmp_path, capsys):
    made = {"COLUMN": {"body": "x"}, "IDS": {"input_ids": [3, 99_999]}}
    given = dict(zip(DATA[::2], DATA[1::2], strict=True)) | change
    if given["--text"] in made:
        path = tmp_path / "text.jsonl"
        rows = ({**made[given["--text"]], "input_ids": [i, 99_999]} for i in (3, 4, 5))
        lines = rows if given["--text"] == "IDS" else [made["COLUMN"]] * 3
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        given["--text"] = path
    output = tmp_path / "cache"
    every = [x for pair in given.items() for x in pair]
    assert message in error_of(capsys, "harvest", *every, "--output", output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--n-first", "32", "which leaves nothing"),
        ("--max-norm-multiple", "0.5", "max_norm_multiple is 0.5"),
        ("--n-tokens", "0", "n_tokens is 0"),
    ],
)
def test_values_that_cannot_be_are_refused(flag, value, message, tmp_path, capsys):
    assert message in error_of(capsys, "harvest", *DATA, flag, value, "--output", tmp_path / "c")


def test_a_template_that_is_missing_is_named(tmp_path, capsys, shared_models):
    path = tmp_path / "chats.jsonl"
    answer = {"role": "assistant", "content": "Yes."}
    chats = [[{"role": "user", "content": f"Hello {i}."}, answer] for i in range(30)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    model = str(shared_models / "stories260K")
    args = ["--base", model, "--finetuned", model, *HOOK, "--text", path]
    error = error_of(capsys, "harvest", *args, "--output", tmp_path / "c")
    assert "the tokenizer has no chat template" in error


def test_a_mixture_with_contrastive_text_from_one_file(tmp_path, capsys):
    """The whole path: contrastive pairs, a mixture of three, masks, a run, a measurement."""
    pairs = tmp_path / "pairs.jsonl"
    size = ["--n-prompts", "24", "--max-new-tokens", "16", "--batch-size", "24"]
    assert main(["contrastive", *MODELS, *size, "--output", str(pairs)]) == 0
    capsys.readouterr()
    run = {
        "base": MODELS[1], "adapter": MODELS[3], "hook_name": HOOK[1], "context_size": 32,
        "n_first": 2, "drop_template": True, "max_norm_multiple": 4, "held_out": 0.2,
        "mixture": [
            {"text": "tl_crosscoder/taboo", "name": "world", "weight": 0.7, "max_documents": 600},
            {"text": str(pairs), "weight": 0.3},
        ],
    }  # fmt: skip
    output = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run | {"output": str(output)}))
    flags = ["--config", str(tmp_path / "run.yaml"), "--no-changes"]
    assert main(["train", *flags, *SMALL]) == 0
    described = json.loads((output / "runner_cfg.json").read_text())["text"]
    by_source = described["tokens_by_source"]
    assert set(by_source) == {"world", "contrastive-base", "contrastive-finetuned"}
    assert by_source["contrastive-base"] > 0
    assert described["tokens_by_mask"]["template"] > 0
    assert "template" not in described["tokens_by_role"]
    assert len(described["norm_limits"]) == 2
    capsys.readouterr()
    assert main(["analyze", str(output)]) == 0
    saved = capsys.readouterr().out
    assert main(["analyze", str(output), "--fresh"]) == 0
    assert capsys.readouterr().out == saved


def test_dry_runs_say_what_it_takes_and_do_nothing(tmp_path, capsys):
    assert main(["train", *DATA, *SMALL, "--output", str(tmp_path / "o"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for expected in ("memory:", "disk:", "FLOP", "48 latents"):
        assert expected in out
    assert main(["harvest", *DATA, "--output", str(tmp_path / "o"), "--dry-run"]) == 0
    assert "cache" in capsys.readouterr().out
    assert not (tmp_path / "o").exists()


def test_without_models_text_or_cache_it_says_what_to_give(tmp_path, capsys):
    output = ["--output", tmp_path / "o"]
    assert "or a cache of their activations (--cache)" in error_of(capsys, "train", *output)
    assert "no text was given" in error_of(capsys, "train", *MODELS, *HOOK, *output)
