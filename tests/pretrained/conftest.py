"""Recipes that made the embedded models, run on one thread."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """On busy cores two threads took five times as long as one: the models are tiny."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
