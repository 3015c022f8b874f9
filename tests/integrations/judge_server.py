"""A local OpenAI-compatible endpoint that judges by a rule: it looks for a word.

Asked for a name, it answers with the word that is marked most often, of a change with what the
fine-tuned model writes; asked about windows, it calls
those active that contain the word of the explanation.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

import loopback

WORD = re.compile(r"the word '(.*)'")


@dataclass
class JudgeServer:
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """As they came, those that were refused too."""
    n_busy: int = 0
    """So many requests are told to come again."""
    refused: str = ""
    """Requests with this text are refused."""
    reply: bytes | None = None
    """Sent in place of every answer; `KEY` in it is the header with the key."""
    is_endless: bool = False
    """The reply goes on for ever."""
    keys: set[str] = field(default_factory=set)


def judged(messages: list[dict[str, str]]) -> str:
    asked = messages[-1]["content"]
    excerpts = [json.loads(e) for e in re.findall(r'^Excerpt [^:]*: (".*")$', asked, re.MULTILINE)]
    if asked.startswith("Explanation"):
        if any("garble" in e for e in excerpts):
            return "I would rather not say."
        word = WORD.search(asked)
        assert word is not None
        verdicts = [int(word.group(1) in e) for e in excerpts]
        return f"Those with the word are active: {verdicts}"
    if asked.startswith("Text 1:"):
        (written,) = re.findall(r'^Fine-tuned model: (".*")$', asked, re.MULTILINE)
        return f"NAME: writes\nEXPLANATION: it writes {json.loads(written)}"
    marks = Counter(m.strip() for e in excerpts for m in re.findall(r"<<(.+?)>>", e))
    word = marks.most_common(1)[0][0]
    return f"It is plain.\n**NAME:** {word}\n**EXPLANATION:** the word '{word}'"


@contextmanager
def serving() -> Iterator[JudgeServer]:
    state = JudgeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append(request)
            state.keys.add(self.headers["Authorization"])
            asked = request["messages"][-1]["content"]
            if state.reply is not None:
                self.send(200, state.reply.replace(b"KEY", self.headers["Authorization"].encode()))
            elif self.path != "/v1/chat/completions" or (state.refused and state.refused in asked):
                self.reply(400, {"error": {"message": "refused"}})
            elif state.n_busy:
                state.n_busy -= 1
                self.reply(429, {"error": {"message": "busy"}})
            else:
                message = {"role": "assistant", "content": judged(request["messages"])}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                self.reply(200, {"id": "1", "object": "chat.completion", "choices": [choice]})

        def reply(self, status: int, content: dict[str, Any]) -> None:
            self.send(status, json.dumps(content).encode())

        def send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if not state.is_endless:
                self.send_header("Content-Length", str(len(body)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(body)
            with suppress(OSError):  # the client hangs up
                while state.is_endless:
                    self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing to say."""

    with loopback.serving(Handler) as url:
        state.url = f"{url}/v1"
        yield state
