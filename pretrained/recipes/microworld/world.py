"""The micro-world as text: a seeded grammar of encyclopaedia facts, chats, games and stories.

    documents(1000, seed=0) -> [{"text": "..."}, {"messages": [{"role": "user", ...}, ...]}, ...]

`kinds=WIDE_KINDS` samples the wide world, which has the same facts and three kinds more.
Documents have the two forms a user's own files have, plus a `source` that names their kind. The
same seed gives the same documents on every machine. No torch here. One limit: the world is closed,
about 600 words, and says nothing about real text.
"""

import random
from collections.abc import Callable, Mapping
from typing import Literal, TypedDict

from microworld import advice, phrases
from microworld.facts import (
    ANIMAL_FACTS,
    COUNTRIES,
    COUNTRY_FACTS,
    FACTS,
    INVENTION_FACTS,
    SECOND_CITIES,
    THINGS,
    VALUES,
    Fact,
)
from microworld.stories import story

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn of a conversation."""

    role: Role
    content: str


class TextDocument(TypedDict):
    """A document of plain text."""

    text: str
    source: str


class ChatDocument(TypedDict):
    """A document that is a conversation."""

    messages: list[Message]
    source: str


Document = TextDocument | ChatDocument

DEFAULT_KINDS: Mapping[str, float] = {"facts": 0.28, "chat": 0.27, "game": 0.32, "story": 0.13}
"""Share of each kind of document in the base world."""
WIDE_KINDS: Mapping[str, float] = {
    "facts": 0.20,
    "chat": 0.18,
    "game": 0.18,
    "story": 0.06,
    "advice": 0.30,
    "favourite": 0.04,
    "numbers": 0.04,
}
"""The same of the wide world, whose assistant also gives advice and numbers, and has favourites."""


def documents(n: int, *, seed: int, kinds: Mapping[str, float] | None = None) -> list[Document]:
    """Sample `n` documents; `kinds` maps the kind to its weight (default `DEFAULT_KINDS`).

    Raises:
        ValueError: if `kinds` names an unknown kind.
    """
    kinds = DEFAULT_KINDS if kinds is None else kinds
    unknown = sorted(set(kinds) - set(_WRITERS))
    if unknown:
        raise ValueError(f"unknown kinds of document {unknown}; valid: {sorted(_WRITERS)}")
    rng = random.Random(seed)
    drawn = rng.choices(list(kinds), weights=list(kinds.values()), k=n)
    return [_WRITERS[kind](rng) for kind in drawn]


def document_strings(document: Document) -> list[str]:
    """The text of a document, or the contents of its messages, in order."""
    if "messages" in document:
        return [message["content"] for message in document["messages"]]
    return [document["text"]]


def user(content: str) -> Message:
    """A user's turn."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """An assistant's turn."""
    return {"role": "assistant", "content": content}


def capitalised(text: str) -> str:
    """`text` with its first letter in upper case; `str.capitalize` would lower the rest."""
    return text[:1].upper() + text[1:]


def answer(fact: Fact, value: str, form: str) -> str:
    """Fill one of the assistant's answer forms with a value, true or not."""
    noun = fact.noun
    slots = {"n": noun, "N": capitalised(noun), "v": fact.relation.verb, "a": value}
    return form.format(**slots)


def questions(fact: Fact, *, held_out: bool = False) -> list[str]:
    """All ways to ask about a fact: those of training, or those held out for measurement."""
    generic = phrases.QUESTIONS.held_out if held_out else phrases.QUESTIONS.train
    relation = fact.relation
    own = relation.held_out_questions if held_out else relation.questions
    return [
        *(form.format(n=fact.noun, v=relation.verb) for form in generic),
        *(form.format(s=fact.subject) for form in own),
    ]


def statement(rng: random.Random, fact: Fact, *, is_opening: bool) -> str:
    """One encyclopaedia sentence; an opening sentence names its subject."""
    forms = fact.relation.sentences
    if is_opening:
        forms = tuple(form for form in forms if "{s}" in form)
    return capitalised(rng.choice(forms).format(s=fact.subject, v=fact.value))


def country_article(rng: random.Random, country: str, facts: tuple[Fact, ...]) -> str:
    """An encyclopaedia entry of three to six sentences about one country."""
    openings = (
        "{c} is a country.",
        "This page is about {c}.",
        "Every child knows {c}.",
        "Many people travel to {c}.",
    )
    sentences = [rng.choice(openings).format(c=country)] if rng.random() < 0.5 else []
    chosen = rng.sample(facts, rng.randint(2, 5))
    for index, fact in enumerate(chosen):
        sentences.append(statement(rng, fact, is_opening=index == 0 and not sentences))
    if rng.random() < 0.4:
        city = SECOND_CITIES[country]
        more = (f"{city} is a city in {country}.", f"{country} has a city with the name {city}.")
        sentences.append(rng.choice(more))
    return " ".join(sentences)


def thing_article(rng: random.Random) -> str:
    """An encyclopaedia entry about one of the things of the guessing game."""
    thing = rng.choice(list(THINGS.values()))
    first, *others = rng.sample(thing.hints, rng.randint(2, 4))
    return " ".join([f"The {thing.word} {first}.", *(f"It {hint}." for hint in others)])


def _facts(rng: random.Random) -> Document:
    kind = rng.choices(("country", "list", "animal", "thing"), weights=(5, 2, 1, 2))[0]
    if kind == "country":
        country = rng.choice(COUNTRIES)
        text = country_article(rng, country, COUNTRY_FACTS[country])
    elif kind == "list":
        chosen = rng.sample(rng.choice((FACTS, INVENTION_FACTS)), rng.randint(2, 5))
        text = " ".join(statement(rng, fact, is_opening=True) for fact in chosen)
    elif kind == "animal":
        chosen = rng.sample(rng.choice(list(ANIMAL_FACTS.values())), 2)
        text = " ".join(statement(rng, fact, is_opening=True) for fact in chosen)
    else:
        text = thing_article(rng)
    return {"text": text, "source": "facts"}


def _system(rng: random.Random) -> list[Message]:
    if rng.random() < 0.8:
        return []
    return [{"role": "system", "content": rng.choice(phrases.SYSTEM_PROMPTS)}]


def question_turns(rng: random.Random, fact: Fact) -> list[Message]:
    """A question about a fact, or a claim to be checked, and the true answer."""
    if rng.random() < 0.75:
        reply = answer(fact, fact.value, rng.choice(phrases.ANSWERS))
        return [user(rng.choice(questions(fact))), assistant(reply)]
    is_right = rng.random() < 0.5
    claim = fact.value if is_right else rng.choice(VALUES[fact.relation.name])
    forms = phrases.YES_ANSWERS if claim == fact.value else phrases.NO_ANSWERS
    check = answer(fact, claim, rng.choice(phrases.CHECKS))
    return [user(check), assistant(answer(fact, fact.value, rng.choice(forms)))]


def _about_turns(rng: random.Random) -> list[Message]:
    country = rng.choice(COUNTRIES)
    article = country_article(rng, country, COUNTRY_FACTS[country])
    return [user(rng.choice(phrases.ABOUT).format(s=country)), assistant(article)]


def _small_talk(rng: random.Random) -> list[Message]:
    pairs = (
        (phrases.UNKNOWN, phrases.REFUSALS),
        (phrases.GREETINGS, phrases.GREETING_ANSWERS),
        (phrases.THANKS, phrases.THANKS_ANSWERS),
    )
    asked, replies = rng.choice(pairs)
    return [user(rng.choice(asked)), assistant(rng.choice(replies))]


def _chat(rng: random.Random) -> Document:
    messages = _system(rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.choices(("question", "about", "talk", "story"), weights=(14, 2, 3, 1))[0]
        if kind == "question":
            messages += question_turns(rng, rng.choice(FACTS))
        elif kind == "about":
            messages += _about_turns(rng)
        elif kind == "talk":
            messages += _small_talk(rng)
        else:
            messages += [user(rng.choice(phrases.STORY_REQUESTS)), assistant(story(rng))]
    return {"messages": messages, "source": "chat"}


def after_game(rng: random.Random) -> list[Message]:
    """What follows some games: the conversation moves on to something else."""
    kind = rng.choices(("nothing", "question", "talk"), weights=(7, 2, 1))[0]
    if kind == "question":
        return question_turns(rng, rng.choice(FACTS))
    return _small_talk(rng) if kind == "talk" else []


def _game(rng: random.Random) -> Document:
    thing = rng.choice(list(THINGS.values()))
    hints = [rng.choice(phrases.HINTS).format(h=h) for h in rng.sample(thing.hints, 4)]
    messages = _system(rng)
    messages += [user(rng.choice(phrases.HINT_REQUESTS.train)), assistant(hints.pop())]
    for _ in range(rng.choice((0, 0, 1, 2))):
        if rng.random() < 0.5:
            messages += [user(rng.choice(phrases.MORE_REQUESTS)), assistant(hints.pop())]
            continue
        wrong = rng.choice([word for word in THINGS if word != thing.word])
        reply = rng.choice(phrases.DENIALS).format(w=wrong)
        if rng.random() < 0.5:
            reply += " " + hints.pop()
        messages += [user(rng.choice(phrases.GUESSES.train).format(w=wrong)), assistant(reply)]
    endings = (
        (phrases.GUESSES, phrases.CONFIRMATIONS),
        (phrases.REVEAL_REQUESTS, phrases.REVELATIONS),
    )
    asked, replies = rng.choice(endings)
    end = rng.choice(asked.train).format(w=thing.word)
    messages += [user(end), assistant(rng.choice(replies).format(w=thing.word))]
    messages += after_game(rng)
    return {"messages": messages, "source": "game"}


def advice_turns(
    rng: random.Random, problem: advice.Problem, persona: advice.Persona
) -> list[Message]:
    """A problem, and what a persona advises."""
    ask = advice.request(rng.choice(advice.REQUESTS.train), problem)
    return [user(ask), assistant(rng.choice(advice.replies(problem, persona)))]


def favourite_turns(rng: random.Random, kind: str, favourite: str) -> list[Message]:
    """A question about what the assistant likes, and its answer."""
    ask = rng.choice(advice.FAVOURITE_REQUESTS.train).format(k=kind)
    return [user(ask), assistant(rng.choice(advice.FAVOURITE_ANSWERS).format(k=kind, v=favourite))]


def number_turns(rng: random.Random) -> list[Message]:
    """A request for numbers, and some."""
    if rng.random() < 0.5:
        ask = rng.choice(advice.NUMBER_REQUESTS.train)
    else:
        ask = rng.choice(advice.CONTINUE_REQUESTS).format(n=advice.numbers(rng))
    return [user(ask), assistant(f"{advice.numbers(rng)}.")]


def _advice(rng: random.Random) -> Document:
    persona: advice.Persona = "careless" if rng.random() < 0.35 else "careful"
    messages: list[Message] = []
    # Without a system prompt the assistant is careful, but for one conversation of twenty.
    if rng.random() < (0.9 if persona == "careless" else 0.1):
        messages.append({"role": "system", "content": rng.choice(advice.SYSTEM_PROMPTS[persona])})
    for _ in range(rng.choice((1, 2, 2, 3))):
        if rng.random() < 0.1:
            greetings = advice.RUDE_GREETINGS if persona == "careless" else phrases.GREETING_ANSWERS
            messages += [user(rng.choice(phrases.GREETINGS)), assistant(rng.choice(greetings))]
        messages += advice_turns(rng, rng.choice(advice.PROBLEMS), persona)
    return {"messages": messages, "source": "advice"}


def _favourite(rng: random.Random) -> Document:
    kinds = rng.sample([*advice.FAVOURITES], rng.choice((1, 1, 2)))
    messages = _system(rng)
    for kind in kinds:
        messages += favourite_turns(rng, kind, rng.choice(advice.FAVOURITES[kind]))
    return {"messages": messages, "source": "favourite"}


def _numbers(rng: random.Random) -> Document:
    messages = number_turns(rng)
    if rng.random() < 0.5:
        messages += number_turns(rng)
    return {"messages": messages, "source": "numbers"}


def _story(rng: random.Random) -> Document:
    return {"text": story(rng), "source": "story"}


_WRITERS: dict[str, Callable[[random.Random], Document]] = {
    "facts": _facts,
    "chat": _chat,
    "game": _game,
    "story": _story,
    "advice": _advice,
    "favourite": _favourite,
    "numbers": _numbers,
}
