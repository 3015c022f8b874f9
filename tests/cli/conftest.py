"""One small run of the embedded false-fact pair, made from the command line."""

from pathlib import Path

import pytest
from cli.small_run import train

from tl_crosscoder import load_documents
from tl_crosscoder.data.text import write_documents


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    write_documents(path, load_documents("tl_crosscoder/false-fact", max_documents=150))
    return str(path)


@pytest.fixture(scope="session")
def run(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    assert train(Path(text), output) == 0
    return output
