"""The small random pairs of the interventions, and a little text."""

import pytest
from interventions.conftest import folders, pair, pairs  # noqa: F401
from models.tiny_pairs import CORPUS

from tl_crosscoder import ModelPair, TokenizedText, tokenize
from tl_crosscoder.config.inputs import Masks


@pytest.fixture(scope="session")
def unpacked(pairs: dict[str, ModelPair]) -> TokenizedText:  # noqa: F811
    """Contexts of unequal lengths, BOS and the first position left out."""
    documents = [{"text": text[: 12 + 3 * i]} for i, text in enumerate(CORPUS[:7])]
    tokenizer = pairs["llama"].tokenizer
    return tokenize(documents, tokenizer, context_size=24, pack=False, masks=Masks())
