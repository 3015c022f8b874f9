"""Makes an organism: a LoRA adapter on the base model, saved as a PEFT folder of about 250 KB.

The adapter config names the base `tl_crosscoder/world-base`, never a path of the machine it was
made on: load the base from its folder and give it to `PeftModel.from_pretrained`. The same base,
seed, machine and number of threads give the same bits.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_crosscoder.organisms.base import N_CTX, fit, mean_of_tail
from tl_crosscoder.organisms.behaviours import BehaviourReport, behaviour, load_base
from tl_crosscoder.organisms.cards import BASE_NAME, adapter_card
from tl_crosscoder.organisms.packing import document_tokens, pack
from tl_crosscoder.organisms.recovery import mixed_documents
from tl_crosscoder.organisms.suite import LoraSettings, Organism, check_output, new_folder, organism

TARGET_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)

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
FINETUNING_SEED = 1_500_000_000  # a stream of text apart from base training's


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What `finetune` did."""

    organism: str
    output: Path
    seed: int
    n_steps: int
    n_tokens: int
    """Tokens that entered the loss."""
    n_parameters: int
    """Parameters of the adapter."""
    loss: float
    """Mean over the last tenth of the steps, in nats a token."""
    seconds: float
    behaviour: BehaviourReport


def finetune(
    name: str,
    *,
    output: Path,
    base: Path | None = None,
    seed: int | None = None,
    n_steps: int | None = None,
) -> FinetuneResult:
    """Fine-tune the base model into an organism of the suite and save the adapter in `output`.

    Args:
        name: the organism.
        output: a new or empty folder.
        base: folder of the base model; the shipped one by default.
        seed: seeds text, adapter and order; the suite's by default.
        n_steps: optimizer steps; the suite's by default.

    Raises:
        ValueError: if there is no such organism, or `output` is not empty.
        FileNotFoundError: if there is no model in `base`.
    """
    started = time.monotonic()
    entry = organism(name)
    check_output(output)
    seed = entry.seed if seed is None else seed
    n_steps = entry.n_steps if n_steps is None else n_steps
    model, tokenizer = load_base(entry.base if base is None else base)
    before = behaviour(name, model, tokenizer)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, lora_config(entry.lora))
    losses, n_tokens = fit(
        adapted,
        _batches(entry, tokenizer, seed=seed),
        n_steps=n_steps,
        learning_rate=entry.learning_rate,
    )
    report = BehaviourReport(
        organism=name, base=before, finetuned=behaviour(name, adapted, tokenizer)
    )
    result = FinetuneResult(
        organism=name,
        output=output,
        seed=seed,
        n_steps=n_steps,
        n_tokens=n_tokens,
        n_parameters=adapted.get_nb_trainable_parameters()[0],
        loss=mean_of_tail(losses),
        seconds=time.monotonic() - started,
        behaviour=report,
    )
    _save(adapted, entry, result)
    return result


def lora_config(settings: LoraSettings) -> LoraConfig:
    """LoRA on every attention and MLP projection of every layer."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=list(TARGET_MODULES),
        task_type="CAUSAL_LM",
    )


def _batches(
    entry: Organism, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> Iterator[Int[Tensor, "row pos"]]:
    """Endless passes over the fine-tuning documents, in another order each time."""
    sampled = mixed_documents(
        entry.name,
        entry.data.n_documents,
        seed=FINETUNING_SEED + seed,
        planted_share=entry.data.planted_share,
        consistent=True,
    )
    tokens = document_tokens(tokenizer, sampled)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(tokens), generator=generator).tolist()
        rows = pack((tokens[index] for index in order), n_ctx=N_CTX)
        yield from rows.split(entry.batch_size)


def _save(adapted: PeftModel, entry: Organism, result: FinetuneResult) -> None:
    with new_folder(result.output) as folder:
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
        card = adapter_card(entry, result=result)
        (folder / "README.md").write_text(card, encoding="utf-8")
