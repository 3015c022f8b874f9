"""Contrastive texts: the same prompts, continued by the base and by the fine-tuned model.

A prompt gives one text of each site's model, in adjacent rows, or none at all. The texts are
documents of token ids that every model reads later, like any other text. Each batch of each site
has its own seed, so a batch does not depend on what ran before it, and a killed run can go on.
Limits: all prompts are in memory; another batch size or device gives other samples.
Source: Kassem et al. 2026 (arXiv 2603.04426).
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from tl_crosscoder.data.chat import ROLES, EncodedDocument, encode_stream
from tl_crosscoder.data.documents import Document
from tl_crosscoder.models.hooked import stop_ids_of
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.tokenizer import decode_continuation, tokenizer_sha256
from tl_crosscoder.progress import note

_PROMPTS = Path(__file__).parent / "prompts"


def default_prompts(n: int, *, is_chat: bool) -> list[dict[str, Any]]:
    """The first `n` built-in prompts as documents, starting over after the last.

    `prompts/questions.txt` as chats of one user turn, or `prompts/openers.txt` as beginnings of
    plain text. Both are written by us, about everyday matters: nothing that the organisms of
    Kassem et al. 2026 or ours are about (medicine, money, sport, law, cooking, animals, secrets).
    A dictionary of a large model deserves thousands of other ones.
    """
    path = _PROMPTS / ("questions.txt" if is_chat else "openers.txt")
    prompts = islice(cycle(path.read_text(encoding="utf-8").splitlines()), n)
    if is_chat:
        return [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
    return [{"text": prompt} for prompt in prompts]


class ContrastiveSampler:
    """Prompts in batches of one length, and the models that continue them.

    Prompts of one length need no padding, which models of absolute positions would read shifted.

    Args:
        source: the models.
        prompts: documents of text, chats or ids; a chat is cut after its last user turn.
        max_new_tokens: tokens a completion, at most; it ends before what ends a text or turn.
        temperature: 1 is the models' own distribution, 0 greedy.
        batch_size: prompts of one length that go through a model together.
        seed: of sampling.
        max_prompt_tokens: plain text is cut at so many tokens, and longer chats are dropped.
        sites: names of the sites whose models write; None is every site.
        with_stop: keep the token that ended a text, which a model that learns from it needs.

    Raises:
        ValueError: an unknown site, prompts that cannot be encoded, or none that leaves space for
            `max_new_tokens` in the models' context.
    """

    def __init__(
        self,
        source: ModelPair,
        prompts: Iterable[Document],
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        batch_size: int = 32,
        seed: int = 0,
        max_prompt_tokens: int | None = None,
        sites: Sequence[str] | None = None,
        with_stop: bool = False,
    ) -> None:
        self.source, self.max_new_tokens = source, max_new_tokens
        self.temperature, self.seed, self.with_stop = float(temperature), seed, with_stop
        self.sites = [site.name for site in source.sites] if sites is None else list(sites)
        for name in self.sites:
            source.site_index(name)
        longest = source.n_ctx - max_new_tokens
        if longest < 1 or max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}, but the models' context is {source.n_ctx} "
                "tokens, prompt included. Set max_new_tokens (--max-new-tokens) to at least 1 and "
                "below that."
            )
        limit = longest if max_prompt_tokens is None else min(longest, max_prompt_tokens)
        by_length: defaultdict[int, list[EncodedDocument]] = defaultdict(list)
        for prompt in _encoded(prompts, source.tokenizer, max_prompt_tokens):
            by_length[len(prompt.ids)].append(prompt)
        self.n_too_long = sum(len(by_length.pop(n)) for n in [*by_length] if n > limit)
        if not by_length:
            raise ValueError(
                f"there is no prompt to continue: {self.n_too_long} were given, and all are longer "
                f"than {limit} tokens (max_prompt_tokens is {max_prompt_tokens}, and the models' "
                f"context of {source.n_ctx} holds {max_new_tokens} new tokens too). Give shorter "
                "prompts."
            )
        self.batches = [
            same[start : start + batch_size]
            for _, same in sorted(by_length.items())
            for start in range(0, len(same), batch_size)
        ]
        self.n_prompts = sum(map(len, self.batches))

    def prompts_sha256(self) -> str:
        """Hash of the prompts' ids, in the order of the batches."""
        ids = [[prompt.ids.tolist() for prompt in batch] for batch in self.batches]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()

    def sample(self, batch: int) -> list[dict[str, Any]]:
        """Rows for the prompts of a batch: for each prompt one of each site, or none.

        A row is a document: `input_ids` of prompt and completion, `role_ids`, `source`
        (`contrastive-SITE`) and `tokenizer` (a hash, checked when the row is read again); with
        `n_prompt_tokens`, `prompt` and `completion` as text, `origin` (the site), `batch`, `seed`
        and `temperature`. A prompt after which any model stops at once gives no row.
        """
        prompts = self.batches[batch]
        written = [self._completions(batch, site) for site in self.sites]
        return [
            self._row(prompt, new_ids, site) | {"batch": batch}
            for prompt, *completions in zip(prompts, *written, strict=True)
            if all(completions)
            for site, new_ids in zip(self.sites, completions, strict=True)
        ]

    def documents(self) -> Iterator[Document]:
        """The rows of all batches; at the end it prints how many prompts gave none."""
        n_rows = 0
        for batch in range(len(self.batches)):
            rows = self.sample(batch)
            n_rows += len(rows)
            yield from rows
        self.say_dropped(n_pairs=n_rows // len(self.sites))

    def say_dropped(self, *, n_pairs: int) -> None:
        """Print on stderr how many prompts gave no texts, and why; nothing if all did."""
        why = {
            "longer than the limits": self.n_too_long,
            "a model stopped at once": self.n_prompts - n_pairs,
        }
        if any(why.values()):
            n = self.n_prompts + self.n_too_long
            reasons = "; ".join(f"{count:,} {reason}" for reason, count in why.items() if count)
            note(f"Contrastive: {n_pairs:,} of {n:,} prompts gave texts ({reasons}).")

    def _completions(self, batch: int, site: str) -> list[list[int]]:
        source = self.source
        # Logits are often wider than the vocabulary: an id that the tokenizer or another model
        # does not know could not be read again, so it ends the text.
        n_known = min(len(source.tokenizer), source.d_vocab)
        unknown = range(n_known, source.model(site).cfg.d_vocab)
        generated = source.generate_tokens(
            [prompt.ids.tolist() for prompt in self.batches[batch]],
            site=site,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=_seed_of(self.seed, batch, site),
            stop_token_ids=[*stop_ids_of(source.models, source.tokenizer), *unknown],
            prepend_bos=False,
            with_stop=self.with_stop,
        )
        return [[i for i in new_ids if i not in unknown] for _, new_ids in generated]

    def _row(self, prompt: EncodedDocument, new_ids: list[int], site: str) -> dict[str, Any]:
        tokenizer, ids = self.source.tokenizer, prompt.ids.tolist()
        role = ROLES.index("assistant" if "messages" in prompt.document else "text")
        return {
            # The ids themselves: text that is decoded and tokenised again is often other tokens.
            "input_ids": ids + new_ids,
            "role_ids": prompt.role_ids.tolist() + [role] * len(new_ids),
            "n_prompt_tokens": len(ids),
            "prompt": tokenizer.decode(ids, skip_special_tokens=True),
            "completion": decode_continuation(tokenizer, ids, new_ids),
            "origin": site,
            "source": f"contrastive-{site}",
            "tokenizer": tokenizer_sha256(tokenizer),
            "seed": self.seed,
            "temperature": self.temperature,
        }


def _seed_of(seed: int, batch: int, site: str) -> int:
    """The seed of one batch of one site, below 2^63."""
    digest = hashlib.blake2b(f"{seed}/{batch}/{site}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _encoded(
    documents: Iterable[Document], tokenizer: Any, max_prompt_tokens: int | None
) -> Iterator[EncodedDocument]:
    stream = map(_until_last_question, documents)
    for prompt in encode_stream(stream, tokenizer, add_generation_prompt=True):
        # Half a text goes on, but half a chat has no place for an answer.
        n = None if "messages" in prompt.document else max_prompt_tokens
        yield replace(prompt, ids=prompt.ids[:n], role_ids=prompt.role_ids[:n])


def _until_last_question(document: Document) -> Document:
    """A chat without the answer at its end, after which the models would go on."""
    messages = document.get("messages") or ()
    ends = [i for i, message in enumerate(messages, start=1) if message.get("role") == "user"]
    return {**document, "messages": list(messages[: ends[-1]])} if ends else document
