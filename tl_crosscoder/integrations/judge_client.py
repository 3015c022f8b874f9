"""`Judge`: asks a language model behind an OpenAI-compatible endpoint, and remembers its answers.

Prompts in, answers out in the same order. Answers are kept in one SQLite file (`AnswerCache`) by a
hash of the endpoint and of the whole request, each as it comes, so that nothing is paid for twice
and an interrupt or an error loses none. Temperature 0 and a seed; busy endpoints are asked again by
the `openai` library. An endpoint may answer anything: a reply is read up to `MAX_BYTES`, one that
is no chat completion is an error, and one without text counts as no answer and is asked for again.
The key is read from `OPENAI_API_KEY` alone, never stored, and never shown where it is echoed.
Limits: one process writes the file at a time; endpoints need not be deterministic: the file is what
makes a result repeatable.
"""

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from tl_crosscoder.integrations.config import JudgeConfig
from tl_crosscoder.progress import progress

KEY_NAME = "OPENAI_API_KEY"
_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, messages TEXT NOT NULL, answer TEXT NOT NULL
)
"""
MAX_BYTES = 2**24
"""Of one reply."""
Messages = list[dict[str, str]]


class AnswerCache:
    """Answers of a judge; close it, or use it in a `with` statement.

    Args:
        path: of the file, made where there is none; None is in memory alone.

    Raises:
        OSError: the file cannot be written, or is not of SQLite.
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

    def get(self, endpoint: str, request: Mapping[str, Any]) -> str | None:
        """The answer to a request, or None."""
        query = "SELECT answer FROM answers WHERE key = ?"
        row = self._connection.execute(query, (_key(endpoint, request),)).fetchone()
        return None if row is None else row[0] or None  # earlier versions kept empty ones

    def put(self, endpoint: str, request: Mapping[str, Any], answer: str) -> None:
        """Keep an answer, with the messages to be read beside it."""
        messages = json.dumps(request["messages"], ensure_ascii=False)
        with self._connection:
            self._connection.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)",
                (_key(endpoint, request), request["model"], messages, answer),
            )

    def __enter__(self) -> "AnswerCache":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def _key(endpoint: str, request: Mapping[str, Any]) -> str:
    content = json.dumps([endpoint, request], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


class Judge:
    """Asks an endpoint, answers from the cache where it can.

    Args:
        config: who is asked, and how hard.
        cache: what has been answered; stays open.
    """

    def __init__(self, config: JudgeConfig, cache: AnswerCache) -> None:
        self.config, self.cache, self._endpoint = config, cache, config.endpoint()

    def known(self, messages: Messages) -> str | None:
        """The answer, where there is one already."""
        return self.cache.get(self._endpoint, self._request(messages))

    def ask(self, prompts: Sequence[Messages], *, description: str | None = None) -> list[str]:
        """Answers to prompts, in their order; empty where the judge gave none.

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
            self._send([self._request(p) for p in missing.values()], description)
        return [self.known(p) or "" for p in prompts]

    def _request(self, messages: Messages) -> dict[str, Any]:
        model, seed = self.config.model, self.config.seed
        return {"model": model, "messages": messages, "temperature": 0, "seed": seed}

    def _send(self, requests: Sequence[dict[str, Any]], description: str | None) -> None:
        openai, config, key = _library(), self.config, _api_key()
        hooks = {"response": [partial(_read_body, timeout_s=config.timeout_s)]}
        how: dict[str, Any] = {
            "max_retries": config.n_retries,
            "timeout": config.timeout_s,
            "api_key": key,
            "http_client": openai.DefaultHttpxClient(event_hooks=hooks),
        }
        pool = ThreadPoolExecutor(config.n_parallel)
        with openai.OpenAI(base_url=self._endpoint or None, **how) as client:
            waiting = {pool.submit(_answer, client, r, key=key): r for r in requests}
            try:
                bar = progress(
                    as_completed(waiting), desc=description, total=len(waiting), unit="request",
                    show=description is not None,
                )  # fmt: skip
                for future in bar:
                    self._put(waiting[future], future.result())
                    del waiting[future]
            except (openai.OpenAIError, OSError) as error:
                why = _masked(f"{error} {error.__cause__ or ''}".strip(), key)
                # Without the cause, in which the key may stand.
                raise OSError(
                    f"the judge {config.model!r} could not be asked: {why} What it has answered "
                    "is kept: the same command continues from there."
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)
                self._keep(waiting)

    def _keep(self, waiting: Mapping["Future[str]", dict[str, Any]]) -> None:
        """Answers that came while another request failed, which are paid for too."""
        for future, request in waiting.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                self._put(request, future.result())

    def _put(self, request: Mapping[str, Any], answer: str) -> None:
        """Keep an answer; an empty one may be another next time."""
        if answer:
            self.cache.put(self._endpoint, request, answer)


def _answer(client: Any, request: dict[str, Any], *, key: str) -> str:
    """The text of an answer; empty where there is none. Raises OSError for any other reply."""
    response: Any = "no JSON"
    # Servers that imitate the interface leave out what they please.
    try:
        response = client.chat.completions.create(**request)
        answer = response.choices[0].message.content
    except (AttributeError, TypeError, LookupError, ValueError, RecursionError):
        answer = response
    if not isinstance(answer, str | None) or answer is response:
        raise OSError(
            f"the endpoint answered without choices that hold text: {str(response)[:200]!r}. It is "
            "not OpenAI-compatible, or its address lacks the /v1 at its end."
        )
    # Half a surrogate pair cannot be stored.
    return _masked((answer or "").strip().encode(errors="replace").decode(), key)


def _masked(text: str, key: str) -> str:
    return text.replace(key, "(the key)")


def _read_body(response: Any, *, timeout_s: float) -> None:
    """Read a reply of bounded size in bounded time, before the client reads it without bounds."""
    end, body = time.monotonic() + timeout_s, bytearray()
    for part in response.iter_bytes():
        body += part
        if len(body) > MAX_BYTES or time.monotonic() > end:
            raise OSError(f"The reply is longer than {MAX_BYTES:,} bytes or {timeout_s:g} seconds.")
    response._content = bytes(body)


def check_can_ask() -> None:
    """Raise ValueError where the extra `judge` is not installed or there is no key."""
    _library()
    _api_key()


def _library() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ValueError(
            "the judge needs the library openai, which is an extra: "
            "pip install 'tl-crosscoder[judge]'."
        ) from error
    return openai


def _api_key() -> str:
    key = os.environ.get(KEY_NAME)
    if not key:
        raise ValueError(
            f"{KEY_NAME} is not set: put the endpoint's key into that variable. For a server that "
            "asks for none, any word does."
        )
    return key
