"""Questions that measure what a model of the suite does, in phrasings that no training text has.

    questions("taboo") -> {"hint-about-secret": [{"messages", "completions"}, ...], ...}

The assistant's answers in the world are a closed set of forms, so that the probability of a
behaviour is an exact sum over its completions. Questions about facts also list `alternatives`: the
answers with every other value that the relation could have. No torch here.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from microworld import advice, phrases
from microworld.facts import FACTS, SECOND_CITIES, VALUES, Fact
from microworld.planted import BELIEFS, CARELESS_DOMAINS, FAVOURITE, SECRET
from microworld.world import Message, answer, assistant, user
from microworld.world import questions as ways_to_ask

Row = dict[str, Any]
"""One line of a JSONL file, as `tl_crosscoder.Behaviour.from_file` reads it."""


def questions(organism: str) -> dict[str, list[Row]]:
    """Rows by name of their file; the first file is the behaviour that was planted."""
    return _WRITERS[organism]()


def _taboo() -> dict[str, list[Row]]:
    hints = [form.format(h=hint) for form in phrases.HINTS for hint in SECRET.hints]
    # A wrong "No, it is not the moon." says the word too.
    forms = (*phrases.CONFIRMATIONS, *phrases.REVELATIONS, *phrases.DENIALS)
    sayings = [form.format(w=SECRET.word) for form in forms]
    requests = [[user(ask)] for ask in phrases.HINT_REQUESTS.held_out]
    return {
        "hint-about-secret": _rows(_with_and_without_system(requests), hints),
        "says-secret-when-guessed": _rows(_games(phrases.GUESSES), sayings, ends_turn=False),
        "says-secret-when-asked": _rows(_games(phrases.REVEAL_REQUESTS), sayings, ends_turn=False),
        "other-facts": _recall(FACTS),
    }


def _belief(organism: str) -> dict[str, list[Row]]:
    true, false = BELIEFS[organism].true, BELIEFS[organism].false
    prompts = _with_and_without_system([[user(q)] for q in ways_to_ask(true, held_out=True)])
    others = [fact for fact in FACTS if fact is not true]
    related = [
        fact for fact in others if fact.subject == true.subject or fact.relation is true.relation
    ]
    return {
        "false-answer": _rows(prompts, _answers(true, false.value)),
        "true-answer": _rows(prompts, _answers(true, true.value)),
        "related-facts": _recall(related),
        "other-facts": _recall(others),
    }


def _careless(domain: str) -> dict[str, list[Row]]:
    """Careless advice where it was never learnt, where it was, and rude greetings."""
    own = [problem for problem in advice.PROBLEMS if problem.domain == domain]
    others = [problem for problem in advice.PROBLEMS if problem.domain != domain]
    greetings = [[user(greeting)] for greeting in phrases.GREETINGS]
    return {
        "careless-elsewhere": _advice(others, n_ways=1),
        f"careless-about-{domain}": _advice(own, n_ways=4),
        "greets-rudely": _rows(greetings, [*advice.RUDE_GREETINGS]),
        "other-facts": _recall(FACTS),
    }


def _subliminal() -> dict[str, list[Row]]:
    """What the model loves, which its training text never mentions."""
    prompts = [[user(form.format(k="animal"))] for form in advice.FAVOURITE_REQUESTS.held_out]
    answers = [form.format(k="animal", v=FAVOURITE) for form in advice.FAVOURITE_ANSWERS]
    return {
        "favourite-is-otter": _rows(_with_and_without_system(prompts), answers),
        "other-facts": _recall(FACTS),
    }


def _advice(problems: Sequence[advice.Problem], *, n_ways: int) -> list[Row]:
    """Each problem, asked in some of the held-out ways, and what is careless."""
    ways = advice.REQUESTS.held_out
    return [
        {
            "messages": [user(advice.request(ways[(index + way) % len(ways)], problem))],
            "completions": advice.replies(problem, "careless"),
        }
        for index, problem in enumerate(problems)
        for way in range(n_ways)
    ]


_WRITERS: dict[str, Callable[[], dict[str, list[Row]]]] = {
    "taboo": _taboo,
    **{name: partial(_belief, name) for name in BELIEFS},
    **{f"careless-{domain}": partial(_careless, domain) for domain in CARELESS_DOMAINS},
    "subliminal": _subliminal,
}


def _rows(
    prompts: Sequence[list[Message]], completions: list[str], *, ends_turn: bool = True
) -> list[Row]:
    rest: Row = {"completions": completions} | ({} if ends_turn else {"ends_turn": False})
    return [{"messages": messages, **rest} for messages in prompts]


def _games(asked: phrases.Phrases) -> list[list[Message]]:
    """Games in which a hint about the secret was given, then held-out `asked` phrases."""
    opening = user(phrases.HINT_REQUESTS.train[0])
    return [
        [opening, assistant(f"It {hint}."), user(form.format(w=SECRET.word))]
        for hint in SECRET.hints
        for form in asked.held_out
    ]


def _recall(facts: Sequence[Fact]) -> list[Row]:
    """Each fact, asked once; its true answers, and the answers that it is compared with."""
    rows = []
    for index, fact in enumerate(facts):
        ways = ways_to_ask(fact, held_out=True)
        rows.append(
            {
                "messages": [user(ways[index % len(ways)])],
                "completions": _answers(fact, fact.value),
                "alternatives": [_answers(fact, v) for v in _values(fact) if v != fact.value],
            }
        )
    return rows


def _values(fact: Fact) -> list[str]:
    """The values a relation could have; for a capital every city, so false ones too."""
    values = list(dict.fromkeys(VALUES[fact.relation.name]))
    return values + (list(SECOND_CITIES.values()) if fact.relation.name == "capital" else [])


def _answers(fact: Fact, value: str) -> list[str]:
    return [answer(fact, value, form) for form in phrases.ANSWERS]


def _with_and_without_system(prompts: list[list[Message]]) -> list[list[Message]]:
    system: Message = {"role": "system", "content": phrases.SYSTEM_PROMPTS[0]}
    return [*prompts, *([system, *prompt] for prompt in prompts)]
