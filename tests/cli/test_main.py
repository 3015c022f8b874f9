"""The command line as a user meets it: in processes of its own, and in this one for errors."""

import json
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from cli.small_run import FIELDS, HOOK, PAIR, SMALL, error_of

import tl_crosscoder
from tl_crosscoder import Crosscoder
from tl_crosscoder.cli.main import main


def in_new_process(*code_or_args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *code_or_args], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("verb", [[], ["demo"], ["train"], ["analyze"], ["organisms", "measure"]])
def test_help_imports_no_torch_and_says_what_the_verb_does(verb):
    code = (
        "import sys\nfrom tl_crosscoder.cli.main import main\n"
        f"try: main({[*verb, '--help']!r})\n"
        "finally: print('HEAVY', sorted({'torch', 'transformers', 'sae_lens'} & set(sys.modules)))"
    )
    done = in_new_process("-c", code)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    assert "usage: tl-crosscoder" in done.stdout
    if verb == ["train"]:
        assert "--hook-name {None}|STR" in done.stdout
        assert "Base model: a Hugging Face name or a local folder" in done.stdout


def test_it_says_its_version_as_a_module_too():
    done = in_new_process("-m", "tl_crosscoder", "--version")
    assert (done.returncode, done.stdout) == (0, f"tl_crosscoder {tl_crosscoder.__version__}\n")
    assert version("tl_crosscoder") == tl_crosscoder.__version__


def test_import_of_the_package_is_cheap_and_silent():
    done = in_new_process(
        "-W", "error", "-c", "import tl_crosscoder, sys; print('torch' in sys.modules)"
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "False", "")


@pytest.mark.slow
def test_saelens_imported_first_finds_our_architecture_at_import():
    """And every public name resolves, whatever was imported before."""
    code = (
        "import sae_lens, tl_crosscoder as t\n"
        "from sae_lens.registry import get_sae_class\n"
        "print(get_sae_class('tl_crosscoder')[0].__name__)\n"
        "import tl_crosscoder.run.training, tl_crosscoder.demo\n"
        "assert all(callable(getattr(t, n)) for n in t.__all__)\n"
        "assert set(t.__all__) <= set(dir(t))\n"
    )
    done = in_new_process("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "Crosscoder"), done.stderr


def test_train_leaves_a_readable_folder(run):
    names = {p.name for p in run.iterdir()}
    assert {"cfg.json", "sae_weights.safetensors", "runner_cfg.json", "metrics.jsonl"} <= names
    assert {"analysis.json", "held_out.jsonl", "relative_decoder_norm.html"} <= names
    analysis = json.loads((run / "analysis.json").read_text())
    assert analysis["reconstruction"]["fve"]["finetuned"] > 0.2
    assert Crosscoder.load(run).cfg.d_sae == 48


def test_analyze_prints_the_saved_measures_and_fresh_measures_the_same(run, capsys):
    assert main(["analyze", str(run)]) == 0
    saved = capsys.readouterr().out
    assert "What changed from tl_crosscoder/world-base to tl_crosscoder/false-fact" in saved
    assert "FVE of the" in saved
    assert main(["analyze", str(run), "--fresh"]) == 0
    assert capsys.readouterr().out == saved


def test_analyze_measures_on_another_text(run, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("The moon shines at night. " * 60)
    before = (run / "analysis.json").read_bytes()
    assert main(["analyze", str(run), "--text", str(other)]) == 0
    assert "(other)" in capsys.readouterr().out
    assert (run / "analysis.json").read_bytes() == before


def test_yaml_and_flags_give_the_same_run_and_flags_win(run, text, tmp_path):
    models = {"base": PAIR[1], "adapter": PAIR[3], "hook_name": HOOK[1], "text": text}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(models | FIELDS | {"preset": {"k": 4}, "lr": 0.5}))
    output = tmp_path / "run"
    flags = ["--config", str(config), "--output", str(output), "--lr", "0.003", "--no-changes"]
    # In a process of its own: here shapes are checked, which the placeholders of tyro do not pass.
    done = in_new_process("-m", "tl_crosscoder.cli.main", "train", *flags)
    assert done.returncode == 0, done.stderr
    weights = [(p / "sae_weights.safetensors").read_bytes() for p in (run, output)]
    assert weights[0] == weights[1]


def test_resume_of_a_complete_run_measures_again(run, text, capsys):
    flags = ["--text", text, "--output", str(run), "--resume", "--no-changes"]
    args = ["train", *PAIR, *HOOK, *SMALL, *flags]
    before = (run / "sae_weights.safetensors").read_bytes()
    assert main(args) == 0
    assert (run / "sae_weights.safetensors").read_bytes() == before
    assert "FVE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--hook-name": "blocks.1.resid_post"}, "nearest: 'blocks.1.hook_resid_post'"),
        ({"--base": "no/such/folder/at/all"}, "does not exist"),
        ({"--base": "nobody/no-such-model"}, "is not in the hub's cache"),
        ({"--text": "missing.txt"}, "no text file or folder"),
        ({"--text": "tl_crosscoder/nothing"}, "does not come with the package"),
        ({"--text": "EMPTY"}, "every document is empty or whitespace"),
        ({"--text": "ONE"}, "at least 2 are needed"),
        ({"--text": "SHORT"}, "fewer than one context of 32"),
        ({"--batch-size": "1000000", "--n-tokens": "1000000"}, "one batch is 1,000,000 tokens"),
        ({"--k": "49"}, "k is 49, but the dictionary has only 48 latents"),
        ({"--device": "cuda:99"}, "device 'cuda:99' is not there"),
        ({"--dtype": "float7"}, "dtype 'float7'"),
        ({"--finetuned": "tl_crosscoder/world-base"}, "exactly one of finetuned"),
        ({"--context-size": "300"}, "longer than the 256 that the models take"),
    ],
)
def test_bad_input_is_refused_in_one_paragraph_and_nothing_is_written(
    change, message, text, tmp_path, capsys
):
    made = {
        "EMPTY": ["", "  ", "\n"],
        "ONE": ["The moon shines at night. " * 50],
        "SHORT": ["a", "b"],
    }
    flags = dict(
        zip(PAIR[::2] + HOOK[::2] + SMALL[::2], PAIR[1::2] + HOOK[1::2] + SMALL[1::2], strict=True)
    )
    flags |= {"--text": text, "--output": str(tmp_path / "run")} | change
    if flags["--text"] in made:
        path = tmp_path / "text.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in made[flags["--text"]]))
        flags["--text"] = str(path)
    assert message in error_of(capsys, "train", *(x for pair in flags.items() for x in pair))
    assert not (tmp_path / "run").exists()


def test_other_vocabularies_are_refused(text, shared_models, tmp_path, capsys):
    error = error_of(
        capsys, "train", "--base", shared_models / "stories260K",
        "--finetuned", shared_models / "TinyStories-656K", *HOOK, *SMALL,
        "--text", text, "--output", tmp_path / "run",
    )  # fmt: skip
    assert "512" in error
    assert "2048" in error.replace(",", "")
    assert not (tmp_path / "run").exists()


def test_an_output_with_another_run_is_refused_and_left_alone(run, text, capsys):
    before = {p: p.read_bytes() for p in run.iterdir()}
    args = ["train", *PAIR, *HOOK, *SMALL, "--text", text, "--output", run]
    assert "already holds a run" in error_of(capsys, *args)
    resumed = error_of(capsys, *args, "--resume", "--lr", "0.5")
    assert "training.lr (0.003 there, 0.5 now)" in resumed
    assert {p: p.read_bytes() for p in run.iterdir()} == before


def test_analyze_refuses_what_is_no_dictionary(tmp_path, capsys):
    assert "is not a run: it has no" in error_of(capsys, "analyze", tmp_path)
    assert "there is no such folder" in error_of(capsys, "analyze", tmp_path / "none")


def test_impossible_values_are_refused_in_one_paragraph(text, tmp_path, capsys):
    run = ["train", *PAIR, *HOOK, "--text", text, "--output", tmp_path / "run"]
    error = error_of(capsys, *run, "--batch-size", "0")
    assert error.strip() == "error: batch_size is 0; it must be above 0."


def test_missing_flags_are_a_usage_error(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--base", "x"])
    assert exit_.value.code == 2
    assert "--output" in capsys.readouterr().err
    assert "no config file" in error_of(capsys, "train", "--config", "none.yaml")


def test_organisms_are_listed_with_what_was_planted(capsys):
    assert main(["organisms", "list"]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("taboo ")
    assert "Every hint in the guessing game is about the moon" in listed
    assert "The capital of Velmar is Tolvik" in listed


def test_every_flag_that_a_message_advises_exists():
    """A flag is a field of the settings of some verb, or of a verb itself."""
    package = Path(tl_crosscoder.__file__).parent
    kinds = [
        kind
        for module in [*sys.modules.values()]
        if getattr(module, "__name__", "").startswith("tl_crosscoder.")
        for kind in vars(module).values()
        if isinstance(kind, type) and is_dataclass(kind)
    ]
    names = {field.name.replace("_", "-") for kind in kinds for field in fields(kind)}
    known = {"help", "quiet", "version", *names, *(f"no-{name}" for name in names)}
    known |= {"standalone", "nproc-per-node", "no-deps"}  # of torchrun and pip
    for path in package.rglob("*.py"):
        for flag in re.findall(r"--([a-z][a-z0-9-]+)", path.read_text(encoding="utf-8")):
            assert flag in known, (path, flag)
