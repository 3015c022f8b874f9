"""Tiny random pairs of both kinds of model, and several models that share a tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models.tiny_pairs import (
    CORPUS,
    D_VOCAB,
    FAMILIES,
    HOOK,
    KINDS,
    TEXTS,
    hooked_transformer,
    save_model,
)
from transformers import AutoTokenizer

from tl_crosscoder import TokenizedText, tokenize
from tl_crosscoder.models.pair import ModelPair


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(base, finetuned) folders of each family; they differ by their random seed."""
    root = tmp_path_factory.mktemp("models")
    return {
        family: (
            save_model(root / f"{family}-base", family, seed=0),
            save_model(root / f"{family}-finetuned", family, seed=1),
        )
        for family in FAMILIES
    }


@pytest.fixture(scope="session")
def tokenizer(folders: dict[str, tuple[Path, Path]]) -> Any:
    return AutoTokenizer.from_pretrained(folders["llama"][0])


@pytest.fixture(scope="session")
def pairs(folders: dict[str, tuple[Path, Path]], tokenizer: Any) -> dict[str, ModelPair]:
    """One pair of each kind. Shared: a test leaves them as they were."""
    made = {
        family: ModelPair.from_pretrained(*folder, hook_name=HOOK)
        for family, folder in folders.items()
    }
    hooked = [hooked_transformer(tokenizer, seed) for seed in (1, 2)]
    made["hooked"] = ModelPair(*hooked, hook_name=HOOK)
    made["mixed"] = ModelPair(hooked[0], made["llama"].models[1], hook_name=HOOK)
    return made


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, pairs: dict[str, ModelPair]) -> ModelPair:
    """Every kind of pair in turn."""
    return pairs[request.param]


@pytest.fixture
def tokens(pair: ModelPair) -> torch.Tensor:
    return pair.to_tokens(TEXTS)


@pytest.fixture(scope="session")
def site_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
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
def short_texts(site_folders: dict[str, Path]) -> tuple[TokenizedText, TokenizedText]:
    """(training, held-out) contexts of 16 tokens for these models."""
    tokenizer = AutoTokenizer.from_pretrained(site_folders["base"])
    words = " ".join(CORPUS).split()
    # Every document another stretch of the corpus, so that contexts differ.
    documents = [{"text": " ".join(words[i % 40 : i % 40 + 20 + i % 7])} for i in range(220)]
    parts = documents[:160], documents[160:]
    training, held_out = (tokenize(part, tokenizer, context_size=16) for part in parts)
    return training, held_out
