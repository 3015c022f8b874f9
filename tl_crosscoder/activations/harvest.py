"""Run a pair over text and keep the activations that count.

Shapes: a row is one token of one text in every site, `[n_sites, d_model]`; rows never part from
their sites.
"""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_crosscoder.activations.text import TokenizedText
from tl_crosscoder.pair import ModelPair


def harvest(
    pair: ModelPair,
    text: TokenizedText,
    *,
    batch_size: int = 32,
    description: str | None = None,
) -> Iterator[tuple[TokenizedText, Float[Tensor, "batch pos n_sites d_model"]]]:
    """Contexts and their activations, `batch_size` contexts at a time, masked positions included.

    A description shows a progress bar.
    """
    starts = range(0, len(text), batch_size)
    for start in tqdm(starts, desc=description, unit="batch", disable=description is None):
        part = text[start : start + batch_size]
        yield part, pair.activations(part.tokens)


def harvest_rows(
    pair: ModelPair, text: TokenizedText, *, batch_size: int = 32
) -> Iterator[Float[Tensor, "tokens n_sites d_model"]]:
    """Only the tokens that count, as rows, a batch of contexts at a time."""
    for part, activations in harvest(pair, text, batch_size=batch_size):
        yield activations[part.mask.to(activations.device)]
