"""The page on data runs as it stands, in an empty folder, with fewer tokens."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import tl_crosscoder
from tl_crosscoder import RunConfig, TextSource
from tl_crosscoder.cli.main import main, parse
from tl_crosscoder.config.sweep import sweep

FOLDER = Path(__file__).parents[2] / "docs"
PAGE = (FOLDER / "data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_its_commands_and_its_python_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    for line in lines:
        program, *arguments = shlex.split(line.replace("500000", "6000"))
        assert program == "tl-crosscoder"
        small = ["--max-documents", "400"] if arguments[0] == "harvest" else []
        small += ["--d-sae", "64"] if arguments[0] == "train" else []
        small += ["--max-new-tokens", "16"] if arguments[0] == "contrastive" else []
        assert main([*arguments, *small]) == 0, line
    out = capsys.readouterr().out
    assert "Activations in cache" in out
    assert "FVE of the difference" in out
    (code,) = blocks("python")
    exec(compile(code, "data.md", "exec"), {})
    assert "contrastive-base" in capsys.readouterr().out


def test_its_yaml_is_a_mixture_and_a_sweep():
    mixture, changes = (yaml.safe_load(block) for block in blocks("yaml"))
    sources = [TextSource.from_mapping(m, name="data.md") for m in mixture["mixture"]]
    assert sum(s.weight for s in sources) == pytest.approx(1)
    run = RunConfig(base="b", finetuned="f", hook_name="h", text="t", output="o")
    assert len(sweep(run, changes)) == 3


def test_what_it_names_is_there(capsys):
    flags = set()
    for verb in ("train", "harvest", "contrastive"):
        with pytest.raises(SystemExit):
            parse([verb, "--help"])
        flags |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGE)) <= flags
    assert set(re.findall(r"\btlc\.(\w+)", PAGE)) <= set(tl_crosscoder.__all__)
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", PAGE):
        assert (FOLDER / link).is_file(), link
    for name in re.findall(r"`(\w+)\(", PAGE):
        assert hasattr(tl_crosscoder, name) or name == "ActivationLoader", name
