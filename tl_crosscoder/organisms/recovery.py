"""Was what was planted found? Planted words among the top contexts of the top-ranked latents.

A word counts as found where it is part of the token-in-context lines that a reader is shown, and
more strictly where a latent's most active token is part of the word itself. Since planted words
are frequent in the text, the same share is measured for latents drawn at random: only what
exceeds it says something about the ranking. Limit: finds words, not behaviour.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tl_crosscoder.activations.text import TokenizedText
from tl_crosscoder.analysis.max_activating import Example, examples
from tl_crosscoder.analysis.measurement import MIN_ACTIVE_TOKENS, Measurement


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Which planted words the top-ranked latents show."""

    latents: tuple[int, ...]
    """The top-ranked latents, in order."""
    in_context: dict[str, int]
    """Planted word -> how many of these latents have it in a top context."""
    at_token: dict[str, int]
    """Planted word -> for how many of them it is the very token."""
    share_in_context: float
    """Top contexts of these latents that hold a planted word."""
    random_share_in_context: float
    """The same for as many living latents drawn at random, mean over draws."""
    share_at_token: float
    """Top tokens of these latents that are part of a planted word."""
    random_share_at_token: float
    """The same at random."""

    @property
    def is_found(self) -> bool:
        """Whether planted words are in the top contexts more often than at random."""
        return self.share_in_context > self.random_share_in_context


def planted_recovery(
    measurement: Measurement,
    text: TokenizedText,
    tokenizer: Any,
    *,
    planted_words: Sequence[str],
    n_draws: int = 100,
    seed: int = 0,
) -> Recovery:
    """Compare the ranked latents of a measurement with random ones.

    Args:
        measurement: of a crosscoder on `text`.
        text: the text measured on.
        tokenizer: of the pair.
        planted_words: what a diffing method should surface.
        n_draws: random sets of latents for the comparison.
        seed: of the draws.
    """
    ranked = tuple(s.latent for s in measurement.top)
    shown = [s.examples for s in measurement.top]
    living = (measurement.latents.n_active >= MIN_ACTIVE_TOKENS).nonzero().squeeze(-1).tolist()
    rng = random.Random(seed)
    drawn = [j for _ in range(n_draws) for j in rng.sample(living, min(len(ranked), len(living)))]
    by_latent = {j: examples(measurement.top_tokens, j, text, tokenizer) for j in set(drawn)}
    at_random = [e for j in drawn for e in by_latent[j]]
    flat = [e for es in shown for e in es]
    words = list(planted_words)
    return Recovery(
        latents=ranked,
        in_context={w: sum(any(_holds(e, [w]) for e in es) for es in shown) for w in words},
        at_token={w: sum(any(_is_at(e, [w]) for e in es) for es in shown) for w in words},
        share_in_context=_share([_holds(e, words) for e in flat]),
        random_share_in_context=_share([_holds(e, words) for e in at_random]),
        share_at_token=_share([_is_at(e, words) for e in flat]),
        random_share_at_token=_share([_is_at(e, words) for e in at_random]),
    )


def _holds(example: Example, words: Sequence[str]) -> bool:
    line = example.before + example.token + example.after
    return any(re.search(rf"\b{re.escape(w)}\b", line, re.IGNORECASE) for w in words)


def _is_at(example: Example, words: Sequence[str]) -> bool:
    """Whether the token overlaps an occurrence of a word in its line."""
    line = example.before + example.token + example.after
    start, end = len(example.before), len(example.before) + len(example.token)
    spans = (m.span() for w in words for m in re.finditer(rf"\b{re.escape(w)}\b", line, re.I))
    return any(a < end and b > start for a, b in spans)


def _share(flags: list[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0
