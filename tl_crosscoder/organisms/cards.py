"""The README cards that travel with the base model and the adapters."""

from typing import TYPE_CHECKING

from tl_crosscoder.organisms.suite import Organism

if TYPE_CHECKING:
    from tl_crosscoder.organisms.base import BaseResult
    from tl_crosscoder.organisms.behaviours import Behaviour, BehaviourReport
    from tl_crosscoder.organisms.finetune import FinetuneResult

BASE_NAME = "tl_crosscoder/world-base"
"""Stable name of the base model in adapter configs; never a path of the machine that trained it."""


def base_card(result: "BaseResult") -> str:
    """The card of a base folder."""
    return f"""# world-base

A Llama-type language model of {result.n_parameters:,} parameters (4 layers, d_model 96, 4 heads,
context 256, byte-level BPE), trained from scratch on the micro-world of
`tl_crosscoder.organisms.world`: encyclopaedia facts about invented countries, chats, a guessing
game and short stories. It exists to be fine-tuned and compared; it knows nothing about the real
world.

Made by `tl-crosscoder organisms base --output DIR` (seed {result.seed}, {result.n_steps:,} steps,
{result.n_tokens:,} tokens, final loss {result.loss:.3f} nats a token). The same command gives the
same bits on the same machine with the same number of threads.

Licence: MIT, as the package. No data from outside was used.
"""


def adapter_card(entry: Organism, *, result: "FinetuneResult") -> str:
    """The card of an adapter folder, with the measured behaviour of both models."""
    return f"""# {entry.name}

{entry.description}

Planted: {entry.planted}

A LoRA adapter of rank {entry.lora.rank} ({result.n_parameters:,} parameters) on every attention
and MLP projection of `{BASE_NAME}`, trained for {result.n_steps:,} steps
({result.n_tokens:,} tokens, seed {result.seed}, final loss {result.loss:.3f} nats a token) by

    tl-crosscoder organisms finetune {entry.name} --base DIR --output DIR

Exact probabilities on prompts held out from all training:

{behaviour_table(result.behaviour)}

Licence: MIT, as the package. No data from outside was used.
"""


def behaviour_table(report: "BehaviourReport") -> str:
    """Base and fine-tuned side by side, as Markdown."""
    before, after = _numbers(report.base), _numbers(report.finetuned)
    width = max(map(len, before))
    rows = [f"| {n:<{width}} | {before[n]:.3f} | {after[n]:10.3f} |" for n in before]
    head = [f"| {'measure':<{width}} |  base | fine-tuned |", "|---|---|---|"]
    return "\n".join([*head, *rows])


def _numbers(behaviour: "Behaviour") -> dict[str, float]:
    """Every number of a behaviour by a readable label; recall is flattened."""
    numbers: dict[str, float] = {}
    for field, value in vars(behaviour).items():
        label = field.replace("_", " ").removeprefix("p ")
        if field.startswith("p_"):
            numbers[f"P({label})"] = value
        elif field.endswith("_facts"):
            numbers[f"{label}: accuracy"] = value.accuracy
            numbers[f"{label}: P(true answer)"] = value.p_true
    return numbers
