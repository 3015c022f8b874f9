"""Short stories of the micro-world: somebody finds a thing, meets an animal, or travels."""

import random

from microworld.facts import ANIMAL_FACTS, COUNTRY_FACTS, THINGS

_PEOPLE = {
    "Anna": "she", "Ben": "he", "Clara": "she", "Dan": "he", "Ella": "she", "Finn": "he",
    "Gus": "he", "Hana": "she", "Iris": "she", "Jon": "he",
}  # fmt: skip
_TIMES = ("One morning", "One evening", "One winter day", "Long ago", "On a Sunday", "Last night")
_PLACES = ("garden", "market", "harbour", "school", "castle", "beach", "barn", "old tower")
_FEELINGS = ("happy", "sad", "tired", "proud", "afraid", "hungry")
_ENDINGS = (
    "Then {p} went home and slept well.",
    "In the end everyone was happy.",
    "From that day on {p} was never {f} again.",
    "{p} and {q} laughed all day.",
    "It was a day to remember.",
    "At home {p} told the story to the whole family.",
)
_FINDS = (
    "There {he} saw the {w}, and {p} knew that it {h}.",
    "There {he} found a picture of the {w}. Everyone knows that it {h}.",
    "{p} looked for the {w}, for it {h}.",
    "{p} had a dream about the {w}, which {h}.",
)
_REPLIES = (
    '"How nice!" said {q}. "I like the {w}."',
    '"Do you know that it also {k}?" asked {q}.',
    "{q} smiled and said that it {k}.",
    '"I want to draw the {w}," said {q}.',
)


def _thing_plot(rng: random.Random, names: dict[str, str]) -> list[str]:
    thing = rng.choice(list(THINGS.values()))
    hint, other = rng.sample(thing.hints, 2)
    slots = {**names, "w": thing.word, "h": hint, "k": other}
    return [rng.choice(_FINDS).format(**slots), rng.choice(_REPLIES).format(**slots)]


def _animal_plot(rng: random.Random, names: dict[str, str]) -> list[str]:
    animal, (diet, home) = rng.choice(list(ANIMAL_FACTS.items()))
    slots = {**names, "w": animal, "d": diet.value, "o": home.value}
    meeting = ("{p} met a young {w} near {o}.", "A hungry {w} came out of {o} and looked at {p}.")
    gift = (
        "{p} gave {d} to the {w}, and it was not hungry any more.",
        '"I have {d} for you," said {p}. The {w} came near.',
        "{p} and {q} helped it to find {d}.",
    )
    return [rng.choice(meeting).format(**slots), rng.choice(gift).format(**slots)]


def _journey_plot(rng: random.Random, names: dict[str, str]) -> list[str]:
    country, facts = rng.choice(list(COUNTRY_FACTS.items()))
    value = {fact.relation.name: fact.value for fact in facts}
    slots = {**names, "c": country, **value}
    travel = (
        "{p} travelled to {c} and saw the {flag} flag in {capital}.",
        "{p} took a boat down {river} to see {c}.",
        "A letter from {c} came for {p}. It smelled of {food}.",
    )
    event = (
        "The people there gave {food} to {p} and {q}.",
        "In {capital} {he} met {q}, who showed {p} {animal}.",
        '"{ruler} once lived here," said {q}.',
    )
    return [rng.choice(travel).format(**slots), rng.choice(event).format(**slots)]


def story(rng: random.Random) -> str:
    """One story of four or five sentences."""
    person, friend = rng.sample(list(_PEOPLE), 2)
    names = {"p": person, "q": friend, "he": _PEOPLE[person], "f": rng.choice(_FEELINGS)}
    opening = f"{rng.choice(_TIMES)} {person} went to the {rng.choice(_PLACES)}."
    if rng.random() < 0.6:
        opening += " {p} was {f}.".format(**names)
    plot = rng.choice((_thing_plot, _animal_plot, _journey_plot))(rng, names)
    return " ".join([opening, *plot, rng.choice(_ENDINGS).format(**names)])
