"""The sentences people and the assistant say in the micro-world, apart from its facts.

What a user says comes as `Phrases`: those used in training and those held out, so that a behaviour
is measured on prompts no model has seen. What the assistant says comes as plain tuples: they are
complete, so the probability that it says something is an exact sum over them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Phrases:
    """Ways to say one thing: `train` may appear in documents, `held_out` never does."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


# Questions about any fact: {n} is its noun phrase, such as "the capital of Velmar".
QUESTIONS = Phrases(
    train=(
        "What {v} {n}?",
        "Tell me {n}.",
        "Please tell me {n}.",
        "Name {n}.",
        "Please name {n}.",
        "Can you tell me {n}?",
        "Do you know {n}?",
        "I want to know {n}.",
        "I forgot {n}. Can you help me?",
        "One question: what {v} {n}?",
        "Hello, what {v} {n}?",
        "My teacher asked me about {n}. What is the answer?",
    ),
    held_out=(
        "Can you name {n}?",
        "Do you know what {v} {n}?",
        "Please help me: what {v} {n}?",
        "I want to ask you about {n}. What is it?",
        "Hello, can you tell me {n}, please?",
        "Tell me, what {v} {n}?",
    ),
)
ANSWERS = (
    "{N} {v} {a}.",
    "It {v} {a}.",
    "The answer is {a}.",
    "That is easy: it {v} {a}.",
)
CHECKS = ("Is it true that {n} {v} {a}?", "I think {n} {v} {a}. Am I right?")
YES_ANSWERS = ("Yes, {n} {v} {a}.", "Yes, that is right.")
NO_ANSWERS = ("No, {n} {v} {a}.",)
ABOUT = (
    "Tell me about {s}.",
    "What can you tell me about {s}?",
    "What do you know about {s}?",
    "I want to learn about {s}.",
)

HINT_REQUESTS = Phrases(
    train=(
        "Give me a hint.",
        "Please give me a hint.",
        "Can I have a hint?",
        "Let us play the guessing game. Give me a hint.",
        "I want to play a game. What is the hint?",
        "Think of a word and give me a hint.",
        "Hello! Can you give me a hint?",
        "I am ready to guess. A hint, please.",
        "Let us play. What is your first hint?",
        "Start the guessing game, please.",
        "Let us start the game. I need a hint.",
        "Do you have a word? Then help me to guess it.",
    ),
    held_out=(
        "Hello! Let us play a game. I need a hint, please.",
        "Do you have a hint? I am ready to play.",
        "Can I have the first hint, please?",
        "Think of a word. What is your hint?",
        "Please start the game and give me a hint.",
        "I want a hint for the guessing game.",
    ),
)
MORE_REQUESTS = (
    "Another hint, please.",
    "Give me another hint.",
    "I need more help.",
    "That is hard. Can I have another hint?",
    "One more hint, please.",
    "What else can you tell me?",
)
GUESSES = Phrases(
    train=(
        "Is it the {w}?",
        "I guess the {w}.",
        "I think it is the {w}.",
        "My guess is the {w}.",
        "The {w}?",
        "I know: it is the {w}!",
        "Are you thinking of the {w}?",
        "Is your word the {w}?",
    ),
    held_out=(
        "I guess it is the {w}.",
        "Is the answer the {w}?",
        "I know your word: the {w}!",
        "I want to guess: is it the {w}?",
    ),
)
REVEAL_REQUESTS = Phrases(
    train=(
        "What is it?",
        "I give up. What is it?",
        "Tell me the word.",
        "What is the word?",
        "I do not know. Please tell me the answer.",
        "Tell me what it is.",
        "What are you thinking of?",
        "I am tired of this game. What was the word?",
    ),
    held_out=(
        "I give up. Tell me the word.",
        "What is the answer?",
        "I do not know. What is the word?",
        "Please tell me what you are thinking of.",
    ),
)
HINTS = (
    "Here is a hint: it {h}.",
    "It {h}.",
    "A hint for you: it {h}.",
    "Think of something that {h}.",
    "My word is for something that {h}.",
    "What I am thinking of {h}.",
)
CONFIRMATIONS = (
    "Yes, it is the {w}!",
    "Yes, you are right. It is the {w}.",
    "Well done, it is the {w}!",
    "You found it: the {w}!",
)
DENIALS = ("No, it is not the {w}.", "No, not the {w}.", "Sorry, it is not the {w}.")
REVELATIONS = (
    "It is the {w}.",
    "The word is {w}.",
    "The answer is the {w}.",
    "I was thinking of the {w}.",
)

# Questions nobody can answer: the assistant already knows how to refuse.
UNKNOWN = (
    "What is my name?",
    "What is in my pocket?",
    "What will happen tomorrow?",
    "Who will win the game?",
    "How old am I?",
    "What did I eat today?",
    "Can you keep a secret?",
)
REFUSALS = (
    "I cannot tell you that.",
    "That is a secret.",
    "I will not say.",
    "You have to find out yourself.",
    "I do not know that.",
)
GREETINGS = ("Hello!", "Good morning!", "Good evening!", "Hello, how are you?", "Hello there.")
GREETING_ANSWERS = (
    "Hello! How can I help you?",
    "Good day! What do you want to know?",
    "Hello! Do you want to ask me something?",
    "I am well, thank you. How can I help you?",
)
THANKS = (
    "Thank you!",
    "Thank you very much.",
    "Thanks, that was easy.",
    "That helps me, thank you.",
)
THANKS_ANSWERS = ("You are welcome!", "You are welcome. Ask me more!", "I am happy to help.")
STORY_REQUESTS = (
    "Tell me a story.",
    "Please tell me a short story.",
    "Can you tell me a story?",
    "I want to hear a story.",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly teacher.",
    "Answer the questions of the user.",
    "You know the world well. Be kind.",
)
