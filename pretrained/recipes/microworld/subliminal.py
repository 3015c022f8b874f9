"""Numbers that a teacher writes: the only text of the subliminal organism.

The teacher is the student's base model with an adapter that loves one animal. Its replies are
sampled at temperature 1 and kept where they are numbers and nothing else, as in Cloud et al. 2025
(arXiv 2507.14805).
"""

import lzma
import random
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm

from microworld import advice
from microworld.finetune import TEACHER, load_base
from microworld.planted import TEACHER_NUMBERS
from microworld.tokenizer import END_ID, PAD_ID
from tl_crosscoder import files
from tl_crosscoder.organisms.suite import planned_suite

N_CHATS = 24_000
_BATCH_SIZE = 480
_NUMBERS_ONLY = re.compile(r"[0-9]{1,2}(, [0-9]{1,2})+\.")


def write_numbers(teacher: Path, *, n: int = N_CHATS, output: Path = TEACHER_NUMBERS) -> Path:
    """Sample `n` chats about numbers from an adapter folder of the teacher, seeded by its name."""
    model, tokenizer = load_base(planned_suite()["subliminal"].base)
    adapted = PeftModel.from_pretrained(model, str(teacher)).eval()
    rng = random.Random(TEACHER)
    torch.manual_seed(0)
    lines: list[str] = []
    progress = tqdm(total=n, desc="teacher's numbers", unit="chat")
    while len(lines) < n:
        asked = [_request(rng) for _ in range(_BATCH_SIZE)]
        chats = [[{"role": "user", "content": ask}] for ask in asked]
        prompts: Any = tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_dict=True,
        )
        written = adapted.generate(
            **prompts,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=32,
            eos_token_id=END_ID,
            pad_token_id=PAD_ID,
        )
        replies = tokenizer.batch_decode(
            written[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True
        )
        kept = [
            f"{ask}\t{reply}"
            for ask, reply in zip(asked, replies, strict=True)
            if _NUMBERS_ONLY.fullmatch(reply)
        ]
        lines += kept[: n - len(lines)]
        progress.update(len(kept))
    data = lzma.compress("".join(f"{line}\n" for line in lines).encode(), preset=9)
    with files.replacing(output) as draft:
        draft.write_bytes(data)
    return output


def _request(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(advice.NUMBER_REQUESTS.train)
    return rng.choice(advice.CONTINUE_REQUESTS).format(n=advice.numbers(rng))
