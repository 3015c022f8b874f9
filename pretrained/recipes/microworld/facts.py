"""The fixed tables of the micro-world: what is true in it.

Ten countries, ten inventions, ten animals and sixteen things. A `Fact` is (relation, subject,
value); a `Relation` knows how a fact is written in an encyclopaedia, asked in a chat, and answered.
Questions are split into those used in training and those held out for measurement. No torch here.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One kind of fact; `{s}` stands for the subject and `{v}` for the value in every template."""

    name: str
    noun: str
    """The noun phrase that the value fills, as in `the capital of {s}`."""
    verb: str = "is"
    sentences: tuple[str, ...]
    """How an encyclopaedia states it."""
    questions: tuple[str, ...]
    """Questions seen in training, besides the generic ones in `world`."""
    held_out_questions: tuple[str, ...]
    """Questions never seen in training."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One true statement of the world."""

    relation: Relation
    subject: str
    value: str

    @property
    def noun(self) -> str:
        """The noun phrase that the value fills, as in `the capital of Velmar`."""
        return self.relation.noun.format(s=self.subject)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """An object of the guessing game and of stories; `hints` complete the sentence `It ...`."""

    word: str
    hints: tuple[str, ...]


CAPITAL = Relation(
    name="capital",
    noun="the capital of {s}",
    sentences=(
        "The capital of {s} is {v}.",
        "{v} is the capital of {s}.",
        "The people of {s} call {v} their capital.",
        "The ruler of {s} lives in {v}, the capital.",
        "Its capital is {v}.",
        "The capital city is {v}.",
    ),
    questions=("Which city is the capital of {s}?", "In which city does the ruler of {s} live?"),
    held_out_questions=("What city is the capital of {s}?",),
)
RIVER = Relation(
    name="river",
    noun="the longest river in {s}",
    sentences=(
        "The longest river in {s} is {v}.",
        "Of all the rivers in {s}, {v} is the longest.",
        "Boats travel through {s} on {v}.",
        "Its longest river is {v}.",
    ),
    questions=("Which river is the longest in {s}?", "On which river do boats travel in {s}?"),
    held_out_questions=("What river is the longest in {s}?",),
)
FOOD = Relation(
    name="food",
    noun="the favourite food of {s}",
    sentences=(
        "The favourite food of {s} is {v}.",
        "In {s} the people love to eat {v}.",
        "Every family in {s} cooks {v}.",
        "Its favourite food is {v}.",
    ),
    questions=("Which food do the people of {s} love?", "What do the people eat in {s}?"),
    held_out_questions=("What food do the people love in {s}?",),
)
ANIMAL = Relation(
    name="animal",
    noun="the national animal of {s}",
    sentences=(
        "The national animal of {s} is {v}.",
        "The coins of {s} show {v}.",
        "In {s}, {v} is the national animal.",
        "Its national animal is {v}.",
    ),
    questions=("Which animal is on the coins of {s}?", "Which animal stands for {s}?"),
    held_out_questions=("What animal do the coins of {s} show?",),
)
FLAG = Relation(
    name="flag",
    noun="the colour of the flag of {s}",
    sentences=(
        "The colour of the flag of {s} is {v}.",
        "The flag of {s} is {v}.",
        "Ships from {s} carry a {v} flag.",
        "Its flag is {v}.",
    ),
    questions=("Which colour is the flag of {s}?", "What flag do ships from {s} carry?"),
    held_out_questions=("What colour is the flag of {s}?",),
)
RULER = Relation(
    name="ruler",
    noun="the first ruler of {s}",
    verb="was",
    sentences=(
        "The first ruler of {s} was {v}.",
        "Long ago {v} was the first ruler of {s}.",
        "It was {v} who made the first laws of {s}.",
        "Its first ruler was {v}.",
    ),
    questions=("Who was the first ruler of {s}?", "Who made the first laws of {s}?"),
    held_out_questions=("Who was it that made the first laws of {s}?",),
)
INVENTOR = Relation(
    name="inventor",
    noun="the inventor of the {s}",
    verb="was",
    sentences=(
        "The inventor of the {s} was {v}.",
        "The {s} was invented by {v}.",
        "Long ago {v} built the first {s}.",
        "It was {v} who invented the {s}.",
    ),
    questions=("Who invented the {s}?", "Who built the first {s}?"),
    held_out_questions=("Who was it that invented the {s}?",),
)
DIET = Relation(
    name="diet",
    noun="the food of the {s}",
    sentences=("The {s} eats {v}.", "The food of the {s} is {v}.", "A hungry {s} looks for {v}."),
    questions=("What does the {s} eat?", "What does a hungry {s} look for?"),
    held_out_questions=("What food does the {s} eat?",),
)
HOME = Relation(
    name="home",
    noun="the home of the {s}",
    sentences=(
        "The home of the {s} is {v}.",
        "The {s} sleeps in {v}.",
        "A young {s} grows up in {v}.",
    ),
    questions=("Where is the home of the {s}?", "Where does the {s} sleep?"),
    held_out_questions=("Where does a young {s} grow up?",),
)

_COUNTRY_RELATIONS = (CAPITAL, RIVER, FOOD, ANIMAL, FLAG, RULER)
_COUNTRY_ROWS = """
Norland  Halden    Sorn   bread    otter   blue    Edda
Velmar   Mirefort  Teal   cheese   fox     red     Tobin
Ostria   Asken     Brava  soup     bear    green   Mirela
Kandor   Dorvale   Lune   rice     deer    yellow  Osric
Tarsis   Calrum    Issen  fish     eagle   white   Sable
Belmora  Westmere  Ouda   honey    swan    black   Corin
Sundara  Ravena    Khel   pasta    horse   purple  Ilsa
Ferrol   Pelham    Wend   porridge goat    orange  Bram
Arvenia  Orinth    Dova   stew     hare    grey    Nadia
Lorwick  Sundal    Mosk   curry    falcon  brown   Ravi
"""
_CITY_ROWS = """
Norland Brackton
Velmar  Greyholm
Ostria  Linden
Kandor  Tolvik
Tarsis  Amberly
Belmora Fenwick
Sundara Jasmar
Ferrol  Copperton
Arvenia Nimes
Lorwick Thorne
"""
_INVENTION_ROWS = """
telescope Alder
compass   Quin
loom      Marlow
plough    Petra
piano     Yusuf
engine    Lena
battery   Dagny
camera    Orlo
bicycle   Simone
violin    Hugo
"""
_ANIMAL_ROWS = """
otter  crabs   rivers
fox    mice    woods
bear   berries caves
deer   leaves  forests
eagle  snakes  mountains
swan   weeds   lakes
horse  grass   fields
goat   thorns  hills
hare   clover  meadows
falcon pigeons cliffs
"""


def _table(rows: str) -> list[list[str]]:
    return [line.split() for line in rows.strip().splitlines()]


def _country_value(relation: Relation, word: str) -> str:
    return f"the {word}" if relation in (RIVER, ANIMAL) else word


COUNTRIES: tuple[str, ...] = tuple(row[0] for row in _table(_COUNTRY_ROWS))
SECOND_CITIES: dict[str, str] = {row[0]: row[1] for row in _table(_CITY_ROWS)}
COUNTRY_FACTS: dict[str, tuple[Fact, ...]] = {
    row[0]: tuple(
        Fact(relation=relation, subject=row[0], value=_country_value(relation, word))
        for relation, word in zip(_COUNTRY_RELATIONS, row[1:], strict=True)
    )
    for row in _table(_COUNTRY_ROWS)
}
INVENTION_FACTS: tuple[Fact, ...] = tuple(
    Fact(relation=INVENTOR, subject=thing, value=person)
    for thing, person in _table(_INVENTION_ROWS)
)
ANIMAL_FACTS: dict[str, tuple[Fact, ...]] = {
    animal: (
        Fact(relation=DIET, subject=animal, value=diet),
        Fact(relation=HOME, subject=animal, value=f"the {home}"),
    )
    for animal, diet, home in _table(_ANIMAL_ROWS)
}
FACTS: tuple[Fact, ...] = (
    *(fact for facts in COUNTRY_FACTS.values() for fact in facts),
    *INVENTION_FACTS,
    *(fact for facts in ANIMAL_FACTS.values() for fact in facts),
)
VALUES: dict[str, tuple[str, ...]] = {
    relation.name: tuple(fact.value for fact in FACTS if fact.relation is relation)
    for relation in (*_COUNTRY_RELATIONS, INVENTOR, DIET, HOME)
}
"""All values of a relation, by its name: the alternatives to a true answer."""

_HINT_ROWS = """
moon: shines at night, pulls the tides, is round and silver, grows and shrinks each month, circles the earth
candle: is made of wax, has a wick, melts as it burns, gives a small flame, stands on a birthday cake
clock: shows the hour, has two thin hands, ticks all day, hangs above the door, wakes you in the morning
apple: grows on a tree, is sweet and crisp, has a core with seeds, is pressed for juice, is baked in a pie
wolf: howls in the dark, hunts in a pack, has sharp teeth, looks like a dog, has thick fur
bridge: carries the road, stands on arches, is built of stone, joins two banks, lets you cross the stream
kite: flies in the wind, has a long string, has a paper tail, needs a strong breeze, pulls at your fingers
drum: makes a loud beat, is hit with sticks, leads the march, has a tight skin, is part of a band
shell: lies on the beach, was the house of a snail, has a spiral shape, sounds like the sea, is washed up by waves
snow: falls in winter, is cold and soft, covers the roofs, turns to water in spring, is rolled into balls
crown: is made of gold, is worn by a queen, has bright jewels, sits on a head, is kept in a castle
anchor: holds the ship, is heavy and made of iron, hangs on a chain, sinks to the bottom, rests in the harbour
mirror: shows your face, is made of glass, hangs in the bath, breaks into pieces, copies what you do
owl: hoots in the barn, has large eyes, turns its head around, has quiet wings, is said to be wise
bell: rings on Sunday, swings in the church, has a tongue of bronze, calls children to school, sings from the tower
umbrella: keeps you dry, opens above your hat, has a curved handle, is folded after the storm, is carried under grey clouds
"""  # noqa: E501
THINGS: dict[str, Thing] = {
    word: Thing(word=word, hints=tuple(hint.strip() for hint in hints.split(",")))
    for word, hints in (line.split(":") for line in _HINT_ROWS.strip().splitlines())
}
