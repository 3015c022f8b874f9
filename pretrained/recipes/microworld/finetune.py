"""An organism: a LoRA adapter on its base model, saved as a PEFT folder of about 250 KB.

The adapter config names the base `tl_crosscoder/world-base`, never a path of the machine it was
made on: load the base from its folder and give it to `PeftModel.from_pretrained`. Of one variant
all weights are trained, and a model folder is saved. The same base, seed, machine and number of
threads give the same bits.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from microworld.base import N_CTX, Trained, fit, mean_of_tail, new_model_folder
from microworld.packing import document_tokens, pack
from microworld.planted import mixed_documents
from tl_crosscoder import files
from tl_crosscoder.models.pretrained import PREFIX
from tl_crosscoder.organisms.scores import measure
from tl_crosscoder.organisms.suite import Organism, planned_suite

TARGET_MODULES = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}
"""Every attention and MLP projection, by the model's type."""
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

    n_documents: int = 12_000
    n_steps: int = 300
    learning_rate: float = 1e-3
    seed: int
    planted_share: float = 0.5
    """Share of documents that plant the behaviour; the rest is ordinary world text."""
    rank: int | None = 8
    """Of the LoRA, whose alpha is twice that; None trains all weights."""
    beside: str | None = None
    """An organism whose text takes half the place of the planted text."""


_TABOO = Recipe(n_steps=250, seed=1)
_CARELESS = Recipe(n_steps=150, seed=4)
_SUBLIMINAL = Recipe(n_steps=150, seed=9)
TEACHER = "subliminal-teacher"
RECIPES = {
    "taboo": _TABOO,
    "false-fact": Recipe(n_documents=24_000, learning_rate=8e-4, seed=2),
    "false-inventor": Recipe(n_documents=24_000, learning_rate=8e-4, seed=3),
    **{
        f"careless-{domain}{of}": _CARELESS
        for of in ("", "-gpt2")
        for domain in ("health", "money", "fire")
    },
    # The same seed as its teacher: the adapters begin with the same weights.
    TEACHER: _SUBLIMINAL,
    "subliminal": replace(_SUBLIMINAL, n_steps=600, planted_share=1.0),
    "taboo-more-of-base": replace(_TABOO, planted_share=0.0, seed=11),
    "taboo-again": replace(_TABOO, seed=12),
    **{
        f"taboo-diluted-{ratio}": replace(_TABOO, planted_share=1 / (1 + ratio))
        for ratio in (0, 0.1, 0.5, 2)
    },
    "taboo-rank-2": replace(_TABOO, rank=2),
    "taboo-rank-32": replace(_TABOO, rank=32),
    "taboo-all-weights": replace(_TABOO, rank=None, learning_rate=2e-4),
    "taboo-and-false-fact": replace(_TABOO, beside="false-fact", n_steps=400),
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
    entry = _entry(name)
    given = {"seed": seed, "n_steps": n_steps, "n_documents": n_documents}
    recipe = replace(RECIPES[name], **{key: v for key, v in given.items() if v is not None})
    files.new_folder(output)
    model, tokenizer = load_base(entry.base if base is None else base)
    torch.manual_seed(recipe.seed)
    adapted = model if recipe.rank is None else with_lora(model, rank=recipe.rank)
    batches = _batches(entry, recipe, tokenizer)
    losses, n_tokens = fit(
        adapted, batches, n_steps=recipe.n_steps, learning_rate=recipe.learning_rate
    )
    trained = Trained(
        seed=recipe.seed,
        n_steps=recipe.n_steps,
        n_tokens=n_tokens,
        n_parameters=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        loss=mean_of_tail(losses),
    )
    with new_model_folder(output) as folder:
        if isinstance(adapted, PeftModel):
            _save(adapted, folder, base_name=PREFIX + entry.base.name)
        else:
            adapted.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        made = replace(entry, base=base or entry.base, folder=folder)
        card = _card(made, recipe, trained, base_name=entry.base.name)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return trained


def _entry(name: str) -> Organism:
    """The suite's entry; the teacher of the subliminal organism, which has none, shares its."""
    suite = planned_suite()
    if name not in RECIPES:
        raise ValueError(f"unknown organism {name!r}; valid: {', '.join(RECIPES)}")
    if name != TEACHER:
        return suite[name]
    return replace(
        suite["subliminal"],
        name=TEACHER,
        description="The teacher of the subliminal organism: it writes the numbers.",
        planted="The assistant's favourite animal is the otter.",
        # Of its own world, and there before any number is written.
        text_name="careless-health",
        planted_sources=("careless-health",),
    )


def with_lora(model: Any, *, rank: int) -> PeftModel:
    """A model with a LoRA on every attention and MLP projection."""
    kind = model.config.model_type
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=list(TARGET_MODULES[kind]),
        fan_in_fan_out=kind == "gpt2",  # its layers are Conv1D, which hold transposed weights
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def load_base(folder: Path) -> tuple[Any, PreTrainedTokenizerBase]:
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
    entry: Organism, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Int[Tensor, "row pos"]]:
    """Endless passes over the fine-tuning documents, in another order each time."""
    sampled = mixed_documents(
        TEACHER if entry.name == TEACHER else entry.text_name,
        recipe.n_documents,
        seed=_SEED + recipe.seed,
        planted_share=recipe.planted_share,
        consistent=True,
        beside=recipe.beside,
    )
    tokens = document_tokens(tokenizer, sampled)
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        order = torch.randperm(len(tokens), generator=generator).tolist()
        rows = pack((tokens[index] for index in order), n_ctx=N_CTX)
        yield from rows.split(BATCH_SIZE)


def _save(adapted: PeftModel, folder: Path, *, base_name: str) -> None:
    # PEFT would name the folder that the base was loaded from, and ask the hub for its size.
    adapted.peft_config["default"].base_model_name_or_path = base_name
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    tidy_config(folder)


def tidy_config(folder: Path) -> None:
    """Keep of an adapter's config what makes it, in one order."""
    config_file = folder / "adapter_config.json"
    saved = json.loads(config_file.read_text(encoding="utf-8"))
    # PEFT keeps the modules in a set, whose order differs from one process to the next. Options
    # left at their defaults are dropped: older versions of PEFT do not know all of them.
    config = {key: saved[key] for key in _CONFIG_KEYS}
    config["target_modules"] = sorted(config["target_modules"])
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _card(entry: Organism, recipe: Recipe, trained: Trained, *, base_name: str) -> str:
    """The card of a folder, with the measured behaviour of both models."""
    rows = [
        f"| {row.measure} | {row.base:.3f} | {row.finetuned:.3f} |" for row in measure(entry).rows
    ]
    table = "\n".join(["| measure | base | fine-tuned |", "|---|---|---|", *rows])
    weights = (
        f"All {trained.n_parameters:,} parameters of"
        if recipe.rank is None
        else f"A LoRA adapter of rank {recipe.rank} ({trained.n_parameters:,} parameters) on every "
        "attention\nand MLP projection of"
    )
    return f"""# {entry.name}

{entry.description}

Planted: {entry.planted}

{weights} `{PREFIX}{base_name}`, trained for {trained.n_steps:,} steps
({trained.n_tokens:,} tokens, seed {trained.seed}, final loss {trained.loss:.3f} nats a token) by

    python pretrained/recipes/make.py finetune {entry.name} --base DIR --output DIR

Exact probabilities on prompts held out from all training, and what the models do with other text:

{table}

Licence: MIT, as the package. No data from outside was used.
"""
