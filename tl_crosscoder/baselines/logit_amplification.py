"""Logit-difference amplification: write from l^1 + alpha (l^1 - l^0), more than the fine-tune did.

    alpha 0: the fine-tuned model    -1: the base    > 0: what the fine-tune added, amplified
    < -1: what it took away, amplified

where l^m are the next-token logits of the two models on the same tokens. Contract:
`amplified_logits` gives `[batch, pos, d_vocab]`; generation is greedy or seeded. Logits and
log-probabilities amplify alike, as they differ by a constant a position. Limit: both models run the
whole text again for each new token, without key-value cache.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.models import hooked as hooked_model
from tl_crosscoder.models import tokenizer as tokenization
from tl_crosscoder.models.pair import ModelPair, Prompts


def amplified_logits(
    models: ModelPair,
    tokens: Int[Tensor, "batch pos"],
    *,
    alpha: float,
) -> Float[Tensor, "batch pos d_vocab"]:
    """l^1 + alpha (l^1 - l^0), float32, on the fine-tuned model's device.

    Args:
        models: a pair, or more sites of two models.
        tokens: unpadded, or padded on the right.
        alpha: see the module.

    Raises:
        ValueError: no two models, an unknown site, or tokens that are not theirs.
    """
    base, finetuned = two_models(models)
    ours = models.logits(tokens, site=finetuned).float()
    # In this form alpha 0 and -1 give the models' own logits bit for bit.
    return (1 + alpha) * ours - alpha * models.logits(tokens, site=base).to(ours)


def amplified_tokens(
    models: ModelPair,
    prompts: Prompts,
    *,
    alpha: float,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stop_token_ids: Sequence[int] | None = None,
    prepend_bos: bool = True,
) -> list[tuple[list[int], list[int]]]:
    """Write on from amplified logits: (prompt ids, new ids) for each prompt.

    Prompts of one length run as a batch, so that nothing is padded.

    Args:
        models: a pair, or more sites of two models.
        prompts: one text, several texts or lists of ids, or unpadded tokens.
        alpha: see the module.
        max_new_tokens: of each prompt, at most.
        temperature: 0 is greedy; else amplified logits are divided by it and sampled from.
        seed: of sampling; the same prompt in another batch may go another way.
        stop_token_ids: end a text, and are not part of it; None is those of the tokenizer and of
            both configs, () never stops.
        prepend_bos: to texts; ids are taken as they are.

    Raises:
        ValueError: no two models, an unknown site, prompts without tokens, a negative temperature,
            or more tokens than the models have room for.
    """
    two_models(models)
    each = [prompts] if isinstance(prompts, str) else prompts
    rows = [
        models.encode(p, prepend_bos=prepend_bos) if isinstance(p, str)
        else p.tolist() if isinstance(p, Tensor) else list(p)
        for p in each
    ]  # fmt: skip
    _check(rows, models.n_ctx, max_new_tokens, temperature)
    if stop_token_ids is None:
        stop_token_ids = hooked_model.stop_ids_of(models.models, models.tokenizer)
    generator: torch.Generator | None = None
    new: list[list[int]] = [[] for _ in rows]
    for length in sorted({len(row) for row in rows}):
        going = torch.tensor([i for i, row in enumerate(rows) if len(row) == length])
        tokens = torch.tensor([rows[i] for i in going.tolist()])
        for _ in range(max_new_tokens):
            logits = amplified_logits(models, tokens, alpha=alpha)[:, -1]
            if generator is None:
                generator = torch.Generator(logits.device).manual_seed(seed)
            chosen = _next(logits, temperature, generator).cpu()
            goes_on = ~torch.isin(chosen, torch.tensor(stop_token_ids, dtype=torch.long))
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)[goes_on]
            going, chosen = going[goes_on], chosen[goes_on]
            for i, token in zip(going.tolist(), chosen.tolist(), strict=True):
                new[i].append(token)
            if not len(going):
                break
    return list(zip(rows, new, strict=True))


def amplified_text(models: ModelPair, prompts: Prompts, **options: Any) -> str | list[str]:
    """Text that amplified logits write, without the prompts: a string for one text, else a list.

    Options, and what it raises, are those of `amplified_tokens`.
    """
    pairs = amplified_tokens(models, prompts, **options)
    texts = [tokenization.decode_continuation(models.tokenizer, *pair) for pair in pairs]
    return texts[0] if isinstance(prompts, str) else texts


def _next(
    logits: Float[Tensor, "batch d_vocab"], temperature: float, generator: torch.Generator
) -> Int[Tensor, " batch"]:
    if temperature == 0:
        return logits.argmax(dim=-1)
    p = (logits / temperature).softmax(dim=-1)
    return torch.multinomial(p, 1, generator=generator).squeeze(-1)


def two_models(models: ModelPair) -> tuple[str, str]:
    """Names of the compared sites, base first. Raises ValueError where they are of one model."""
    if not isinstance(models, ModelPair):
        raise ValueError("this is a cache, without models: load those it was made with.")
    base, finetuned = models.compared_names
    if models.model(base) is models.model(finetuned):
        raise ValueError(
            f"the compared sites {base!r} and {finetuned!r} are of one model: choose sites of two "
            f"with comparing(base, finetuned), among {[s.name for s in models.model_sites]}."
        )
    return base, finetuned


def _check(rows: list[list[int]], n_ctx: int, max_new_tokens: int, temperature: float) -> None:
    longest = max(map(len, rows), default=0)
    if max_new_tokens < 1 or longest + max_new_tokens > n_ctx:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after a prompt of {longest} tokens: it must be at "
            f"least 1 and end within the models' context of {n_ctx}."
        )
    if temperature < 0 or not all(rows):
        raise ValueError(
            f"temperature={temperature} must be 0 or above, and each prompt must have a token "
            f"(here {[len(row) for row in rows]}): without BOS, an empty text has none."
        )
