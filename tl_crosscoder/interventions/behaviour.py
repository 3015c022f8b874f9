"""What is measured of an edited model: a behaviour by its answers, or predictions without labels.

`Behaviour`: the probability that a model answers some prompts in some ways,

    B(prompt) = sum over the accepted answers of P(answer | prompt)

by teacher forcing, so without the noise of sampling. As a file, one JSON object a line: `messages`
(a chat) or `prompt` (text), and `completions`; `ends_turn` false where an answer may go on. A turn
ends with what the chat template puts there, a text with EOS. A chat whose last message is the
assistant's has an answer that has begun: the completions go on from there. Limit: answers of one
prompt must be disjoint, so none may begin with another unless both end the turn.

`Predictions`: how far an edited model is from the model that the edit should lead to,

    toward the base         KL(p_base || p_edited): from KL(p_base || p_finetuned) down to 0
    toward the fine-tuned   -KL(p_finetuned || p_edited): from -KL(p_finetuned || p_base) up to 0

so that the share of a `trials` row is how far the edited model goes from one model to the other.
Sums over the predicted tokens of one kind, by context. Limit: predictions on given text, not what
a model writes.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.config.inputs import Masks
from tl_crosscoder.data.chat import ROLES, encode_documents
from tl_crosscoder.data.documents import Document
from tl_crosscoder.data.tokens import TokenizedText, tokenize
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import Edit, Places, unchanged
from tl_crosscoder.interventions.running import (
    edited_logits,
    kinds_of,
    log_probs_at,
    progress_bar,
    score_edits,
)


class Effect(ABC):
    """Abstract: a number for each edit and prompt, in which base and fine-tuned model differ."""

    name: str
    """What tables call it."""
    unit: str
    """What its values are."""

    @property
    @abstractmethod
    def n_prompts(self) -> int:
        """Units that intervals are taken over."""

    @abstractmethod
    def scores(
        self,
        ctx: InterventionContext,
        edits: Sequence[Edit],
        *,
        toward: int,
        description: str | None = None,
    ) -> Float[Tensor, "n_edits n_prompts"]:
        """The number of each edit and prompt.

        Args:
            ctx: models and dictionary.
            edits: of any sites.
            toward: position of the site whose model the edits should lead to: the base of
                necessity, the fine-tuned one of sufficiency.
            description: of a progress bar; None shows none.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class Predictions(Effect):
    """Predictions of one kind of token of a text; the prompts are its contexts."""

    name: str
    unit: str = "KL, nats a prompt"
    text: TokenizedText
    kind: str
    places: Places

    @classmethod
    def of(cls, text: TokenizedText) -> "Predictions":
        """What assistants say, where the text has chats, and every token of plain text."""
        kind, places = next(iter(kinds_of(text).items()))
        return cls(name=f"predictions of {kind} tokens", text=text, kind=kind, places=places)

    @property
    def n_prompts(self) -> int:
        """Number of contexts."""
        return len(self.text)

    def scores(
        self,
        ctx: InterventionContext,
        edits: Sequence[Edit],
        *,
        toward: int,
        description: str | None = None,
    ) -> Float[Tensor, "n_edits n_prompts"]:
        """KL to the model of `toward`, negative where that is the fine-tuned one; see the module.

        In nats, summed over the tokens of each context.
        """
        how = {"reference": unchanged(toward), "kinds": {self.kind: self.places}}
        kl = score_edits(ctx, self.text, edits, **how, description=description).kl[:, 0]
        return kl if toward == ctx.base else -kl


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and the answers that count."""

    prompt: str | tuple[Document, ...]
    """Text, or the messages of a chat: the last is the user's, or an answer that has begun."""
    completions: tuple[str, ...]
    ends_turn: bool = True
    """An answer is the whole turn; if not, the turn begins with it."""

    def __post_init__(self) -> None:
        ordered = sorted(self.completions)
        if not ordered or not all(ordered):
            raise ValueError(
                f"the prompt {_short(self.prompt)} has the completions {ordered}: give one or "
                "more, none of them empty."
            )
        for one, other in pairwise(ordered):
            if one == other or (not self.ends_turn and other.startswith(one)):
                raise ValueError(
                    f"completions {one!r} and {other!r} of {_short(self.prompt)} are not disjoint, "
                    "so one would count twice. Drop one."
                )


@dataclass(frozen=True, eq=False, kw_only=True)
class Behaviour(Effect):
    """Prompts with their answers, as tokens of one model family."""

    name: str
    unit: str = "probability"
    questions: tuple[Question, ...]
    text: TokenizedText
    """One context for each prompt with each of its answers."""
    starts: tuple[int, ...]
    """Where the answer of each context begins."""
    prompt_of: tuple[int, ...]
    """Which question each context belongs to."""

    @classmethod
    def of(
        cls,
        name: str,
        questions: Sequence[Question],
        tokenizer: Any,
        *,
        masks: Masks | None = None,
    ) -> "Behaviour":
        """Tokenise; masks are those that the dictionary was trained with, `Masks()` by default.

        Raises:
            ValueError: no questions, chats without a template, a prompt without a token, or an
                answer that is to end and a tokenizer that has nothing to end it with.
        """
        if not questions:
            raise ValueError(f"the behaviour {name!r} has no prompts.")
        made = [_contexts(question, tokenizer) for question in questions]
        documents = [document for own, _ in made for document in own]
        longest = max(len(d["input_ids"]) for d in documents)
        return cls(
            name=name,
            questions=tuple(questions),
            text=tokenize(
                documents, tokenizer, context_size=max(2, longest), pack=False, masks=masks
            ),
            starts=tuple(start for own, start in made for _ in own),
            prompt_of=tuple(i for i, (own, _) in enumerate(made) for _ in own),
        )

    @classmethod
    def from_file(
        cls, path: str | Path, tokenizer: Any, *, masks: Masks | None = None
    ) -> "Behaviour":
        """The questions of a JSONL file, tokenised; its name, with spaces, is the behaviour's.

        Raises as `read_questions` and `of` do.
        """
        path = files.user_path(path)
        return cls.of(path.stem.replace("-", " "), read_questions(path), tokenizer, masks=masks)

    @classmethod
    def from_files(
        cls, named: str | Path | Sequence[str | Path], tokenizer: Any, *, masks: Masks | None = None
    ) -> list["Behaviour"]:
        """Behaviours of JSONL files, and of all those in folders.

        Raises:
            FileNotFoundError, ValueError: as `from_file`; a folder without such a file, or two
                behaviours of one name.
        """
        found: list[Behaviour] = []
        for path in map(files.user_path, [named] if isinstance(named, str | Path) else named):
            inside = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
            if not inside:
                raise FileNotFoundError(f"{path} holds no JSONL file: a behaviour is one each.")
            found += [cls.from_file(each, tokenizer, masks=masks) for each in inside]
        names = [behaviour.name for behaviour in found]
        if len({*names}) < len(names):
            raise ValueError(
                f"the behaviours are called {names}, by the names of their files: give each a name "
                "of its own, and each file once."
            )
        return found

    @property
    def n_prompts(self) -> int:
        """Number of questions."""
        return len(self.questions)

    def answers(
        self, index: Int[Tensor, " contexts"], *, n_pos: int
    ) -> Bool[Tensor, "contexts pos_less_one"]:
        """Positions of some contexts, cut to `n_pos`, whose next token belongs to the answer."""
        at = torch.arange(1, n_pos)
        starts, lengths = torch.tensor(self.starts)[index], self.text.lengths[index]
        return (at >= starts[:, None]) & (at < lengths[:, None])

    @torch.no_grad()
    def scores(
        self,
        ctx: InterventionContext,
        edits: Sequence[Edit],
        *,
        toward: int | None = None,  # noqa: ARG002
        batch_size: int = 64,
        description: str | None = None,
    ) -> Float[Tensor, "n_edits n_prompts"]:
        """Its probability under each edit, float64, whichever model that should lead to.

        Raises:
            ValueError: a prompt with its answer is longer than the models' context.
        """
        text = self.text
        if text.context_size > ctx.models.n_ctx:
            raise ValueError(
                f"the longest prompt of {self.name!r} has {text.context_size} tokens with its "
                f"answer, but the models take {ctx.models.n_ctx}. Shorten it or leave it out."
            )
        log_probs = torch.zeros(len(edits), len(text), dtype=torch.float64)
        bar = progress_bar(text, edits, description)
        for acts in ctx.batches(text, batch_size=batch_size):
            tokens, index = acts.text.tokens.long(), acts.index
            is_answer = self.answers(index, n_pos=tokens.shape[1])
            for i, logits in edited_logits(ctx, acts, edits):
                rows = log_probs_at(logits, is_answer)
                targets = tokens[:, 1:][is_answer].to(rows.device)
                taken = torch.zeros(is_answer.shape, dtype=torch.float64)
                taken[is_answer] = rows.gather(-1, targets[:, None]).squeeze(-1).double().cpu()
                log_probs[i, index] = taken.sum(dim=1)
                bar.update(len(index))
        bar.close()
        scores = torch.zeros(len(edits), self.n_prompts, dtype=torch.float64)
        return scores.index_add_(1, torch.tensor(self.prompt_of), log_probs.exp())


def read_questions(path: str | Path) -> list[Question]:
    """Read a JSONL file of questions; keys that no question has are ignored.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not a question.
    """
    path = files.user_path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: a behaviour is a JSONL file of prompts and completions."
        )
    try:
        # Not `splitlines`: JSON strings may hold separators such as U+2028.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): a behaviour is a JSONL file.") from error
    return [_question(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]


def _contexts(question: Question, tokenizer: Any) -> tuple[list[Document], int]:
    """The prompt with each answer, as ids, and where the answers begin."""
    prompt: Document = {"text": question.prompt}
    is_chat, begun = False, ""
    if not isinstance(question.prompt, str):
        is_chat, messages = True, list(question.prompt)
        if messages and messages[-1].get("role") == "assistant":
            begun = messages.pop().get("content", "")
        prompt = {"messages": messages}
    (encoded,) = encode_documents([prompt], tokenizer, add_generation_prompt=is_chat)
    if not len(encoded.ids):
        raise ValueError(
            f"the prompt {_short(question.prompt)} has no token, and the tokenizer no BOS, so "
            "nothing predicts the answer's first token. Give a prompt."
        )
    end = _end(tokenizer, is_chat=is_chat) if question.ends_turn else ""
    said = tokenizer(begun, add_special_tokens=False)["input_ids"] if begun else []
    assistant, documents = ROLES.index("assistant"), []
    for completion in question.completions:
        ids = [*said, *tokenizer(completion + end, add_special_tokens=False)["input_ids"]]
        documents.append(
            {
                "input_ids": [*encoded.ids.tolist(), *ids],
                "role_ids": [*encoded.role_ids.tolist(), *[assistant] * len(ids)],
            }
        )
    return documents, len(encoded.ids) + len(said)


def _question(line: str, where: str) -> Question:
    try:
        value = json.loads(line)
        prompt = value["prompt"] if "prompt" in value else tuple(value["messages"])
        completions, ends_turn = value["completions"], value.get("ends_turn", True)
        for fault, is_right in {
            "`prompt` is not a text": isinstance(prompt, str | tuple),
            "`messages` is not a list of objects": not isinstance(prompt, tuple)
            or all(isinstance(m, dict) for m in prompt),
            "`completions` is not a list of texts": isinstance(completions, list)
            and all(isinstance(c, str) for c in completions),
            "`ends_turn` is neither true nor false": isinstance(ends_turn, bool),
        }.items():
            if not is_right:
                raise TypeError(fault)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{where} is not a question ({type(error).__name__}: {error}): it must be a JSON "
            "object with `messages` or `prompt`, and `completions`, a list."
        ) from error
    return Question(prompt=prompt, completions=tuple(completions), ends_turn=ends_turn)


def _end(tokenizer: Any, *, is_chat: bool) -> str:
    """What ends an answer. EOS is often not what ends a turn: Gemma's is <end_of_turn>."""
    end = ""
    if is_chat:
        mark = "\ue000"
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        end = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(mark)[2].rstrip()
    end = end or tokenizer.eos_token
    if not end:
        raise ValueError(
            "neither the chat template nor the tokenizer's EOS says how an answer ends: give "
            "questions with ends_turn=False, whose answers may go on."
        )
    return end


def _short(prompt: Any) -> str:
    text = repr(prompt)
    return text if len(text) < 80 else text[:77] + "..."
