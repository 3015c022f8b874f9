"""A small run, and a judge on this machine."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from judge_server import JudgeServer, serving

from tl_crosscoder.cli.main import main
from tl_crosscoder.organisms import training_documents

FIELDS = {
    "base": "tl_crosscoder/world-base", "adapter": "tl_crosscoder/taboo",
    "hook-name": "blocks.1.hook_resid_post", "d-sae": 40, "k": 4, "n-tokens": 2048,
    "batch-size": 128, "context-size": 32, "lr": 0.003, "lr-warmup-steps": 5,
    "buffer-contexts": 30,
}  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("handoff")
    text = folder / "text.jsonl"
    documents = training_documents("taboo", 200, seed=0)
    text.write_text("".join(json.dumps(d) + "\n" for d in documents))
    fields = [x for name, value in FIELDS.items() for x in (f"--{name}", str(value))]
    output = folder / "run"
    assert main(["train", *fields, "--text", str(text), "--output", str(output)]) == 0
    return output


@pytest.fixture
def run_folder(trained, tmp_path) -> Path:
    """A copy that a test may write to."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def server(monkeypatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with serving() as state:
        yield state
