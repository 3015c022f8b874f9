"""A small run, and a judge on this machine."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from judge_server import JudgeServer, serving

from tl_crosscoder import RunConfig, load_documents, preset
from tl_crosscoder.run.run import Run
from tl_crosscoder.run.training import train

CONFIG = {
    "base": "tl_crosscoder/world-base", "adapter": "tl_crosscoder/taboo",
    "hook_name": "blocks.1.hook_resid_post", "d_sae": 40, "n_tokens": 2048,
    "preset": preset("batchtopk", k=4), "batch_size": 128,
    "context_size": 32, "lr": 0.003, "lr_warmup_steps": 5,
    "buffer_contexts": 30,
}  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Run:
    """A run with its models loaded; nothing is written to it."""
    folder = tmp_path_factory.mktemp("handoff")
    documents = load_documents("tl_crosscoder/taboo", max_documents=120)
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps(d) + "\n" for d in documents))
    train(RunConfig(text=str(text), output=str(folder / "run"), **CONFIG))
    return Run(path=folder / "run")


@pytest.fixture
def run(trained, tmp_path) -> Run:
    """A copy that a test may write to."""
    path = shutil.copytree(trained.path, tmp_path / "run")
    return Run(path=Path(path), loaded=trained.models)


@pytest.fixture
def server(monkeypatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with serving() as state:
        yield state
