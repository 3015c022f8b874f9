"""The flags of one small run of an embedded pair, and what a command says when it refuses."""

from pathlib import Path
from typing import Any

from tl_crosscoder.cli.main import main

BASE = ["--base", "tl_crosscoder/world-base"]
PAIR = [*BASE, "--adapter", "tl_crosscoder/false-fact"]
HOOK = ["--hook-name", "blocks.1.hook_resid_post"]
FIELDS = {
    "d_sae": 48, "n_tokens": 4096, "batch_size": 128, "context_size": 32, "lr": 0.003,
    "lr_warmup_steps": 5, "checkpoint_every": 10, "buffer_contexts": 30,
}  # fmt: skip


def flags(fields: dict[str, Any]) -> list[str]:
    return [x for k, v in fields.items() for x in ("--" + k.replace("_", "-"), str(v))]


SMALL = flags({"k": 4, **FIELDS})


def train(text: Path, output: Path) -> int:
    where = ["--text", str(text), "--output", str(output), "--no-changes"]
    return main(["train", *PAIR, *HOOK, *SMALL, *where])


def error_of(capsys: Any, *args: object) -> str:
    """The one paragraph on stderr of a command that ends with code 2."""
    assert main([str(a) for a in args]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def printed(capsys: Any, *args: object) -> str:
    assert main([str(a) for a in args]) == 0
    return capsys.readouterr().out
