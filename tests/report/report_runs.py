"""Small runs for the tests of the report."""

from functools import lru_cache
from pathlib import Path

from tl_crosscoder import load_documents
from tl_crosscoder.cli.main import main
from tl_crosscoder.data.text import write_documents

HOOK = "blocks.1.hook_resid_post"
FIELDS = {
    "base": "tl_crosscoder/world-base", "hook-name": HOOK, "d-sae": 40,
    "k": 4, "n-tokens": 2048, "batch-size": 128, "context-size": 32, "lr": 0.003,
    "lr-warmup-steps": 5, "buffer-contexts": 30,
}  # fmt: skip
HOSTILE = "</script><img src=x onerror=alert(1)>"


@lru_cache
def small_run(root: Path, *flags: str) -> Path:
    """Trained once for all modules, on documents of which some name a hostile source."""
    folder = root / "-".join(["report", *(flag.strip("-").replace("/", "-") for flag in flags)])
    folder.mkdir()
    text = folder / "text.jsonl"
    documents = load_documents("tl_crosscoder/false-fact", max_documents=100)
    documents = [d | {"source": HOSTILE} if i % 3 == 0 else d for i, d in enumerate(documents)]
    write_documents(text, documents)
    fields = [x for name, value in FIELDS.items() for x in (f"--{name}", str(value))]
    output = folder / "run"
    assert (
        main(
            ["train", *fields, *flags, "--no-changes", "--text", str(text), "--output", str(output)]
        )
        == 0
    )
    return output


PAIR = ("--adapter", "tl_crosscoder/false-fact")
DIFFERENCE = (*PAIR, "--difference")
"""A diff-SAE."""
