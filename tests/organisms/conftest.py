"""The shipped base model, read once, on one thread."""

import pytest
import torch

from tl_crosscoder.organisms.behaviours import load_base
from tl_crosscoder.organisms.suite import organism


@pytest.fixture(scope="session")
def shipped_base():
    """(model, tokenizer) of `pretrained/models/world-base`."""
    return load_base(organism("taboo").base)


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """On busy cores two threads took five times as long as one: the models are tiny."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
