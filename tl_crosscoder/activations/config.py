"""Which text, and which of its tokens count, as flat fields.

No torch here: the command line reads these classes to print its help.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Any

import tyro

from tl_crosscoder.yaml_config import YamlConfig


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a text is read."""

    text_column: str = "text"
    """Column of the text, or of chats, where there are none under `messages`."""
    max_documents: int | None = None
    """Read at most so many documents."""
    dataset_config: str | None = None
    """Config of a `datasets` name that has several."""
    dataset_split: str = "train"
    """Split of a `datasets` name."""


@dataclass(frozen=True, kw_only=True)
class TextSource(YamlConfig, Reading):
    """One component of a mixture."""

    text: str
    """A .txt, .jsonl or .parquet file, a folder of them, or a `datasets` name, streamed."""
    weight: float = 1.0
    """Share of the tokens, relative to the other components."""
    name: str | None = None
    """What measures call it; None is the file's stem or the dataset's name."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"the weight of {self.text!r} is {self.weight}; it must be above 0.")


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Which tokens do not count: neither trained on nor measured."""

    drop_bos: bool = True
    """Leave out BOS tokens: their norms dwarf all others (attention sink)."""
    n_first: int = 1
    """Positions left out at the start of each context, where models of any kind have a sink."""
    drop_template: bool = False
    """Leave out the tokens of the chat template."""
    max_norm_multiple: float | None = None
    """Leave out tokens whose norm is above so many times the median, in any site."""

    def __post_init__(self) -> None:
        if self.n_first < 0:
            raise ValueError(f"n_first is {self.n_first}; it is 0 or more positions.")
        if self.max_norm_multiple is not None and self.max_norm_multiple <= 1:
            raise ValueError(
                f"max_norm_multiple is {self.max_norm_multiple}; it is above 1, such as 10."
            )


@dataclass(frozen=True, kw_only=True)
class TextConfig(Reading, Masks):
    """The text of a run or of a cache."""

    text: str | None = None
    """A .txt, .jsonl or .parquet file, a folder of them, or a `datasets` name, which is streamed.
    For several, with weights, give `mixture` in a YAML file."""
    mixture: Annotated[tuple[TextSource, ...], tyro.conf.Suppress] = ()
    """Several texts with their shares of the tokens, in place of `text`; in YAML a list of
    mappings with the fields of `TextSource`."""
    context_size: int = 128
    """Tokens a context."""
    pack: bool = True
    """Fill contexts with one document after the other; else each document has its own context,
    cut at `context_size`."""
    held_out: float = 0.1
    """Share of the documents kept for calibration and measures."""

    @property
    def sources(self) -> tuple[TextSource, ...]:
        """The components of the text: those of the mixture, or the one."""
        if self.text is None:
            return self.mixture
        how: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Reading)}
        return (TextSource(text=self.text, **how),)

    def _check_text(self) -> None:
        if self.text is not None and self.mixture:
            raise ValueError(f"give text ({self.text!r}) or mixture, not both.")
        if self.text is not None and not self.text.strip():  # which as a path is this folder
            raise ValueError(f"text is {self.text!r}: name a file, a folder or a `datasets` name.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it is a share, above 0 and below 1.")
        if self.context_size < 2:
            raise ValueError(f"context_size is {self.context_size}; it must be 2 or more.")
        if self.n_first >= self.context_size:
            raise ValueError(
                f"n_first is {self.n_first}, which leaves nothing of contexts of "
                f"{self.context_size} tokens."
            )
        Masks.__post_init__(self)
