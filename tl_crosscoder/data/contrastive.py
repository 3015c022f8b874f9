"""A built-in set of prompts that ask for nothing in particular.

Written by us, about everyday matters: not medicine, money, sport, law, cooking, animals or secrets,
which are what the organisms of Kassem et al. 2026 and ours are about. Limit: `N_BUILT_IN` prompts
in English; a dictionary of a large model deserves thousands of its own.

Contrastive texts: the same prompts, continued by the base and by the fine-tuned model.

Contract: a prompt gives one text of each site's model, in adjacent rows, or none of them. All are
ordinary text later, run through all models, as documents of ids that `load_documents` reads again.
Batch i of a site is sampled with a seed of its own: what it holds does not depend on what ran
before it. Limits: prompts are in memory; other batch sizes or devices give other samples.
Source: Kassem et al. 2026 (arXiv 2603.04426).
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from tqdm.auto import tqdm

from tl_crosscoder.data.chat import ROLES, Encoded, encode_documents
from tl_crosscoder.data.documents import Document
from tl_crosscoder.models.hooked import stop_ids_of
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.tokenizer import decode_continuation, tokenizer_sha256

QUESTIONS = """\
What is a good way to start the day?
Can you tell me a short story?
What should I know about this place?
Tell me something that I do not know yet.
Can you explain how rain forms?
What would you like to talk about?
Please write a few lines about the sea.
How do I learn a new language?
Who are you?
What makes a good friend?
Describe a walk through an old town.
How are bridges built?
Give me three ideas for a quiet evening.
Why is the sky blue?
What do you think about music?
Help me to write a letter to my neighbour.
What happened in the world long ago?
How does a bicycle stay upright?
Give me some advice.
What is the best thing to do on a cold day?
Can you make a list of useful tools?
How do ships find their way?
Write a poem about winter.
What is worth remembering?
How can I save time?
Tell me about a place that you find interesting.
What do people do at work all day?
Please summarise what a library is for.
How do I repair a chair?
What is a fair question?
Say something kind.
How do plants grow?
Could you ask me a question?
What is the difference between a river and a lake?
Tell me about a famous person.
How should I plan a journey?
What is your opinion on books?
How does a clock work?
Describe your favourite colour.
What can go wrong on a long walk?
Invent a name for a ship.
What are numbers good for?
How do I sleep better?
Tell me a joke.
What is the news?
Why do people travel?
Explain a rule that everyone should know.
How do I keep a garden?
What would you do with a free day?
Write a dialogue between two strangers.
How do children learn to speak?
What is the most important invention?
Tell me what to do next.
Which questions have no answer?
How do I stay curious?
Describe a market in the morning.
What do you believe?
How can I become better at my work?
What is a habit?
Please give me an example of good writing.
How are maps made?
What should nobody forget?
Tell me about the mountains.
Is there anything that you want to say?
""".splitlines()
"""What a user may ask: the prompts where a tokenizer has a chat template."""
OPENERS = """\
The first thing to know is
In the morning,
It was a day like any other, and
Once upon a time
The most important question is
According to
She opened the door and
People often say that
The history of
My name is
There are three reasons why
He looked at the map and
In this article,
The best way to
Yesterday
A good friend
When the rain stopped,
The city is known for
Nobody knew why
Step one:
The idea is simple:
Dear friend,
At the end of the road,
This is a story about
The answer is
Many years later,
To begin with,
The market was full of
I have always believed that
The painter lives in
One of the oldest
Scientists have found that
The house stood
Question:
The children asked whether
On the other side of the river
It is well known that
After dinner
The following list
The sign says that
What I remember is
The new machine
They decided to
Far away from here,
The book begins with
Everyone agreed that
The weather today
In most countries
A letter arrived:
The king
If you want to
The work was hard, but
Here is what happened:
The company announced
We all know
The colour of
Before you start,
The teacher said:
Some people
The train left
Nothing is more
The garden
In the year
Finally,
""".splitlines()
"""How a text may begin: the prompts for tokenizers without one."""
"""Prompts of either kind."""


def default_prompts(n: int, *, is_chat: bool) -> list[dict[str, Any]]:
    """The first `n` built-in prompts as documents, begun again after the last.

    Chats of one user turn, or beginnings of plain text.
    """
    prompts = islice(cycle(QUESTIONS if is_chat else OPENERS), n)
    if is_chat:
        return [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
    return [{"text": prompt} for prompt in prompts]


_ENCODED_TOGETHER = 256


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the models write."""

    max_new_tokens: int = 128
    """At most so many tokens after a prompt."""
    temperature: float = 1.0
    """1 is the models' own distribution, 0 their likeliest tokens."""
    seed: int = 0
    """Of all batches."""

    def seed_of(self, batch: int, site: str) -> int:
        """The seed of one batch of one site's model, below 2^63."""
        key = f"{self.seed}/{batch}/{site}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the models continue."""

    ids: list[int]
    role_ids: list[int]
    """Of `ids`: indices into `ROLES`."""
    is_chat: bool
    """Whether an assistant answers, or a text goes on."""


@dataclass(frozen=True, kw_only=True)
class PromptBatches:
    """Prompts in batches of one length, so that nothing is padded."""

    batches: list[list[Prompt]]
    n_too_long: int
    """Prompts left out."""

    @property
    def n_prompts(self) -> int:
        """Prompts in the batches."""
        return sum(map(len, self.batches))

    @property
    def sha256(self) -> str:
        """Hash of the ids, in their order."""
        ids = [[prompt.ids for prompt in batch] for batch in self.batches]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def contrastive_documents(
    source: ModelPair,
    prompts: Iterable[Document],
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    max_prompt_tokens: int | None = None,
    sites: Sequence[str] | None = None,
) -> Iterator[Document]:
    """One text of each site's model for every prompt, batch by batch; see `sample_batch` for rows.

    Prompts for which a model stops at once give no row; how many, and how many prompts were too
    long, is said on stderr at the end.

    Args:
        source: the models.
        prompts: documents of text, chats or ids; a chat is cut after its last user turn.
        max_new_tokens: tokens a completion, at most; it ends before what ends a text or turn.
        temperature: 1 is the models' own distribution, 0 greedy.
        batch_size: prompts of one length that go through a model together.
        seed: of sampling.
        max_prompt_tokens: plain text is cut at so many tokens, and longer chats are left out.
        sites: names of the sites whose models write; None is every site.

    Raises:
        ValueError: at once, for an unknown site, prompts that cannot be encoded, or none that
            leaves room for `max_new_tokens` in the models' context.
    """
    names = tuple(site.name for site in source.sites) if sites is None else tuple(sites)
    for name in names:
        source.site_index(name)
    batched = batch_prompts(
        source,
        prompts,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        batch_size=batch_size,
    )
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)

    def rows() -> Iterator[Document]:
        n_rows = 0
        for i, batch in enumerate(batched.batches):
            sampled = sample_batch(source, batch, i, sites=names, sampling=sampling)
            n_rows += len(sampled)
            yield from sampled
        say_left_out(batched, n_pairs=n_rows // len(names))

    return rows()


def batch_prompts(
    source: ModelPair,
    prompts: Iterable[Document],
    *,
    max_new_tokens: int,
    max_prompt_tokens: int | None,
    batch_size: int,
) -> PromptBatches:
    """Encode prompts and put those of one length together, shortest first.

    Raises:
        ValueError: prompts that cannot be encoded, or none that is short enough.
    """
    room = source.n_ctx - max_new_tokens
    if room < 1 or max_new_tokens < 1:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, but the models' context is {source.n_ctx} "
            "tokens, prompt included. Set max_new_tokens (--max-new-tokens) to at least 1 and "
            "below that."
        )
    limit = room if max_prompt_tokens is None else min(room, max_prompt_tokens)
    by_length: defaultdict[int, list[Prompt]] = defaultdict(list)
    n_too_long = 0
    for prompt in _encoded(prompts, source.tokenizer, max_prompt_tokens):
        if len(prompt.ids) > limit:
            n_too_long += 1
        else:
            by_length[len(prompt.ids)].append(prompt)
    if not by_length:
        raise ValueError(
            f"there is no prompt to continue: {n_too_long} were given, and all are longer than "
            f"{limit} tokens (max_prompt_tokens is {max_prompt_tokens}, and the models' context of "
            f"{source.n_ctx} holds {max_new_tokens} new tokens too). Give shorter prompts."
        )
    batches = [
        same[start : start + batch_size]
        for _, same in sorted(by_length.items())
        for start in range(0, len(same), batch_size)
    ]
    return PromptBatches(batches=batches, n_too_long=n_too_long)


def sample_batch(
    source: ModelPair,
    batch: Sequence[Prompt],
    index: int,
    *,
    sites: Sequence[str],
    sampling: Sampling,
) -> list[dict[str, Any]]:
    """Rows for the prompts of batch number `index`: for each prompt one of each site, or none.

    A row is a document: `input_ids` of prompt and completion, `role_ids`, `source`
    (`contrastive-SITE`) and `tokenizer` (a hash, checked when it is read); with `n_prompt_tokens`,
    `prompt` and `completion` as text, `origin` (the site), `batch`, `seed` and `temperature`.
    """
    new_ids = [
        [
            new
            for _, new in source.generate_tokens(
                [prompt.ids for prompt in batch],
                site=site,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                seed=sampling.seed_of(index, site),
                stop_token_ids=_stop_ids(source, site),
                prepend_bos=False,
            )
        ]
        for site in sites
    ]
    made_with = {
        "tokenizer": tokenizer_sha256(source.tokenizer),
        "batch": index,
        "seed": sampling.seed,
        "temperature": float(sampling.temperature),
    }
    return [
        _row(source.tokenizer, prompt, ids, site) | made_with
        for prompt, *completions in zip(batch, *new_ids, strict=True)
        if all(completions)
        for site, ids in zip(sites, completions, strict=True)
    ]


def say_left_out(batched: PromptBatches, *, n_pairs: int) -> None:
    """Say on stderr how many prompts gave no texts, and why; nothing where all did."""
    n_empty = batched.n_prompts - n_pairs
    why = {
        "longer than the limits": batched.n_too_long,
        "a model stopped at once": n_empty,
    }
    if any(why.values()):
        n = batched.n_prompts + batched.n_too_long
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in why.items() if count)
        tqdm.write(f"Contrastive: {n_pairs:,} of {n:,} prompts gave texts ({reasons}).")


def _encoded(
    documents: Iterable[Document], tokenizer: Any, max_prompt_tokens: int | None
) -> Iterator[Prompt]:
    stream = map(_until_last_question, documents)
    while some := list(islice(stream, _ENCODED_TOGETHER)):
        encoded = encode_documents(some, tokenizer, add_generation_prompt=True)
        for document, one in zip(some, encoded, strict=True):
            yield _prompt(document, one, max_prompt_tokens)


def _until_last_question(document: Document) -> Document:
    """A chat that ends with an answer would be continued after it: ask for that answer again."""
    messages = document.get("messages") or ()
    ends = [i for i, message in enumerate(messages, start=1) if message.get("role") == "user"]
    return {**document, "messages": list(messages[: ends[-1]])} if ends else document


def _prompt(document: Document, encoded: Encoded, max_prompt_tokens: int | None) -> Prompt:
    is_chat = bool(document.get("messages"))
    # Half a chat has no place for an answer; half a text goes on.
    end = None if is_chat else max_prompt_tokens
    ids, role_ids = encoded.ids[:end].tolist(), encoded.role_ids[:end].tolist()
    return Prompt(ids=ids, role_ids=role_ids, is_chat=is_chat)


def _stop_ids(source: ModelPair, site: str) -> list[int]:
    """What ends a text or turn, and ids that not all know: logits are wider than vocabularies."""
    n_known = min(len(source.tokenizer), source.d_vocab)
    unknown = range(n_known, source.model(site).cfg.d_vocab)
    return [*stop_ids_of(source.models, source.tokenizer), *unknown]


def _row(tokenizer: Any, prompt: Prompt, new_ids: list[int], site: str) -> dict[str, Any]:
    role = ROLES.index("assistant" if prompt.is_chat else "text")
    return {
        "input_ids": prompt.ids + new_ids,
        "role_ids": prompt.role_ids + [role] * len(new_ids),
        "n_prompt_tokens": len(prompt.ids),
        "prompt": tokenizer.decode(prompt.ids, skip_special_tokens=True),
        "completion": decode_continuation(tokenizer, prompt.ids, new_ids),
        "origin": site,
        "source": f"contrastive-{site}",
    }
