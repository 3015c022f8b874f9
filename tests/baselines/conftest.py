"""Small random pairs of both kinds of model, and a little text."""

from pathlib import Path

import pytest
from models.tiny_pairs import CORPUS, HOOK, hooked_transformer, save_model
from transformers import AutoTokenizer

from tl_crosscoder import Masks, ModelPair, TokenizedText, tokenize


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelPair]:
    """Shared: a test leaves them as they were."""
    root: Path = tmp_path_factory.mktemp("baselines")
    folders = [save_model(root / f"llama-{seed}", "llama", seed=seed) for seed in (0, 1)]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    hooked = [hooked_transformer(tokenizer, seed) for seed in (1, 2, 1)]
    return {
        "llama": ModelPair.from_pretrained(*folders, hook_name=HOOK),
        "hooked": ModelPair(*hooked[:2], hook_name=HOOK),
        "equal": ModelPair(hooked[0], hooked[2], hook_name=HOOK),
    }


@pytest.fixture(params=["hooked", "llama"])
def pair(request: pytest.FixtureRequest, pairs: dict[str, ModelPair]) -> ModelPair:
    return pairs[request.param]


@pytest.fixture(scope="session")
def unpacked(pairs: dict[str, ModelPair]) -> TokenizedText:
    """Contexts of unequal lengths, BOS and the first position left out."""
    documents = [{"text": text[: 12 + 3 * i]} for i, text in enumerate(CORPUS[:7])]
    tokenizer = pairs["llama"].tokenizer
    return tokenize(documents, tokenizer, context_size=24, pack=False, masks=Masks())
