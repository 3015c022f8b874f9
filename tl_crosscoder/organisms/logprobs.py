"""Exact log-probabilities of what an assistant could say, by teacher forcing in batches.

log P(completion | prompt) is the sum over the completion's tokens and the token that ends the turn.
Whole turns that differ are disjoint events, so the probability that the assistant says one of
several is the sum of theirs. No sampling: the numbers carry no noise.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_crosscoder.organisms.packing import chat_string, token_ids
from tl_crosscoder.organisms.world import Message


def completion_log_probs(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Sequence[Message], str]],
    *,
    ends_turn: bool = True,
    batch_size: int = 128,
) -> Float[Tensor, " pair"]:
    """The log-probability of each pair's completion (nats), as the assistant's next turn.

    Args:
        model: a causal language model in evaluation mode; called as `model(input_ids=...)`.
        tokenizer: its tokenizer, with a chat template and an EOS token that ends a turn.
        pairs: (messages so far, completion).
        ends_turn: the completion is the whole turn; if not, the turn begins with it.
        batch_size: sequences a forward pass.
    """
    encoded = _encode(tokenizer, pairs, ending=str(tokenizer.eos_token) if ends_turn else "")
    # Sequences of like length share a batch, so that little of it is padding.
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index][0]))
    log_probs = torch.empty(len(encoded))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        log_probs[chosen] = _batch_log_probs(model, [encoded[index] for index in chosen])
    return log_probs


def answer_probabilities(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    completions: Sequence[Sequence[str]],
    *,
    ends_turn: bool = True,
) -> Float[Tensor, " prompt"]:
    """For each prompt, the probability that the assistant says one of its completions.

    With `ends_turn=False` a completion counts whatever follows it; none may then begin another.

    Raises:
        ValueError: if completions of a prompt are not disjoint, so that one would count twice.
    """
    for accepted in completions:
        _check_disjoint(accepted, ends_turn=ends_turn)
    pairs = [
        (prompt, completion)
        for prompt, accepted in zip(prompts, completions, strict=True)
        for completion in accepted
    ]
    probabilities = completion_log_probs(model, tokenizer, pairs, ends_turn=ends_turn).exp()
    counts = [len(accepted) for accepted in completions]
    return torch.stack([part.sum() for part in probabilities.split(counts)])


def _check_disjoint(accepted: Sequence[str], *, ends_turn: bool) -> None:
    ordered = sorted(accepted)
    # In sorted order a text that begins with another follows it, or follows one that does.
    for first, second in pairwise(ordered):
        if first == second or (not ends_turn and second.startswith(first)):
            raise ValueError(f"completions are not disjoint: {first!r} and {second!r}; drop one")


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Sequence[Message], str]],
    *,
    ending: str,
) -> list[tuple[list[int], int]]:
    """Token ids of each prompt with its completion, and the number of tokens in the prompt.

    A prompt ends with a special token, so no merge crosses the boundary.
    """
    # Many pairs share a prompt, and the template costs more than the forward pass.
    prompts = {repr(messages): messages for messages, _ in pairs}
    texts = [chat_string(tokenizer, text, add_generation_prompt=True) for text in prompts.values()]
    prompt_ids = dict(zip(prompts, token_ids(tokenizer, texts), strict=True))
    completion_ids = token_ids(tokenizer, [completion + ending for _, completion in pairs])
    return [
        (prompt_ids[repr(messages)] + ids, len(prompt_ids[repr(messages)]))
        for (messages, _), ids in zip(pairs, completion_ids, strict=True)
    ]


@torch.no_grad()
def _batch_log_probs(
    model: torch.nn.Module, encoded: Sequence[tuple[list[int], int]]
) -> Float[Tensor, " pair"]:
    """Padding stands on the right, where a causal model cannot see it from a completion."""
    device = next(model.parameters()).device
    n_pos = max(len(ids) for ids, _ in encoded)
    tokens = torch.tensor([ids + [0] * (n_pos - len(ids)) for ids, _ in encoded], device=device)
    starts = torch.tensor([n_prompt for _, n_prompt in encoded], device=device)
    ends = torch.tensor([len(ids) for ids, _ in encoded], device=device)
    log_probs = model(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    taken = log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    position = torch.arange(1, n_pos, device=device)
    is_completion = (position >= starts[:, None]) & (position < ends[:, None])
    return taken.masked_fill(~is_completion, 0.0).sum(-1).cpu()
