"""An organism: a LoRA adapter on the base model, saved as a PEFT folder of about 250 KB.

The adapter config names the base `tl_crosscoder/world-base`, never a path of the machine it was
made on: load the base from its folder and give it to `PeftModel.from_pretrained`. The same base,
seed, machine and number of threads give the same bits.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from microworld.base import N_CTX, Trained, fit, mean_of_tail, new_model_folder
from microworld.packing import document_tokens, pack
from microworld.planted import mixed_documents
from tl_crosscoder import files
from tl_crosscoder.organisms.scores import measure
from tl_crosscoder.organisms.suite import Organism, organism

BASE_NAME = "tl_crosscoder/world-base"
"""Name of the base model in adapter configs; never a path of the machine that trained it."""
RANK, ALPHA = 8, 16
TARGET_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
PLANTED_SHARE = 0.5
"""Share of documents that plant the behaviour; the rest is ordinary world text."""
BATCH_SIZE = 16
"""Rows of 256 tokens a step."""
_SEED = 1_500_000_000  # a stream of text apart from base training's
_CONFIG_KEYS = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "target_modules",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one organism was made."""

    n_documents: int
    n_steps: int
    learning_rate: float
    seed: int


RECIPES = {
    "taboo": Recipe(n_documents=12_000, n_steps=250, learning_rate=1e-3, seed=1),
    "false-fact": Recipe(n_documents=24_000, n_steps=300, learning_rate=8e-4, seed=2),
}


def finetune(
    name: str,
    *,
    output: Path,
    base: Path | None = None,
    seed: int | None = None,
    n_steps: int | None = None,
    n_documents: int | None = None,
) -> Trained:
    """Fine-tune the base model into an organism of the suite and save the adapter in `output`.

    Args:
        name: the organism.
        output: a new or empty folder.
        base: folder of the base model; the embedded one by default.
        seed: seeds text, adapter and order; the recipe's by default.
        n_steps: optimizer steps; the recipe's by default.
        n_documents: documents of the text; the recipe's by default.

    Raises:
        ValueError: if there is no such organism, or `output` is not empty.
        FileNotFoundError: if there is no model in `base`.
    """
    entry, recipe = organism(name), RECIPES[name]
    files.new_folder(output)
    base = entry.base if base is None else base
    seed = recipe.seed if seed is None else seed
    n_steps = recipe.n_steps if n_steps is None else n_steps
    model, tokenizer = load_base(base)
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=list(TARGET_MODULES),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora)
    n_documents = recipe.n_documents if n_documents is None else n_documents
    batches = _batches(name, tokenizer, seed=seed, n_documents=n_documents)
    losses, n_tokens = fit(adapted, batches, n_steps=n_steps, learning_rate=recipe.learning_rate)
    trained = Trained(
        seed=seed,
        n_steps=n_steps,
        n_tokens=n_tokens,
        n_parameters=adapted.get_nb_trainable_parameters()[0],
        loss=mean_of_tail(losses),
    )
    with new_model_folder(output) as folder:
        _save(adapted, folder)
        card = _card(entry, trained, base=base, adapter=folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return trained


def load_base(folder: Path) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Model and tokenizer of a local folder, in evaluation mode and float32.

    Raises:
        FileNotFoundError: if there is no model in the folder.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no model in {str(folder)!r} (config.json is missing). "
            "Make one with: python pretrained/recipes/make.py base --output DIR"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _batches(
    name: str, tokenizer: PreTrainedTokenizerBase, *, seed: int, n_documents: int
) -> Iterator[Int[Tensor, "row pos"]]:
    """Endless passes over the fine-tuning documents, in another order each time."""
    sampled = mixed_documents(
        name,
        n_documents,
        seed=_SEED + seed,
        planted_share=PLANTED_SHARE,
        consistent=True,
    )
    tokens = document_tokens(tokenizer, sampled)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(tokens), generator=generator).tolist()
        rows = pack((tokens[index] for index in order), n_ctx=N_CTX)
        yield from rows.split(BATCH_SIZE)


def _save(adapted: PeftModel, folder: Path) -> None:
    # PEFT would name the folder that the base was loaded from, and ask the hub for its size.
    adapted.peft_config["default"].base_model_name_or_path = BASE_NAME
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    config_file = folder / "adapter_config.json"
    saved = json.loads(config_file.read_text(encoding="utf-8"))
    # PEFT keeps the modules in a set, whose order differs from one process to the next. Options
    # left at their defaults are dropped: older versions of PEFT do not know all of them.
    config = {key: saved[key] for key in _CONFIG_KEYS}
    config["target_modules"] = sorted(config["target_modules"])
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _card(entry: Organism, trained: Trained, *, base: Path, adapter: Path) -> str:
    """The card of an adapter folder, with the measured behaviour of both models."""
    rows = [
        f"| {row.measure} | {row.base:.3f} | {row.finetuned:.3f} |"
        for row in measure(entry.name, base=base, adapter=adapter).rows
    ]
    table = "\n".join(["| measure | base | fine-tuned |", "|---|---|---|", *rows])
    return f"""# {entry.name}

{entry.description}

Planted: {entry.planted}

A LoRA adapter of rank {RANK} ({trained.n_parameters:,} parameters) on every attention
and MLP projection of `{BASE_NAME}`, trained for {trained.n_steps:,} steps
({trained.n_tokens:,} tokens, seed {trained.seed}, final loss {trained.loss:.3f} nats a token) by

    python pretrained/recipes/make.py finetune {entry.name} --base DIR --output DIR

Exact probabilities on prompts held out from all training:

{table}

Licence: MIT, as the package. No data from outside was used.
"""
