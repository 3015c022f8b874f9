"""A hub on this machine, which the client takes for the real one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.hub_server import TOKEN, LocalHub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub().running() as hub:
        for name, value in hub.client_constants(tmp_path / "cache").items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
