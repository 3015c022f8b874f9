"""The small run of the report, and a judge on this machine."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from judge_server import JudgeServer, serving
from report.report_runs import PAIR, small_run

from tl_crosscoder.run.run import Run


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Run:
    """A run with its models loaded; nothing is written to it."""
    return Run(path=small_run(tmp_path_factory.getbasetemp(), *PAIR))


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
