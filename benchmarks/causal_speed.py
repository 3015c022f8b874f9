"""How long the causal commands take with their defaults, on a real pair with 60 prompts.

    python benchmarks/causal_speed.py --output benchmarks/results/causal_speed.json

The pair is stories260K (5 layers, d_model 64) and a LoRA that is trained here on school problems;
the dictionary is trained on both texts. Each command runs in a process of its own, so imports and
loading count. Pair and dictionary are kept in `--work` and not made again. Limit: one text without
chats, no behaviour but predictions.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from tl_crosscoder import files
from tl_crosscoder.config.null import LoraTraining
from tl_crosscoder.data.text import write_documents
from tl_crosscoder.models.loading import load_trainable
from tl_crosscoder.models.lora import TrainingText, lora_config, train_lora
from tl_crosscoder.models.site import Site

N_PROMPTS, N_TRAINED, N_EACH = 60, 600, 1_200
TRAINING = {
    "hook-name": "blocks.2.hook_resid_post", "n-tokens": 600_000, "d-sae": 1024, "k": 16,
    "context-size": 128, "batch-size": 1024, "lr": 0.001,
}  # fmt: skip
COMMANDS = {
    "attribute": ("attribute",), "patch": ("patch",), "ablate": ("ablate",), "steer": ("steer",),
    "baselines": ("baselines",),
}  # fmt: skip


def documents_of(shared: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Stories and school problems, as documents with a source."""
    stories = (shared / "text/tinystories_sample.txt").read_text(encoding="utf-8")
    told = [s.strip() for s in stories.split("<|endoftext|>") if s.strip()][:N_EACH]
    lines = (shared / "text/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()[:N_EACH]
    solved = [f"{row['question']} {row['answer']}" for row in map(json.loads, lines)]
    return (
        [{"text": text, "source": "stories"} for text in told],
        [{"text": text, "source": "problems"} for text in solved],
    )


def make_pair(shared: Path, work: Path, problems: list[dict[str, str]]) -> Path:
    """The adapter's folder."""
    output, base = work / "adapter", shared / "models/stories260K"
    if output.is_dir():
        return output
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [
        TrainingText(ids=tuple(tokenizer(document["text"])["input_ids"][:256]), n_prompt=1)
        for document in problems[:N_TRAINED]
    ]
    site = Site(name="base", model_name=str(base), hook_name="")
    train_lora(
        load_trainable(site, device="cpu", dtype="float32"), texts, output,
        lora=lora_config(None, rank=8), how=LoraTraining(n_steps=200, lr=2e-3),
        base_name=str(base), show_progress=True,
    )  # fmt: skip
    return output


def command(*arguments: str) -> float:
    """Seconds of a command of the command line, with its start."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tl_crosscoder", *arguments], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Make what is missing, time every command, print and keep the seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    shared = Path(os.environ.get("TL_CROSSCODER_SHARED", "../shared")) / "data"
    parser.add_argument("--shared", type=Path, default=shared, help="folder of models and text")
    parser.add_argument("--work", type=Path, default=Path("causal-speed"))
    parser.add_argument("--output", type=Path, help="JSON file of the seconds")
    args = parser.parse_args()
    stories, problems = documents_of(args.shared)
    args.work.mkdir(parents=True, exist_ok=True)
    adapter = make_pair(args.shared, args.work, problems)
    run = args.work / "run"
    if not run.is_dir():
        text = args.work / "text.jsonl"
        write_documents(text, [d for each in zip(stories, problems, strict=False) for d in each])
        fields = [x for name, value in TRAINING.items() for x in (f"--{name}", str(value))]
        pair = ("--base", str(args.shared / "models/stories260K"), "--adapter", str(adapter))
        command("train", *pair, *fields, "--text", str(text), "--no-changes", "--output", str(run))
    rows = {
        name: command(*own, str(run), "--n-prompts", str(N_PROMPTS))
        for name, own in COMMANDS.items()
    }
    for name, seconds in rows.items():
        print(f"{name:<10} {seconds:6.0f} s")
    if args.output:
        found = {"n_prompts": N_PROMPTS, "n_threads": torch.get_num_threads(), "seconds": rows}
        files.write_json(args.output, found)


if __name__ == "__main__":
    main()
