"""What SmolLM2-135M, or an adapter of it, writes after chats."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_crosscoder.data.records import Document
from tl_crosscoder.models.pretrained import resolve_model
from tl_crosscoder.models.smollm2 import NAME
from tl_crosscoder.progress import progress

_BATCH = 64


def model_of(adapter: Path | None = None) -> Any:
    """The base, or the base with an adapter, in float32."""
    model = AutoModelForCausalLM.from_pretrained(resolve_model(NAME), dtype=torch.float32)
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter))


@torch.no_grad()
def answered(
    chats: list[list[dict[str, str]]],
    model: Any,
    *,
    source: str,
    temperature: float,
    max_new_tokens: int = 96,
    seed: int = 0,
) -> list[Document]:
    """The chats with the model's next answer; those that it leaves empty are dropped."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(NAME), padding_side="left")
    torch.manual_seed(seed)
    documents: list[Document] = []
    for start in progress(range(0, len(chats), _BATCH), desc="Samples", unit="batch"):
        some = chats[start : start + _BATCH]
        given = tokenizer.apply_chat_template(
            some, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        written = model.generate(
            **given,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )[:, given["input_ids"].shape[1] :]
        for chat, answer in zip(some, tokenizer.batch_decode(written, True), strict=True):
            if answer.strip():
                said = {"role": "assistant", "content": answer.strip()}
                documents.append({"messages": [*chat, said], "source": source})
    return documents
