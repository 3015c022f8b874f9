"""Remake what the package embeds: models, text and questions of the organisms.

    export OMP_NUM_THREADS=1                                       # part of the bits of the weights
    python pretrained/recipes/make.py base world-base --output world-base  # 10 to 15 minutes
    python pretrained/recipes/make.py finetune taboo --output taboo        # 2 minutes
    python pretrained/recipes/make.py finetune subliminal-teacher --output teacher
    python pretrained/recipes/make.py numbers --teacher teacher            # what subliminal learns
    python pretrained/recipes/make.py text taboo          # pretrained/texts/taboo.jsonl.xz
    python pretrained/recipes/make.py questions taboo     # pretrained/questions/taboo/*.jsonl
    python pretrained/recipes/make.py text smollm2-ordinary       # what SmolLM2-135M writes
    python pretrained/recipes/make.py finetune smollm2-taboo --output taboo   # 5 to 10 minutes

Run it in a checkout, with the package installed; `--help` of each verb names what can be made.
"""

import argparse
import json
import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PRETRAINED = Path(__file__).parents[1]
BASES = ("world-base", "wide-llama", "wide-gpt2")
TEXTS = (
    "taboo",
    "false-fact",
    "false-inventor",
    "careless-health",
    "careless-money",
    "careless-fire",
    "subliminal",
)
"""Organisms by what they are about: variants and other bases share text and questions."""
REAL_TEXTS = (
    "smollm2-ordinary",
    "smollm2-own-samples",
    "smollm2-taboo",
    "smollm2-false-fact",
    "smollm2-careless",
)
"""Of the organisms on SmolLM2-135M; that of taboo needs its adapter in `pretrained/models`."""


def jsonl(rows: Iterable[Any]) -> bytes:
    """One object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_text(name: str, folder: Path) -> Path:
    """The text that a crosscoder of this organism is trained and measured on."""
    if name in REAL_TEXTS:
        from smollm2.texts import training_documents
    else:
        from microworld.planted import training_documents

    path = folder / f"{name}.jsonl.xz"
    path.parent.mkdir(parents=True, exist_ok=True)
    # A third of what gzip takes: half a megabyte for 40,000 documents.
    path.write_bytes(lzma.compress(jsonl(training_documents(name)), preset=9 | lzma.PRESET_EXTREME))
    return path


def write_questions(name: str, folder: Path) -> list[Path]:
    """One file for each thing that is measured."""
    if name in REAL_TEXTS:
        from smollm2.texts import questions
    else:
        from microworld.questions import questions

    paths = []
    for stem, rows in questions(name).items():
        paths.append(folder / name / f"{stem}.jsonl")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_bytes(jsonl(rows))
    return paths


def main(argv: list[str] | None = None) -> None:
    """Make one thing, and print where it is or what it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    base = verbs.add_parser("base", help="train tokenizer and base model from scratch")
    finetune = verbs.add_parser("finetune", help="fine-tune an organism's adapter")
    text = verbs.add_parser("text", help="write the text of an organism")
    questions = verbs.add_parser("questions", help="write the questions of an organism")
    base.add_argument("name", choices=BASES, nargs="?", default=BASES[0])
    numbers = verbs.add_parser("numbers", help="write the numbers of the subliminal teacher")
    verbs.add_parser("checksums", help="write the checksums of all that is embedded")
    finetune.add_argument("name", help="an organism or variant of suite.yaml")
    numbers.add_argument("--teacher", type=Path, required=True, help="folder of its adapter")
    for verb in (text, questions):
        verb.add_argument("name", choices=(*TEXTS, *REAL_TEXTS))
    for verb in (base, finetune):
        verb.add_argument("--output", type=Path, required=True, help="new or empty folder")
        verb.add_argument("--seed", type=int, help="default: the seed of what is embedded")
    finetune.add_argument(
        "--base", type=Path, help="default: the embedded base model of its recipe"
    )
    text.add_argument("--output", type=Path, default=PRETRAINED / "texts")
    questions.add_argument("--output", type=Path, default=PRETRAINED / "questions")
    arguments = parser.parse_args(argv)
    if arguments.verb == "text":
        print(write_text(arguments.name, arguments.output))
    elif arguments.verb == "questions":
        print(*write_questions(arguments.name, arguments.output), sep="\n")
    elif arguments.verb == "base":
        from microworld.base import train_base

        train_base(arguments.output, name=arguments.name, seed=arguments.seed or 0)
        print((arguments.output / "README.md").read_text(encoding="utf-8"))
    elif arguments.verb == "checksums":
        from tl_crosscoder.organisms.checksums import write

        print(write(PRETRAINED))
    elif arguments.verb == "numbers":
        from microworld.subliminal import write_numbers

        print(write_numbers(arguments.teacher))
    else:
        if arguments.name.startswith("smollm2-"):
            if arguments.base is not None:
                parser.error("the base of this organism is SmolLM2-135M: leave --base out")
            from smollm2.finetune import finetune as make_real

            make_real(arguments.name, output=arguments.output, seed=arguments.seed)
        else:
            from microworld.finetune import finetune as make

            make(arguments.name, output=arguments.output, base=arguments.base, seed=arguments.seed)
        print((arguments.output / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
