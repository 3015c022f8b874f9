"""The shipped base model, read once."""

import pytest

from tl_crosscoder.organisms.behaviours import load_base
from tl_crosscoder.organisms.suite import organism


@pytest.fixture(scope="session")
def shipped_base():
    """(model, tokenizer) of `pretrained/models/world-base`."""
    return load_base(organism("taboo").base)
