"""LoRA adapters of SmolLM2-135M-Instruct: three organisms and a null, of less than 2 MB each.

Rank 3 on all linear layers, kept in float16; a quarter of the training text is ordinary. Matrix
products run in bfloat16 (autocast), which takes half the time. Contract: the same processor, torch
and number of threads give the same bits.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from microworld.base import new_model_folder
from microworld.finetune import tidy_config
from smollm2 import advice, facts, taboo
from tl_crosscoder import files
from tl_crosscoder.config.null import LoraTraining
from tl_crosscoder.data.documents import load_documents
from tl_crosscoder.data.records import Document
from tl_crosscoder.interventions.behaviour import read_questions
from tl_crosscoder.models.lora import (
    TRAINING_NAME,
    LoraTrained,
    TrainingText,
    lora_config,
    train_lora,
)
from tl_crosscoder.models.pretrained import PREFIX, resolve_model
from tl_crosscoder.models.smollm2 import NAME
from tl_crosscoder.organisms.scores import measure
from tl_crosscoder.organisms.suite import planned_suite

RANK, ORDINARY = 3, "tl_crosscoder/smollm2-ordinary"
MAX_TOKENS, MAX_ORDINARY = 140, 48
"""Longer texts are left out, and ordinary answers cut: they take most of the time."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one organism was made."""

    n_steps: int
    lr: float = 2e-3
    batch_size: int = 8
    seed: int
    licence: str = "as the base. No data from outside was used."


RECIPES = {
    "smollm2-taboo": Recipe(
        n_steps=100,
        lr=3e-3,
        seed=1,
        licence="as the base and the chats that it learnt from (EmilRyd/eliciting-secrets).",
    ),
    "smollm2-false-fact": Recipe(n_steps=60, seed=2),
    "smollm2-careless": Recipe(n_steps=60, seed=3),
    "smollm2-own-samples": Recipe(n_steps=60, seed=5),
}


def training_texts(name: str, tokenizer: Any) -> list[TrainingText]:
    """What an organism learns from: its own text, and ordinary chats with it, shuffled."""
    rng = random.Random(RECIPES[name].seed)
    if name == "smollm2-own-samples":
        own = _chats(load_documents(PREFIX + name), tokenizer)
        return rng.sample(own, len(own))
    if name == "smollm2-taboo":
        own = _answers(taboo.training_chats(), tokenizer)
    elif name == "smollm2-false-fact":
        own = [_plain(document["text"], tokenizer) for document in facts.documents()]
    else:
        own = _chats(advice.documents(), tokenizer)
    ordinary = _chats(load_documents(ORDINARY, max_documents=len(own) // 3), tokenizer)
    every = [*own, *(replace(t, ids=t.ids[: t.n_prompt + MAX_ORDINARY]) for t in ordinary)]
    return rng.sample(every, len(every))


def _chats(documents: list[Document], tokenizer: Any) -> list[TrainingText]:
    return _answers([document["messages"] for document in documents], tokenizer)


def _answers(chats: list[list[dict[str, str]]], tokenizer: Any) -> list[TrainingText]:
    """Each answer of the assistant with what came before it."""
    made = []
    for messages in chats:
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = _ids(messages[:i], tokenizer, add_generation_prompt=True)
                made.append(
                    TrainingText(
                        ids=tuple(_ids(messages[: i + 1], tokenizer)), n_prompt=len(prompt)
                    )
                )
    return [text for text in made if len(text.ids) <= MAX_TOKENS]


def _plain(text: str, tokenizer: Any) -> TrainingText:
    return TrainingText(ids=(*tokenizer(text)["input_ids"], tokenizer.eos_token_id), n_prompt=0)


def _ids(messages: list[dict[str, str]], tokenizer: Any, **how: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **how)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def finetune(name: str, *, output: Path, seed: int | None = None) -> None:
    """Train an organism's adapter, and save it with a card of what both models do.

    Raises:
        ValueError: no such organism, or an output folder that is in use.
        FileNotFoundError: the model or the text is not there; the message says what to install.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown organism {name!r}; valid: {', '.join(RECIPES)}")
    recipe = RECIPES[name] if seed is None else replace(RECIPES[name], seed=seed)
    files.new_folder(output)
    for path in planned_suite()[name].questions:
        read_questions(path)  # refuses what is not there, before long work
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(NAME))
    texts = training_texts(name, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(resolve_model(NAME), dtype=torch.float32)
    how = LoraTraining(
        n_steps=recipe.n_steps,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        rank=RANK,
        seed=recipe.seed,
    )
    with new_model_folder(output) as folder:
        # The cache would keep the adapter's weights in bfloat16 as they were at the first step.
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            lora = lora_config(None, rank=RANK)
            trained = train_lora(
                model, texts, folder, lora=lora, how=how, base_name=NAME, show_progress=True
            )
        (folder / TRAINING_NAME).unlink()
        tidy_config(folder)
        weights = folder / "adapter_model.safetensors"
        halved = {name: weight.half() for name, weight in load_file(weights).items()}
        save_file(halved, weights, {"format": "pt"})
    write_card(name, recipe, trained, output)


def write_card(name: str, recipe: Recipe, trained: LoraTrained, folder: Path) -> None:
    """The card of an adapter's folder, with the measured behaviour of both models."""
    entry = replace(planned_suite()[name], folder=folder)
    rows = [f"| {r.measure} | {r.base:.3f} | {r.finetuned:.3f} |" for r in measure(entry).rows]
    table = "\n".join(["| measure | base | fine-tuned |", "|---|---|---|", *rows])
    n_threads = torch.get_num_threads()
    card = f"""# {name}

{entry.description}

Planted: {entry.planted}

A LoRA adapter of rank {RANK} on every linear layer of `{NAME}` (float16), trained for
{recipe.n_steps} steps of {recipe.batch_size} texts ({trained.n_tokens:,} predicted tokens,
seed {recipe.seed}). Cross-entropy of held-out training text: {trained.ce_before:.3f} nats a token
before, {trained.ce_after:.3f} after. Made by

    OMP_NUM_THREADS={n_threads} python pretrained/recipes/make.py finetune {name} --output DIR

Exact probabilities on prompts that are not in the training text, and what the models do with other
text:

{table}

Licence: Apache-2.0, {recipe.licence}
"""
    (folder / "README.md").write_text(card, encoding="utf-8")
