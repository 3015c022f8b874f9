"""What top-ranked latents are about: planted words among their top contexts.

A word counts where it is part of the token-in-context lines that a reader is shown, and more
strictly where a latent's most active token is part of the word itself. Planted words are frequent
in the text, so the same share is measured for latents drawn at random. Limit: finds words, not
behaviour: rankings of null pairs exceed random latents too, so nothing is decided by it.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tl_crosscoder.analysis.examples import Example, examples
from tl_crosscoder.analysis.latents import MIN_ACTIVE_TOKENS
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.data.tokens import TokenizedText


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
    """`share_in_context` of as many active latents drawn at random, mean over draws."""
    share_at_token: float
    """Top tokens of these latents that are part of a planted word."""
    random_share_at_token: float
    """`share_at_token` of as many active latents drawn at random, mean over draws."""

    p_value: float
    """Share of random draws of as many latents whose contexts hold as many planted words."""


def planted_recovery(
    measurement: Measurement,
    text: TokenizedText,
    tokenizer: Any,
    *,
    planted_words: Sequence[str],
    latents: Sequence[int] | None = None,
    n_draws: int = 100,
    seed: int = 0,
) -> Recovery:
    """Compare the ranked latents of a measurement with random ones.

    Args:
        measurement: of a crosscoder on `text`.
        text: the text measured on.
        tokenizer: of the pair.
        planted_words: what a diffing method should surface.
        latents: what was ranked first; None is the ranking of the measurement.
        n_draws: random sets of latents for the comparison.
        seed: of the draws.
    """
    ranked = tuple(latents or (s.latent for s in measurement.top))
    shown = [examples(measurement.top_tokens, j, text, tokenizer) for j in ranked]
    active = (measurement.latents.n_active >= MIN_ACTIVE_TOKENS).nonzero().squeeze(-1).tolist()
    rng = random.Random(seed)
    draws = [rng.sample(active, min(len(ranked), len(active))) for _ in range(n_draws)]
    words = list(planted_words)
    drawn = {j: _Shares.of(examples(measurement.top_tokens, j, text, tokenizer), words)
             for j in sorted({j for draw in draws for j in draw})}  # fmt: skip
    at_random = [sum((drawn[j] for j in draw), _Shares()) for draw in draws]
    ours = _Shares.of([e for es in shown for e in es], words)
    everything = sum(at_random, _Shares())
    return Recovery(
        latents=ranked,
        in_context={w: sum(any(_holds(e, [w]) for e in es) for es in shown) for w in words},
        at_token={w: sum(any(_is_at(e, [w]) for e in es) for es in shown) for w in words},
        share_in_context=ours.in_context,
        random_share_in_context=everything.in_context,
        share_at_token=ours.at_token,
        random_share_at_token=everything.at_token,
        p_value=(1 + sum(s.in_context >= ours.in_context for s in at_random)) / (1 + n_draws),
    )


@dataclass(frozen=True)
class _Shares:
    """Counts of contexts with a planted word, which add up over latents."""

    n: int = 0
    n_in_context: int = 0
    n_at_token: int = 0

    @classmethod
    def of(cls, found: list[Example], words: Sequence[str]) -> "_Shares":
        holds, at = (sum(test(e, words) for e in found) for test in (_holds, _is_at))
        return cls(len(found), holds, at)

    def __add__(self, other: "_Shares") -> "_Shares":
        return _Shares(
            self.n + other.n,
            self.n_in_context + other.n_in_context,
            self.n_at_token + other.n_at_token,
        )

    @property
    def in_context(self) -> float:
        return self.n_in_context / max(1, self.n)

    @property
    def at_token(self) -> float:
        return self.n_at_token / max(1, self.n)


def _holds(example: Example, words: Sequence[str]) -> bool:
    line = example.before + example.token + example.after
    return any(re.search(rf"\b{re.escape(w)}\b", line, re.IGNORECASE) for w in words)


def _is_at(example: Example, words: Sequence[str]) -> bool:
    """Whether the token overlaps an occurrence of a word in its line."""
    line = example.before + example.token + example.after
    start, end = len(example.before), len(example.before) + len(example.token)
    spans = (m.span() for w in words for m in re.finditer(rf"\b{re.escape(w)}\b", line, re.I))
    return any(a < end and b > start for a, b in spans)
