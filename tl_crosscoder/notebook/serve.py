"""`serve`: the report of a run with its models behind it, on this machine alone.

    tl-crosscoder serve RUN            # or diff.serve() in a notebook, which returns at once

Contract: it listens at 127.0.0.1; page and questions need the token that is in the address; a
question from the page of another origin, or under another name of this machine, is refused. Models
answer one question at a time, in a thread of their own. Limits: whoever has the address may ask;
the models are those of the notebook, so wait for an answer before a cell runs them.
"""

import asyncio
import json
import secrets
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from html import escape
from importlib.util import find_spec
from typing import Any

from tl_crosscoder.config.settings import from_mapping
from tl_crosscoder.notebook.live_page import Ask, Live
from tl_crosscoder.notebook.model_diff import ModelDiff
from tl_crosscoder.report.figures import run_figures
from tl_crosscoder.report.html.data import ReportSettings, collect
from tl_crosscoder.report.html.page import page

HOST = "127.0.0.1"
MAX_BODY = 2**16
"""Bytes of a question."""


class Served:
    """A page that is served until `close`, or until the process ends."""

    def __init__(self, live: Live, content: str, *, port: int = 0) -> None:
        _tornado()
        self._live, self._content = live, content.encode()
        self.token = secrets.token_urlsafe(24)
        self._socket = _listening(port)
        self.port: int = self._socket.getsockname()[1]
        self._models = ThreadPoolExecutor(1, thread_name_prefix="models")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="serve", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The address, with the token; whoever has it may ask."""
        return f"http://{HOST}:{self.port}/?token={self.token}"

    def close(self) -> None:
        """Stop listening. An answer that is being made is finished first."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._models.shutdown()

    def wait(self) -> None:
        """Until it is interrupted; then it is closed."""
        try:
            while self._thread.is_alive():
                self._thread.join(timeout=0.2)
        finally:
            self.close()

    def __enter__(self) -> "Served":
        """Itself, to be closed at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        self.close()

    def __repr__(self) -> str:
        return f"Served({self.url!r})"

    def _repr_html_(self) -> str:
        url = escape(self.url)
        return f'Served at <a href="{url}" target="_blank">{url}</a>; close() ends it.'

    def _run(self) -> None:
        from tornado.httpserver import HTTPServer

        asyncio.set_event_loop(self._loop)
        server = HTTPServer(self._application(), max_body_size=MAX_BODY)
        server.add_socket(self._socket)
        try:
            self._loop.run_forever()
        finally:
            server.stop()
            self._loop.run_until_complete(server.close_all_connections())
            self._loop.close()

    def _application(self) -> Any:
        from tornado.web import Application, RequestHandler

        served = self

        class Guarded(RequestHandler):
            """Answers whoever has the token, at this address, from this page."""

            def set_default_headers(self) -> None:
                self.set_header("Cache-Control", "no-store")
                self.set_header("Referrer-Policy", "no-referrer")
                self.set_header("X-Content-Type-Options", "nosniff")

            def prepare(self) -> None:
                hosts = {f"{name}:{served.port}" for name in (HOST, "localhost")}
                origin = self.request.headers.get("Origin")
                given = self.request.headers.get("X-Token") or self.get_query_argument("token", "")
                is_ours = self.request.host in hosts and origin in (
                    None, *(f"http://{host}" for host in hosts)
                )  # fmt: skip
                if not is_ours or not secrets.compare_digest(given.encode(), served.token.encode()):
                    self.set_status(403)
                    self.finish("403: open the address that was printed, with its token.\n")

        class Page(Guarded):
            def get(self) -> None:
                self.set_header("Content-Type", "text/html; charset=utf-8")
                self.finish(served._content)

        class Answer(Guarded):
            async def post(self) -> None:
                try:
                    asked = json.loads(self.request.body)
                    if not isinstance(asked, dict):
                        raise ValueError("the question must be a mapping of fields to values.")
                    ask = from_mapping(Ask, asked, name="the question")
                    loop = asyncio.get_running_loop()
                    found = await loop.run_in_executor(served._models, served._live.answer, ask)
                except ValueError as error:
                    self.set_status(400)
                    found = {"error": str(error)}
                self.finish(found)

        quiet: dict[str, Any] = {"log_function": lambda _: None}
        return Application([("/", Page), ("/answer", Answer)], **quiet)


def serve(
    diff: ModelDiff, *, port: int = 0, settings: ReportSettings | None = None, show_progress: bool
) -> Served:
    """Serve a run's report with its models behind it; returns at once.

    Args:
        diff: of the run.
        port: 0 takes a free one.
        settings: contents of the report; by default without samples, since the page asks for texts.
        show_progress: with progress bars while the report is made.

    Raises:
        ValueError: tornado is not installed, the port is taken, or models that cannot be loaded.
    """
    _tornado()
    settings = settings or ReportSettings(samples=None)
    live = Live(diff=diff)
    _ = diff.ctx  # loads the models, or says why not
    data = collect(diff.run, settings, show_progress=show_progress)
    return Served(live, page(data, run_figures(diff.run), is_live=True), port=port)


def _tornado() -> None:
    if find_spec("tornado") is None:
        raise ValueError(
            "serving a page needs tornado, which comes with Jupyter: pip install "
            "'tl_crosscoder[serve]'."
        )


def _listening(port: int) -> socket.socket:
    """A socket of this machine alone."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise ValueError(
            f"port {port} of {HOST} cannot be listened at ({error}): choose another, or 0 for one "
            "that is free."
        ) from error
    listening.listen(16)
    listening.setblocking(False)
    return listening
