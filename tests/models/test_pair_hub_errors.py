"""What a user reads when the hub refuses: asked of a server that answers as the hub does."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

# A gated repository tells its commit and its files' names to everyone.
GATED, OPEN, SILENT = "meta/gated", "somebody/open", "somebody/silent"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ADAPTER_FILE = {"type": "file", "path": "adapter_config.json", "size": 9, "oid": COMMIT}


class Hub(BaseHTTPRequestHandler):
    """Answers with the statuses and headers of huggingface.co; holds no file."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        is_api = path.startswith("/api/models/")
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if repo == SILENT:
            self.close_connection = True
        elif repo == GATED and not is_api:
            self.answer(403 if self.headers["Authorization"] else 401, "GatedRepo")
        elif repo not in (GATED, OPEN):
            self.answer(401, "RepoNotFound")
        elif "/v9" in path:
            self.answer(404, "RevisionNotFound")
        elif "/tree/" in path:
            self.answer(200, None, [ADAPTER_FILE])
        elif is_api:
            self.answer(200, None, {"id": repo, "sha": COMMIT, "siblings": []})
        else:
            self.answer(404, "EntryNotFound")

    do_HEAD = do_GET

    def answer(self, status: int, code: str | None, body: dict | list | None = None) -> None:
        content = json.dumps(body or {"error": code}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


ASK = """
import json, os, sys
from tl_crosscoder import ModelPair

HOOK, BASE = "blocks.1.hook_resid_post", "tl_crosscoder/world-base"

def message(*names, token=None, **options):
    os.environ.pop("HF_TOKEN", None)
    os.environ |= {"HF_TOKEN": token} if token else {}
    try:
        ModelPair.from_pretrained(*names, hook_name=HOOK, **options)
    except ValueError as error:
        return str(error)

said = {
    "gated, no token": message("meta/gated", "x/y"),
    "gated, a token": message("meta/gated", "x/y", token="hf_test"),
    "gated adapter": message(BASE, adapter="meta/gated"),
    "gated finetuned": message(BASE, "meta/gated"),
    "not found": message("nobody/nothing", "x/y"),
    "not found, a token": message("nobody/nothing", "x/y", token="hf_test"),
    "adapter not found": message(BASE, adapter="nobody/lora"),
    "no revision": message("somebody/open", "x/y", revision="v9"),
    "no revision of the adapter": message(
        BASE, adapter="somebody/open", finetuned_revision="v9"
    ),
    "no files": message("somebody/open", "x/y"),
    "no answer": message("somebody/silent", "x/y"),
    "no answer for the adapter": message(BASE, adapter="somebody/silent"),
}
json.dump(said, sys.stdout)
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def said(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The message of each case, of one process: the hub's address is read at import."""
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path_factory.mktemp("home"))}
    no_proxy = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    unset = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=kept | hub | no_proxy,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_gated_model_says_where_to_accept_its_licence(said, endpoint):
    for case, who in {
        "gated, no token": "no valid token was sent",
        "gated finetuned": "no valid token was sent",
        "gated adapter": "no valid token was sent",
        "gated, a token": "the account of the token that was sent has no access yet",
    }.items():
        assert said[case].startswith(f"'meta/gated' is gated: {who}. Accept its licence on "), case
        assert f"{endpoint}/meta/gated" in said[case]
        assert "`hf auth login`" in said[case]


def test_a_name_that_is_not_there_may_be_private(said):
    assert said["not found"].startswith("'nobody/nothing' is not on the hub, or is private.")
    assert "`hf auth login`" in said["not found"]
    assert "(no token is set)" in said["not found"]
    assert "(the token that was sent may not)" in said["not found, a token"]
    assert said["adapter not found"].startswith("'nobody/lora' is not on the hub, or is private.")


def test_a_revision_that_is_not_there_is_named(said, endpoint):
    for case in ("no revision", "no revision of the adapter"):
        assert said[case].startswith("'somebody/open' has no revision 'v9'"), case
        assert f"{endpoint}/somebody/open" in said[case]


def test_what_is_no_model_and_a_hub_that_does_not_answer_are_told_apart(said):
    assert said["no files"].startswith("'somebody/open' could not be loaded: ")
    for case in ("no answer", "no answer for the adapter"):
        assert said[case].startswith("'somebody/silent' is not in the hub's cache, and http"), case
        assert "did not give it (Server disconnected" in said[case], case


def test_every_message_is_one_paragraph(said):
    assert not [case for case, message in said.items() if "\n" in message]
