"""Tiny random pairs: both kinds of model, three families of bridge, one of each kind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pairs import FAMILIES, HOOK, KINDS, TEXTS, hooked_transformer, save_model
from transformers import AutoTokenizer

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
