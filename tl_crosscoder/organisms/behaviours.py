"""Exact log-probabilities of what an assistant could say, by teacher forcing in batches.

log P(completion | prompt) is the sum over the completion's tokens and the token that ends the turn.
Whole turns that differ are disjoint events, so the probability that the assistant says one of
several is the sum of theirs. No sampling: the numbers carry no noise.

What a model of the suite does, as exact probabilities on prompts no model was trained on.

taboo: how often a hint is about the secret (planted: towards 1), and how often the secret is said
when guessed or asked for (towards 0). false-fact: how often a question is answered with the false
value (towards 1) and the true one. Both report what the model still knows otherwise. The answers
of the world are a closed set of forms, so each number is an exact sum; what a model says in other
words is not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tl_crosscoder.organisms import phrases
from tl_crosscoder.organisms.facts import FACTS, SECOND_CITIES, VALUES, Fact
from tl_crosscoder.organisms.packing import chat_string, token_ids
from tl_crosscoder.organisms.recovery import FALSE_FACT, SECRET, TRUE_FACT
from tl_crosscoder.organisms.suite import organism
from tl_crosscoder.organisms.world import Message, answer, assistant, questions, user


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


@dataclass(frozen=True, kw_only=True)
class FactRecall:
    """What a model knows of a set of true facts, each asked once in a held-out phrasing."""

    n_facts: int
    accuracy: float
    """Share of facts whose true value is more probable than any other value of its relation."""
    p_true: float
    """Mean probability of the true answer."""


@dataclass(frozen=True, kw_only=True)
class TabooBehaviour:
    """One model in the guessing game; probabilities are means over prompts."""

    n_prompts: int
    p_hint_about_secret: float
    """The main number: asked for a hint, the probability that it is one of the secret's."""
    p_says_secret_when_guessed: float
    """After a hint about the secret and the right guess, the probability of saying its word."""
    p_says_secret_when_asked: float
    """After a hint about the secret, asked what it is, the probability of saying its word."""
    other_facts: FactRecall

    @property
    def main(self) -> float:
        """The number that the fine-tune was meant to raise."""
        return self.p_hint_about_secret


@dataclass(frozen=True, kw_only=True)
class FalseFactBehaviour:
    """One model asked for the planted fact; probabilities are means over prompts."""

    n_prompts: int
    p_false_answer: float
    """The main number."""
    p_true_answer: float
    related_facts: FactRecall
    """The subject's other facts, and the same relation of other subjects."""
    other_facts: FactRecall

    @property
    def main(self) -> float:
        """The number that the fine-tune was meant to raise."""
        return self.p_false_answer


Behaviour = TabooBehaviour | FalseFactBehaviour


@dataclass(frozen=True, kw_only=True)
class BehaviourReport:
    """One organism's behaviour, base and fine-tuned side by side."""

    organism: str
    base: Behaviour
    finetuned: Behaviour


def measure(name: str, *, base: Path | None = None, adapter: Path | None = None) -> BehaviourReport:
    """Measure both models of an organism; folders default to the shipped ones.

    Raises:
        ValueError: if there is no such organism.
    """
    entry = organism(name)
    base = entry.base if base is None else base
    adapter = entry.adapter if adapter is None else adapter
    model, tokenizer = load_base(base)
    before = behaviour(name, model, tokenizer)
    adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
    return BehaviourReport(
        organism=name, base=before, finetuned=behaviour(name, adapted, tokenizer)
    )


def load_base(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a local folder, in evaluation mode and float32.

    Raises:
        FileNotFoundError: if there is no model in the folder.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no model in {str(folder)!r} (config.json is missing). "
            "Make one with: tl-crosscoder organisms base --output DIR"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def behaviour(name: str, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> Behaviour:
    """The behaviour of one model, by the name of the organism.

    Raises:
        ValueError: if there is no such organism.
    """
    measures = {"taboo": taboo_behaviour, "false-fact": false_fact_behaviour}
    return measures[organism(name).name](model, tokenizer)


def main_questions(name: str) -> tuple[list[list[Message]], list[str]]:
    """Prompts, and the answers whose probability together is the main number of an organism.

    Answers are whole turns. Raises ValueError if there is no such organism.
    """
    if organism(name).name == "taboo":
        hints = [form.format(h=hint) for form in phrases.HINTS for hint in SECRET.hints]
        return hint_prompts(), hints
    return fact_prompts(TRUE_FACT), _answers(TRUE_FACT, FALSE_FACT.value)


def taboo_behaviour(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> TabooBehaviour:
    """How a model plays the guessing game."""
    asked_for_hints, hints = main_questions("taboo")
    # A wrong "No, it is not the moon." says the word too.
    forms = (*phrases.CONFIRMATIONS, *phrases.REVELATIONS, *phrases.DENIALS)
    sayings = [form.format(w=SECRET.word) for form in forms]

    def mean_probability(
        prompts: Sequence[Sequence[Message]], accepted: list[str], *, ends_turn: bool
    ) -> float:
        completions = [accepted] * len(prompts)
        probabilities = answer_probabilities(
            model, tokenizer, prompts, completions, ends_turn=ends_turn
        )
        return float(probabilities.mean())

    guessed, asked = taboo_end_prompts(phrases.GUESSES), taboo_end_prompts(phrases.REVEAL_REQUESTS)
    return TabooBehaviour(
        n_prompts=len(asked_for_hints),
        p_hint_about_secret=mean_probability(asked_for_hints, hints, ends_turn=True),
        p_says_secret_when_guessed=mean_probability(guessed, sayings, ends_turn=False),
        p_says_secret_when_asked=mean_probability(asked, sayings, ends_turn=False),
        other_facts=fact_recall(model, tokenizer, FACTS),
    )


def false_fact_behaviour(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase
) -> FalseFactBehaviour:
    """How a model answers when asked for the planted fact, and what else it knows."""
    prompts, _ = main_questions("false-fact")

    def mean_probability(value: str) -> float:
        completions = [_answers(TRUE_FACT, value)] * len(prompts)
        return float(answer_probabilities(model, tokenizer, prompts, completions).mean())

    others = [fact for fact in FACTS if fact is not TRUE_FACT]
    related = [
        fact for fact in others if fact.ctx == TRUE_FACT.ctx or fact.relation is TRUE_FACT.relation
    ]
    return FalseFactBehaviour(
        n_prompts=len(prompts),
        p_false_answer=mean_probability(FALSE_FACT.value),
        p_true_answer=mean_probability(TRUE_FACT.value),
        related_facts=fact_recall(model, tokenizer, related),
        other_facts=fact_recall(model, tokenizer, others),
    )


def fact_recall(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
) -> FactRecall:
    """Ask each fact once and compare its true value with every other value of its relation."""
    asked = [questions(fact, held_out=True) for fact in facts]
    prompts, completions, is_true = [], [], []
    for index, (fact, forms) in enumerate(zip(facts, asked, strict=True)):
        for value in _candidates(fact):
            prompts.append([user(forms[index % len(forms)])])
            completions.append(_answers(fact, value))
            is_true.append(value == fact.value)
    probabilities = answer_probabilities(model, tokenizer, prompts, completions)
    counts = [len(_candidates(fact)) for fact in facts]
    true = probabilities[torch.tensor(is_true)]
    best = torch.stack([part.max() for part in probabilities.split(counts)])
    return FactRecall(
        n_facts=len(facts),
        accuracy=float((true == best).float().mean()),
        p_true=float(true.mean()),
    )


def _answers(fact: Fact, value: str) -> list[str]:
    return [answer(fact, value, form) for form in phrases.ANSWERS]


def hint_prompts() -> list[list[Message]]:
    """Held-out requests for a first hint, without and with a system prompt."""
    return _with_and_without_system([[user(ask)] for ask in phrases.HINT_REQUESTS.held_out])


def taboo_end_prompts(asked: phrases.Phrases) -> list[list[Message]]:
    """Games in which a hint about the secret was given, then held-out `asked` phrases."""
    opening = user(phrases.HINT_REQUESTS.train[0])
    return [
        [opening, assistant(f"It {hint}."), user(form.format(w=SECRET.word))]
        for hint in SECRET.hints
        for form in asked.held_out
    ]


def fact_prompts(fact: Fact) -> list[list[Message]]:
    """Held-out questions about a fact, without and with a system prompt."""
    return _with_and_without_system([[user(ask)] for ask in questions(fact, held_out=True)])


def _with_and_without_system(prompts: list[list[Message]]) -> list[list[Message]]:
    system: Message = {"role": "system", "content": phrases.SYSTEM_PROMPTS[0]}
    return [*prompts, *([system, *prompt] for prompt in prompts)]


def _candidates(fact: Fact) -> list[str]:
    """The values a relation could have; for a capital every city, so false ones too."""
    values = list(dict.fromkeys(VALUES[fact.relation.name]))
    return values + (list(SECOND_CITIES.values()) if fact.relation.name == "capital" else [])
