"""`AnswerCache`: what a judge has answered, in one SQLite file, so that nothing is paid for twice.

Contract: the key is a hash of the endpoint and of the whole request (model, messages, seed,
temperature); an answer is on disk when `put` returns. Messages are kept beside the answer to be
read; keys of the service never come here. Limit: one process writes at a time.

`Judge`: asks a language model behind an OpenAI-compatible endpoint, and remembers its answers.

Contract: prompts in, answers out in the same order; what the cache knows is not sent, and what is
answered before an interrupt or an error is kept. Temperature 0 and a seed; busy endpoints are asked
again by the `openai` library. The key is read from `OPENAI_API_KEY` alone. Limit: endpoints need
not be deterministic: the cache is what makes a result repeatable.
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, messages TEXT NOT NULL, answer TEXT NOT NULL
)
"""
Request = Mapping[str, Any]


class AnswerCache:
    """Open to read and write; close it, or use it in a `with` statement.

    Args:
        path: of the file, made where there is none; None is in memory alone.

    Raises:
        OSError: the file cannot be written, or is none of SQLite.
    """

    def __init__(self, path: Path | None) -> None:
        try:
            self._connection = sqlite3.connect(":memory:" if path is None else path)
            self._connection.execute(_TABLE)
        except sqlite3.Error as error:
            raise OSError(
                f"{path} cannot be used to keep answers ({error}): move it away, or make its "
                "folder writable."
            ) from error

    def get(self, endpoint: str, request: Request) -> str | None:
        """The answer to a request, or None."""
        query = "SELECT answer FROM answers WHERE key = ?"
        row = self._connection.execute(query, (_key(endpoint, request),)).fetchone()
        return None if row is None else row[0]

    def put(self, endpoint: str, request: Request, answer: str) -> None:
        """Keep an answer."""
        messages = json.dumps(request["messages"], ensure_ascii=False)
        with self._connection:
            self._connection.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)",
                (_key(endpoint, request), request["model"], messages, answer),
            )

    def close(self) -> None:
        """No more of it; twice is once."""
        self._connection.close()

    def __enter__(self) -> "AnswerCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _key(endpoint: str, request: Request) -> str:
    content = json.dumps([endpoint, request], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


KEY_NAME = "OPENAI_API_KEY"
Messages = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Which model is asked, where, and how hard."""

    model: str
    """As the endpoint names it."""
    base_url: str | None = None
    """Such as `http://localhost:8000/v1`; None is what `OPENAI_BASE_URL` says, or OpenAI's own."""
    seed: int = 0
    n_parallel: int = 4
    """Requests under way at once."""
    n_retries: int = 5
    """Times that a request is sent again where the endpoint is busy or out of reach."""
    timeout_s: float = 120.0
    """Longest wait for one answer."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("the judge has no model: name one as its endpoint does.")
        if self.n_parallel < 1 or self.n_retries < 0 or self.timeout_s <= 0:
            raise ValueError(
                f"n_parallel {self.n_parallel}, n_retries {self.n_retries} and timeout_s "
                f"{self.timeout_s} must be at least 1, at least 0 and above 0."
            )

    @property
    def place(self) -> str:
        """Where requests go; empty for the library's default."""
        return self.base_url or os.environ.get("OPENAI_BASE_URL", "")

    def request(self, messages: Messages) -> dict[str, Any]:
        """What is sent."""
        return {"model": self.model, "messages": messages, "temperature": 0, "seed": self.seed}


class Judge:
    """Asks an endpoint, answers from the cache where it can.

    Args:
        endpoint: who is asked.
        cache: what has been answered; stays open.
    """

    def __init__(self, endpoint: Endpoint, cache: AnswerCache) -> None:
        self.endpoint, self.cache = endpoint, cache

    def known(self, messages: Messages) -> str | None:
        """The answer, where there is one already."""
        return self.cache.get(self.endpoint.place, self.endpoint.request(messages))

    def ask(self, prompts: Sequence[Messages], *, description: str | None = None) -> list[str]:
        """Answers to prompts, in their order.

        Args:
            prompts: messages of one chat each.
            description: of the progress bar; None shows none.

        Raises:
            ValueError: answers are missing, and there is no key or the extra `judge` is not
                installed.
            OSError: the endpoint refused, or did not answer.
        """
        # Two equal prompts are one request.
        missing = {repr(p): p for p in prompts if self.known(p) is None}
        if missing:
            self._send(list(missing.values()), description)
        answers = [self.known(p) for p in prompts]
        assert None not in answers
        return [a for a in answers if a is not None]

    def _send(self, prompts: Sequence[Messages], description: str | None) -> None:
        openai = _library()
        where = self.endpoint
        options = {"max_retries": where.n_retries, "timeout": where.timeout_s}
        pool = ThreadPoolExecutor(where.n_parallel)
        with openai.OpenAI(
            base_url=where.place or None, api_key=_key_client(), **options
        ) as client:
            requests = [where.request(p) for p in prompts]
            waiting = {pool.submit(_answer, client, r): r for r in requests}
            try:
                bar = tqdm(
                    as_completed(waiting), desc=description, total=len(waiting), unit="request",
                    disable=None if description else True,
                )  # fmt: skip
                for future in bar:
                    answer = future.result()
                    self.cache.put(where.place, waiting.pop(future), answer)
            except openai.OpenAIError as error:
                raise OSError(
                    f"the judge {where.model!r} could not be asked: {error} What it has answered "
                    "is kept: the same command goes on from there."
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)
                self._keep(waiting)

    def _keep(self, waiting: Mapping["Future[str]", dict[str, Any]]) -> None:
        """Answers that came while another request failed, which are paid for too."""
        for future, request in waiting.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                self.cache.put(self.endpoint.place, request, future.result())


def _answer(client: Any, request: dict[str, Any]) -> str:
    response = client.chat.completions.create(**request)
    # Servers that imitate the interface leave out what they please.
    if not getattr(response, "choices", None):
        raise OSError(
            f"the endpoint answered without choices: {str(response)[:200]!r}. It is no "
            "OpenAI-compatible one, or its address lacks the /v1 at its end."
        )
    return response.choices[0].message.content or ""


def check_can_ask() -> None:
    """Raises ValueError where the extra `judge` is not installed or there is no key."""
    _library()
    _key_client()


def _library() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ValueError(
            "the judge needs the library openai, which is an extra: "
            "pip install 'tl-crosscoder[judge]'."
        ) from error
    return openai


def _key_client() -> str:
    key = os.environ.get(KEY_NAME)
    if not key:
        raise ValueError(
            f"{KEY_NAME} is not set: put the endpoint's key into that variable. For a server that "
            "asks for none, any word does."
        )
    return key
