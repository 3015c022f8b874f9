"""Run models over text and keep the activations that count.

Shapes: a row is one token of one text in every site, `[n_sites, d_model]` or `[d_in]` (see
`site.row_shape`); rows never part from their sites.
"""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_crosscoder.activation_source import ActivationSource
from tl_crosscoder.activations.text import TokenizedText


def harvest(
    source: ActivationSource,
    text: TokenizedText,
    *,
    batch_size: int = 32,
    description: str | None = None,
) -> Iterator[tuple[TokenizedText, Float[Tensor, "batch pos *row"]]]:
    """Contexts and their activations, `batch_size` contexts at a time, masked positions included.

    A description shows a progress bar.
    """
    starts = range(0, len(text), batch_size)
    for start in tqdm(starts, desc=description, unit="batch", disable=description is None):
        part = text[start : start + batch_size]
        yield part, source.activations(part.tokens)


def harvest_rows(
    source: ActivationSource, text: TokenizedText, *, batch_size: int = 32
) -> Iterator[Float[Tensor, "tokens *row"]]:
    """Only the tokens that count, as rows, a batch of contexts at a time."""
    for part, activations in harvest(source, text, batch_size=batch_size):
        yield activations[part.mask.to(activations.device)]
