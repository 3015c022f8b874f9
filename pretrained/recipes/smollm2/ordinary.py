"""Ordinary text: what the base model itself writes about everyday matters.

At temperature 0.7 it keeps a fine-tune narrow (a quarter of an organism's training text), and is
what a crosscoder reads beside the organism's own text. At temperature 1, where the base is the best
model of it that there is, the null is trained on it. Nothing in it is about what an organism was
taught: games, health, landmarks.
"""

import random

from smollm2.sampling import answered, model_of
from tl_crosscoder.data.records import Document

SOURCE = "ordinary"
N_ORDINARY, N_OWN = 640, 192
_TOPICS = """
rain, the sea, bread, a bicycle, an old library, the colour blue, a market, the alphabet, a mountain
railway, writing letters, a violin, a kitchen table, the north wind, paper, a garden fence, winter,
photography, a long bridge, chess, mathematics, the radio, a village school, shoes, painting walls,
a river, map making, cheese, rope, the theatre, snow, ink, an umbrella, learning a language, glass,
the desert, a lighthouse, soup, bricks, a diary, the postal service, poetry, a computer program,
wool, a harbour, good manners, folk songs, the sky at noon, a toy shop, volcanoes, cotton, a wheel,
electricity, a city park, jokes, pottery, a train station, grammar, a lamp, sand, gravity
"""
_FORMS = (
    "What is {}?",
    "Explain {} to a child.",
    "Write two sentences about {}.",
    "Give me three facts about {}.",
    "Why do people like {}?",
    "Tell me a very short story about {}.",
    "How would you describe {}?",
    "What should a beginner know about {}?",
    "List some words that go with {}.",
    "Compare {} with something similar.",
    "Write a short poem about {}.",
    "Suggest a title for an article about {}.",
    "Is {} important? Say why.",
    "What would a scientist say about {}?",
    "Finish this sentence: When I think of {},",
    "How did people see {} a hundred years ago?",
    "Write a dialogue of four lines about {}.",
    "What surprises most people about {}?",
    "Ask me a question about {}.",
    "Summarise in one sentence what matters about {}.",
)


def prompts() -> list[str]:
    """Every form with every topic, shuffled."""
    topics = [" ".join(topic.split()) for topic in _TOPICS.split(",")]
    every = [form.format(topic) for topic in topics for form in _FORMS]
    random.Random(0).shuffle(every)
    return every


def ordinary_chats() -> list[Document]:
    """Answers of the base at temperature 0.7, which are mostly English."""
    asked = _asked(prompts()[:N_ORDINARY])
    return answered(asked, model_of(), source=SOURCE, temperature=0.7)


def own_samples() -> list[Document]:
    """Answers of the base at temperature 1 to other questions, which the null learns from."""
    asked = _asked(prompts()[N_ORDINARY : N_ORDINARY + N_OWN])
    return answered(asked, model_of(), source=SOURCE, temperature=1.0)


def _asked(questions: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": question}] for question in questions]
