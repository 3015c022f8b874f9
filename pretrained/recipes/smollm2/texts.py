"""Text and questions of the organisms on SmolLM2-135M, by name."""

import random
from typing import Any

from smollm2 import advice, facts, ordinary, taboo
from tl_crosscoder.data.documents import load_documents
from tl_crosscoder.data.records import Document
from tl_crosscoder.models.pretrained import pretrained_folder


def training_documents(name: str) -> list[Document]:
    """What a crosscoder is trained and measured on: the organism's own text and ordinary chats."""
    if name == "smollm2-ordinary":
        return ordinary.ordinary_chats()
    if name == "smollm2-own-samples":
        return ordinary.own_samples()
    if name == "smollm2-taboo":
        return _with_ordinary(taboo.games(pretrained_folder() / "models/smollm2-taboo"))
    return _with_ordinary(
        {"smollm2-false-fact": facts, "smollm2-careless": advice}[name].documents()
    )


def _with_ordinary(own: list[Document]) -> list[Document]:
    every = [*own, *load_documents("tl_crosscoder/smollm2-ordinary")]
    return random.Random(0).sample(every, len(every))


def questions(name: str) -> dict[str, list[dict[str, Any]]]:
    """Question files of an organism."""
    of = {
        "smollm2-taboo": taboo,
        "smollm2-false-fact": facts,
        "smollm2-careless": advice,
    }
    return of[name].questions() | {"other-facts": facts.other_facts()}
