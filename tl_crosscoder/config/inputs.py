"""What a run reads: models at hook points, and text with the tokens of it that count.

No torch here: the command line reads these classes to print its help.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tl_crosscoder.config.settings import (
    NaturalInt,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ProperShare,
    Range,
    Settings,
)
from tl_crosscoder.config.yaml import YamlConfig, read_mapping

CONTEXT_SIZE = 128
OnBadDocument = Literal["error", "skip"]
OnNonfinite = Literal["error", "drop"]


def hook_point(name: str) -> str:
    """A block by its module's name in transformers as the hook point after it; else as it is.

    `model.layers.13` and `transformer.h.13` are `blocks.13.hook_resid_post`. What is within a block
    has no hook point of equal meaning in every architecture, and keeps its name.
    """
    found = re.fullmatch(r"(?:\w+\.)*(?:layers|h)\.(\d+)", name.strip())
    return name.strip() if found is None else f"blocks.{found[1]}.hook_resid_post"


@dataclass(frozen=True, kw_only=True)
class ModelsConfig(Settings):
    """The models that are compared, and where."""

    base: str | None = None
    """Base model: a Hugging Face name or a local folder."""
    finetuned: str | None = None
    """Fine-tuned model: a name or a folder; or give `adapter`. Several, such as SFT and RL, with
    commas between them."""
    adapter: str | None = None
    """LoRA adapter (PEFT) on the base model: a name or a folder; several with commas between."""
    merge_adapter: bool | None = None
    """Merge the adapter into the weights, or run it beside them; None merges unless the base is
    4-bit."""
    tokenizer: str | None = None
    """Tokenizer of all models: a name or a folder; None is the models' own."""
    hook_name: str | None = None
    """Hook point whose activations are read in both models, e.g. blocks.13.hook_resid_post, which
    may be called model.layers.13 as in transformers.
    Several, with commas between them, are read in every model; then the base alone is enough. None
    lets `train` scan the layers first (see `scan`) and take the one that it recommends."""
    difference: bool = False
    """Train on the difference of the two sites alone; the preset diff-sae implies it."""
    revision: str | None = None
    """Revision of the base model on the hub."""
    finetuned_revision: str | None = None
    """Revision of the fine-tuned model or adapter on the hub; of several, as many with commas."""
    device: str = "cpu"
    """Device of the models and the crosscoder; or one for each model with commas between, the
    crosscoder on the first."""
    dtype: str = "float32"
    """Number format of the models: float32, bfloat16, float16, or nf4 (4-bit, with bitsandbytes).
    The crosscoder trains in float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hook_name is not None:
            names = ",".join(map(hook_point, self.hook_name.split(",")))
            object.__setattr__(self, "hook_name", names)


@dataclass(frozen=True, kw_only=True)
class Reading(Settings):
    """How a text is read."""

    text_column: str = "text"
    """Column of the text, or of chats, where there are none under `messages`."""
    max_documents: PositiveInt | None = None
    """Read at most so many documents."""
    dataset_config: str | None = None
    """Config of a `datasets` name that has several."""
    dataset_split: str = "train"
    """Split of a `datasets` name, or of a folder that `datasets` saved."""
    on_bad_document: OnBadDocument = "error"
    """What becomes of a document that cannot be read, such as a chat that the template refuses:
    `error` stops at the first, `skip` leaves them out and says how many, with three reasons."""


@dataclass(frozen=True, kw_only=True)
class TextSource(YamlConfig, Reading):
    """One component of a mixture."""

    text: str
    """A .txt, .jsonl, .json, .csv or .parquet file, a folder, or a `datasets` name, streamed."""
    weight: PositiveFloat = 1.0
    """Share of the tokens, relative to the other components."""
    name: str | None = None
    """What measures call it; None is the file's stem or the dataset's name."""


@dataclass(frozen=True, kw_only=True)
class Masks(Settings):
    """Which tokens do not count: neither trained on nor measured."""

    drop_bos: bool = True
    """Leave out BOS tokens: their norms dwarf all others (attention sink)."""
    n_first: NaturalInt = 1
    """Positions left out at the start of each context, where models of any kind have a sink."""
    drop_template: bool = False
    """Leave out the tokens of the chat template."""
    max_norm_multiple: Annotated[float, Range(1, is_open=True)] | None = None
    """Leave out tokens whose norm is above so many times the median, in any site."""
    on_nonfinite: OnNonfinite = "error"
    """A token whose activation is NaN or infinite stops the run, or is left out and counted."""


@dataclass(frozen=True, kw_only=True)
class TextConfig(Reading, Masks):
    """The text of a run or of a cache."""

    text: str | None = None
    """A .txt, .jsonl, .json, .csv or .parquet file, compressed or not, a folder of them or one that
    `datasets` saved, or a `datasets` name, which is streamed. For several, with weights, give
    `mixture` in a YAML file."""
    mixture: Annotated[tuple[TextSource, ...], tyro.conf.Suppress] = ()
    """Several texts with their shares of the tokens, in place of `text`; in YAML a list of
    mappings with the fields of `TextSource`."""
    context_size: Annotated[int, Range(2)] = CONTEXT_SIZE
    """Tokens a context; the default is cut at what the models take."""
    pack: bool = True
    """Fill contexts with one document after the other; else each document has its own context,
    cut at `context_size`."""
    held_out: ProperShare = 0.1
    """Share of the text kept for calibration and measures, whole documents by a hash of each."""

    @property
    def sources(self) -> tuple[TextSource, ...]:
        """The components of the text: those of the mixture, or the one."""
        if self.text is None:
            return self.mixture
        how: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Reading)}
        return (TextSource(text=self.text, **how),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is not None and self.mixture:
            raise ValueError(f"give text ({self.text!r}) or mixture, not both.")
        if self.text is not None and not self.text.strip():  # which as a path is this folder
            raise ValueError(f"text is {self.text!r}: name a file, a folder or a `datasets` name.")
        if self.n_first >= self.context_size:
            raise ValueError(
                f"n_first is {self.n_first}, which leaves nothing of contexts of "
                f"{self.context_size} tokens."
            )


N_BUILT_IN = 64
"""Number of built-in prompts for contrastive text."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(YamlConfig, ModelsConfig):
    """A file of contrastive texts: which models write, after which prompts, and how much.

    Source: Kassem et al. 2026 (arXiv 2603.04426); prompts, lengths and temperature are chosen by
    us.
    """

    output: str
    """A .jsonl file for the texts; must be new. Settings and counts go into a .json beside it."""
    prompts: str | None = None
    """Prompts, texts or chats: a .txt, .jsonl or .parquet file, a folder of them, or a `datasets`
    name. None is a small built-in set, as chats where the tokenizer has a template for them."""
    prompts_column: str = "text"
    """Column of the prompts, where there are none under `messages`."""
    dataset_config: str | None = None
    """Config of a `datasets` name that has several."""
    dataset_split: str = "train"
    """Split of a `datasets` name."""
    n_prompts: PositiveInt = 1_000
    """At most so many prompts, in an order that is a function of the seed. The built-in set is
    repeated: each time other texts are sampled."""
    max_prompt_tokens: PositiveInt = 128
    """Prompts of plain text are cut at so many tokens; longer chats are left out."""
    max_new_tokens: PositiveInt = 128
    """Tokens that each model writes after a prompt, at most."""
    temperature: NonNegativeFloat = 1.0
    """Temperature of sampling; 1 is the models' own distribution, 0 their likeliest tokens."""
    batch_size: PositiveInt = 32
    """Prompts of one length that go through a model together."""
    seed: NaturalInt = 0
    """Seed of sampling and of the order of the prompts."""
    hook_name: str | None = None
    """Not needed here: no activation is read, and any hook point of the models will do."""
    difference: Annotated[bool, tyro.conf.Suppress] = False
    """No effect here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is None and self.temperature == 0 and self.n_prompts > N_BUILT_IN:
            raise ValueError(
                f"at temperature 0 each of the {N_BUILT_IN} built-in prompts gives one text a "
                f"model, but n_prompts is {self.n_prompts}. Set n_prompts (--n-prompts) to "
                f"{N_BUILT_IN} or less, a temperature above 0, or give prompts of your own."
            )

    @classmethod
    def from_yaml(
        cls, path: str | Path, *, default: Mapping[str, Any] | None = None
    ) -> "ContrastiveConfig":
        """Read a YAML file of these fields, or that of a training run (with `text` or `mixture`).

        Of a run only its models are taken: `output` and the rest mean something else there.

        Raises:
            FileNotFoundError: no such file.
            ValueError: as any config does; of a run also where `default` has no output.
        """
        given = read_mapping(path)
        if {"text", "mixture"} & given.keys():
            names = {field.name for field in fields(ModelsConfig)} - {"hook_name", "difference"}
            given = {name: value for name, value in given.items() if name in names}
        return cls.from_mapping(given, name=str(path), default=default)
