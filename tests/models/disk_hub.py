"""A hub on this machine that holds folders: what datasets, transformers and peft ask to read them.

Its answers have the statuses and headers of huggingface.co. Repositories are told by their names:
files of `*/gated*` need an approval (of `*/gated` the rest too), `*/silent` never answers, and
nothing has a revision `v9`.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from loopback import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class DiskHub:
    """Folders `owner/name` below a root, what was asked of them, and where they are served."""

    root: Path
    asked: list[tuple[str, str]] = field(default_factory=list)
    """(repository or other host, path in it) of each request; the path of the API's is empty."""
    url: str = ""

    @contextmanager
    def running(self) -> Iterator["DiskHub"]:
        """Serve on a free port of the loopback."""
        with serving(_Handler, hub=self) as self.url:
            yield self

    def answers(self, script: str, home: Path, *arguments: object) -> dict[str, Any]:
        """What a script prints as JSON, in a process of its own: the address is read at import."""
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        proxies = {"HTTP_PROXY": self.url, "HTTPS_PROXY": self.url, "NO_PROXY": "127.0.0.1"}
        proxies |= {name.lower(): value for name, value in proxies.items()}
        is_ours = re.compile("HF_|HUGGING|TRANSFORMERS_OFFLINE|ALL_PROXY|all_proxy").match
        kept = {name: value for name, value in os.environ.items() if not is_ours(name)}
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
            env=kept | hub | proxies,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert not [host for host, _ in self.asked if host.endswith(":443")]
        return json.loads(done.stdout)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[DiskHub]

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        is_api = url.path.startswith("/api/")
        # owner, name, then what is asked (tree, resolve, revision), the revision and the path.
        parts = re.sub("^/(api/)?((models|datasets)/)?", "", unquote(url.path)).split("/")
        repo, path = "/".join(parts[:2]), "/".join(parts[4:])
        folder, has_token = self.hub.root / repo, bool(self.headers["Authorization"])
        is_elsewhere = bool(url.netloc)  # we are everybody's proxy, so nothing leaves the machine
        self.hub.asked.append((url.netloc or repo, "" if is_api else path))
        # The hub shows the card of a gated repository, and the names of its files, to everyone.
        is_open = not repo.endswith("/gated") and (is_api or path == "README.md")
        if repo.endswith("/silent"):
            self.close_connection = True
        elif "/gated" in repo and not is_open:
            self.answer(403 if has_token else 401, code="GatedRepo")
        elif is_elsewhere or not folder.is_dir():
            self.answer(404 if has_token or is_elsewhere else 401, code="RepoNotFound")
        elif parts[3:4] == ["v9"]:
            self.answer(404, code="RevisionNotFound")
        elif is_api and parts[2:3] == ["tree"]:
            is_recursive = parse_qs(url.query).get("recursive") == ["true"]
            found = (folder / path).rglob("*") if is_recursive else (folder / path).glob("*")
            entries = [self.entry(p, p.relative_to(folder).as_posix()) for p in sorted(found)]
            self.answer(200, entries) if entries else self.answer(404, code="EntryNotFound")
        elif is_api:
            self.answer(200, {"id": repo, "sha": COMMIT, "siblings": []})
        elif not (folder / path).is_file():
            self.answer(404, code="EntryNotFound")
        else:
            self.answer_with_file(folder / path)

    do_HEAD = do_GET

    def do_CONNECT(self) -> None:
        self.hub.asked.append((self.path, ""))
        self.answer(403)

    def entry(self, path: Path, name: str) -> dict[str, Any]:
        kind, size = ("directory", 0) if path.is_dir() else ("file", path.stat().st_size)
        return {"type": kind, "path": name, "size": size, "oid": COMMIT}

    def answer_with_file(self, path: Path) -> None:
        content, headers = path.read_bytes(), {"ETag": f'"{path.name}"', "Accept-Ranges": "bytes"}
        if not (span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")):
            return self.answer(200, content, **headers)
        start, end = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return self.answer(206, content[start : end + 1], **headers)

    def answer(self, status: int, content: Any = b"", *, code: str = "", **headers: str) -> None:
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json"}
        headers |= {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for name, value in (headers | ({"X-Error-Code": code} if code else {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass
