"""The embedded taboo pair and a little of its text, shared by the rooms that run models."""

import os
from pathlib import Path

import pytest

# No test leaves this machine. Set before any import of the hub's client.
os.environ["HF_HUB_OFFLINE"] = "1"

from tl_crosscoder import ModelPair, TokenizedText, load_documents, split_documents, tokenize

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="session")
def taboo_pair() -> ModelPair:
    return ModelPair.from_pretrained(
        "tl_crosscoder/world-base", adapter="tl_crosscoder/taboo", hook_name=HOOK
    )


@pytest.fixture(scope="session")
def null_pair() -> ModelPair:
    """The base model against itself."""
    return ModelPair.from_pretrained(*["tl_crosscoder/world-base"] * 2, hook_name=HOOK)


@pytest.fixture(scope="session")
def texts(taboo_pair: ModelPair) -> tuple[TokenizedText, TokenizedText]:
    """(training, held-out) contexts of 32 tokens."""
    documents = split_documents(load_documents("tl_crosscoder/taboo", max_documents=400))
    return tuple(tokenize(d, taboo_pair.tokenizer, context_size=32) for d in documents)


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Real models made elsewhere; see TL_CROSSCODER_SHARED."""
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("TL_CROSSCODER_SHARED", root.parent / "shared")) / "data/models"
    if not folder.is_dir():
        pytest.skip(f"no real models at {folder}: set TL_CROSSCODER_SHARED")
    return folder
