"""`AnswerCache`: what a judge has answered, in one SQLite file, so that nothing is paid for twice.

Contract: the key is a hash of the endpoint and of the whole request (model, messages, seed,
temperature); an answer is on disk when `put` returns. Messages are kept beside the answer to be
read; keys of the service never come here. Limit: one process writes at a time.
"""

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
