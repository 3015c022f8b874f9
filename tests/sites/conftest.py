"""Tiny random models that share a tokenizer: three of one width, a wide one, a padded one."""

from pathlib import Path

import pytest
from pair.tiny_pairs import CORPUS, D_VOCAB, save_model
from transformers import AutoTokenizer

from tl_crosscoder import TokenizedText, tokenize


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sites")
    changes = {
        "base": {},
        "sft": {"seed": 1},
        "rl": {"seed": 2},
        "wide": {"seed": 3, "hidden_size": 32, "head_dim": 8, "num_hidden_layers": 2},
        "padded": {"seed": 4, "vocab_size": D_VOCAB + 20},
        "gemma": {"seed": 5, "family": "gemma2", "max_position_embeddings": 48},
    }
    return {name: save_model(root / name, **fields) for name, fields in changes.items()}


@pytest.fixture(scope="session")
def short_texts(folders: dict[str, Path]) -> tuple[TokenizedText, TokenizedText]:
    """(training, held-out) contexts of 16 tokens for these models."""
    tokenizer = AutoTokenizer.from_pretrained(folders["base"])
    words = " ".join(CORPUS).split()
    # Every document another stretch of the corpus, so that contexts differ.
    documents = [{"text": " ".join(words[i % 40 : i % 40 + 20 + i % 7])} for i in range(220)]
    parts = documents[:160], documents[160:]
    training, held_out = (tokenize(part, tokenizer, context_size=16) for part in parts)
    return training, held_out
